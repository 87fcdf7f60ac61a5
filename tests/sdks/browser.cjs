// A headless Chromium on a page of ours, and what leaves it.
const fs = require('node:fs')
const http = require('node:http')
const path = require('node:path')
const { chromium } = require('playwright-core')

const PATIENCE_MS = 60_000
/** For what is not waited for by `until`: above all of the browser's own bounds. */
const LIFETIME_MS = 80_000

/** The browser's program: RELAY_CHROMIUM, or the one on the path. */
function executable() {
  const folders = (process.env.PATH ?? '').split(path.delimiter)
  const found = folders.map((folder) => path.join(folder, 'chromium')).find((file) => fs.existsSync(file))
  const chosen = process.env.RELAY_CHROMIUM || found
  if (!chosen) throw new Error('there is no chromium on the path')
  return chosen
}

/** Serves these texts by their paths. The host is another site than the relay's address. */
async function serve(texts) {
  const server = http.createServer((request, response) => {
    const text = texts[request.url]
    const type = request.url.endsWith('.js') ? 'text/javascript' : 'text/html'
    // Of what a browser asks for by itself there is nothing.
    response.writeHead(text === undefined ? 204 : 200, {
      'content-type': `${type}; charset=utf-8`,
      // Browsers want to be rid of this event, and pages still have it.
      'permissions-policy': 'unload=(self)',
    })
    response.end(text)
  })
  await new Promise((then) => server.listen(0, '127.0.0.1', then))
  return `http://localhost:${server.address().port}`
}

/** What a page sends, preflights too: method, address, body, and the status once there is one. */
async function requestsOf(context, page) {
  const requests = new Map()
  const session = await context.newCDPSession(page)
  session.on('Network.requestWillBeSent', ({ requestId, request: { method, url, postData } }) =>
    requests.set(requestId, { method, url, body: postData }))
  session.on('Network.responseReceived', ({ requestId, response }) =>
    Object.assign(requests.get(requestId) ?? {}, { status: response.status }))
  await session.send('Network.enable')
  return requests
}

/** Waits until nothing is left of what a function lists. */
async function nothingLeft(what, left) {
  const end = Date.now() + PATIENCE_MS
  while (left().length > 0) {
    if (Date.now() > end) throw new Error(`waited in vain: ${what}: ${left().length}, as ${left().slice(0, 5)}`)
    await new Promise((then) => setTimeout(then, 100))
  }
}

/** Opens a page of these texts and works in it, while nothing but it and the door is asked. */
async function work(browser, texts, door, does) {
  const context = await browser.newContext()
  // A machine that has nothing but itself is offline to Chromium; but the relay is on it.
  await context.addInitScript(() => Object.defineProperty(Navigator.prototype, 'onLine', { get: () => true }))
  const page = await context.newPage()
  const said = []
  page.on('console', (message) => said.push(message.text()))
  page.on('pageerror', (error) => said.push(String(error)))
  const requests = await requestsOf(context, page)
  const origin = await serve(texts)
  await page.goto(origin)
  try {
    await does({ page, origin, asked: () => [...requests.values()], browser: `Chromium ${browser.version()}` })
  } catch (error) {
    throw new Error(`${error.message}\nthe page said: ${said.slice(-10).join('\n')}`)
  }
  const strangers = [...requests.values()].filter(({ url }) => ![origin, door].includes(new URL(url).origin))
  if (strangers.length > 0) throw new Error(`others were asked: ${JSON.stringify(strangers)}`)
}

/** Does something in a page; the process ends with it, and fails if it does. */
async function inBrowser(texts, door, does) {
  setTimeout(() => {
    console.error('it does not come to an end')
    process.exit(1)
  }, LIFETIME_MS)
  try {
    // As root Chromium's own sandbox does not start. Who is no part of the test is not found.
    const args = process.getuid() === 0 ? ['--no-sandbox'] : []
    args.push('--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1')
    const browser = await chromium.launch({ executablePath: executable(), args })
    await work(browser, texts, door, does)
    await browser.close()
    process.exit(0)
  } catch (error) {
    console.error(error.message)
    // The browser ends with us.
    process.exit(1)
  }
}

module.exports = { executable, inBrowser, nothingLeft }
