// Sends every kind of event with Segment's SDK for browsers, from a page in a headless
// Chromium: <address> <how many of each> <ids begin with>
const fs = require('node:fs')
const path = require('node:path')
const { inBrowser, nothingLeft } = require('./browser.cjs')
const [address, count, prefix] = process.argv.slice(2)

const manifest = require.resolve('@segment/analytics-next/package.json')
const sdk = fs.readFileSync(path.join(path.dirname(manifest), 'dist/umd/index.js'), 'utf8')
const door = `http://${address}`
const KINDS = ['track', 'identify', 'page', 'screen', 'group', 'alias']
const BAD_ID = 'x'.repeat(101)
const idOf = (kind, at) => `${prefix}-${kind}-${at}-of-segment-next`

/** In the page: sends an event with each of these ids, a row at a time. */
async function send({ door, rows, badId }) {
  const analytics = window.AnalyticsNext.AnalyticsBrowser.load({ writeKey: 'wk', cdnURL: door })
  analytics.on('error', (error) => console.error(error.code, String(error.reason)))
  const kinds = {
    track: (user, options) => analytics.track('Order Placed', { total: 19.5 }, options),
    identify: (user, options) => analytics.identify(user, { plan: 'pro' }, options),
    page: (user, options) => analytics.page('Docs', 'Home', {}, options),
    screen: (user, options) => analytics.screen('Docs', 'Main', {}, options),
    group: (user, options) => analytics.group('acme', { plan: 'pro' }, options),
    alias: (user, options) => analytics.alias(user, 'before', options),
  }
  for (const [at, row] of rows.entries()) {
    for (const [kind, messageId] of row) kinds[kind](`user-${at % 5}`, { messageId })
    // So that what happens to the relay meanwhile meets some of them.
    await new Promise((then) => setTimeout(then, 5))
  }
  // One that no relay takes: it costs the others nothing.
  analytics.track('Bad', {}, { messageId: badId })
  // Fails if it could not be loaded.
  await analytics
}

/** The ids of events that were answered in a way. */
function answered(asked, how) {
  const posts = asked.filter(({ method, body, status }) => method === 'POST' && body && how(status))
  return new Set(posts.map(({ body }) => JSON.parse(body).messageId))
}

inBrowser({ '/': '<script src="sdk.js"></script>', '/sdk.js': sdk }, door, async ({ page, asked, browser }) => {
  const rows = Array.from({ length: Number(count) }, (_, at) => KINDS.map((kind) => [kind, idOf(kind, at)]))
  await page.evaluate(send, { door, rows, badId: BAD_ID })
  const ids = rows.flat().map(([, id]) => id)
  await nothingLeft('events that were not taken', () => {
    const taken = answered(asked(), (status) => status < 300)
    return ids.filter((id) => !taken.has(id))
  })
  await nothingLeft('bad events that were not refused', () =>
    answered(asked(), (status) => status === 400).has(BAD_ID) ? [] : [BAD_ID])
  if (!asked().some(({ method }) => method === 'OPTIONS')) throw new Error('there was no preflight')
  console.log(`@segment/analytics-next ${require(manifest).version} in ${browser}`)
})
