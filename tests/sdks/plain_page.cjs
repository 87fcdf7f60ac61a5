// Sends tracks from a page without an SDK, in each way that a browser has, reads errors, and
// leaves: <address> <how many each way> <ids begin with>. The door takes the key `wk`.
// It stays until standard input ends: of what is sent on leaving, no page sees the answer.
const { inBrowser, nothingLeft } = require('./browser.cjs')
const [address, count, prefix] = process.argv.slice(2)

const door = `http://${address}`
const PREFLIGHTED = ['beacon-json', 'fetch-json', 'keepalive']
/** What a page is told that sends an event without a name, and one with another's key. */
const REFUSALS = [[400, 'invalid_request', 'event'], [401, 'invalid_write_key', 'writeKey']]

/** In the page: sends an event each way; returns what was said to those that are answered. */
async function send({ door, prefix, at }) {
  const event = (way) => ({ type: 'track', event: 'Seen', userId: 'u', messageId: `${prefix}-${way}-${at}` })
  const fetched = async (way, options, more) => {
    const body = JSON.stringify({ ...event(way), ...more })
    const answer = await fetch(`${door}/v1/track?way=${way}`, { method: 'POST', body, ...options })
    return [way, answer.status, await answer.text()]
  }
  const beacon = (way, query, more, type = 'text/plain') => {
    const body = new Blob([JSON.stringify({ batch: [event(way)], ...more })], { type })
    const url = `${door}/beacon/v1/batch?way=${way}${query}`
    if (!navigator.sendBeacon(url, body)) throw new Error(`the browser refuses ${url}`)
  }
  const headers = { 'content-type': 'application/json', authorization: `Basic ${btoa('wk:')}` }
  beacon('beacon-query', '&writeKey=wk')
  beacon('beacon-body', '', { writeKey: 'wk' })
  beacon('beacon-json', '', { writeKey: 'wk' }, 'application/json')
  return [
    await fetched('fetch-json', { headers }),
    await fetched('fetch-text', {}, { writeKey: 'wk' }),
    await fetched('keepalive', { headers, keepalive: true }),
  ]
}

/** In the page: what it reads when it sends what is refused, with a preflight or without. */
async function errors({ door, type }) {
  const bad = { noName: { userId: 'u', writeKey: 'wk' }, badKey: { event: 'x', userId: 'u', writeKey: 'other' } }
  const read = async (event) => {
    const headers = { 'content-type': type }
    const options = { method: 'POST', headers, body: JSON.stringify(event) }
    const answer = await fetch(`${door}/v1/track`, options)
    const { code, field } = await answer.json()
    return [answer.status, code, field]
  }
  return [await read(bad.noName), await read(bad.badKey)]
}

/** In the page: sends when it is left, however it is. */
function sendOnLeaving({ door, prefix, at }) {
  for (const moment of ['pagehide', 'unload']) {
    window.addEventListener(moment, () => {
      const body = (way) => {
        const messageId = `${prefix}-${moment}-${way}-${at}`
        return JSON.stringify({ batch: [{ type: 'track', event: 'Left', userId: 'u', messageId }] })
      }
      navigator.sendBeacon(`${door}/beacon/v1/batch?writeKey=wk`, body('beacon'))
      fetch(`${door}/v1/batch?writeKey=wk`, { method: 'POST', keepalive: true, body: body('keepalive') })
    })
  }
}

const same = (what, got, want) => {
  const [is, ought] = [got, want].map((value) => JSON.stringify(value))
  if (is !== ought) throw new Error(`${what}: got ${is}, want ${ought}`)
}
const wayOf = ({ url }) => new URL(url).searchParams.get('way')

inBrowser({ '/': '<p>one</p>' }, door, async ({ page, origin, asked, browser }) => {
  for (let at = 0; at < Number(count); at++) {
    for (const [way, status, said] of await page.evaluate(send, { door, prefix, at })) {
      same(way, [status, said], [200, '{"success":true}'])
    }
  }
  await nothingLeft('answers to beacons', () => asked().filter(({ status }) => status === undefined).map(wayOf))
  same('statuses', [...new Set(asked().map(({ status }) => status))].sort(), [200, 204])
  const preflights = asked().filter(({ method }) => method === 'OPTIONS')
  same('preflights', [...new Set(preflights.map(wayOf))].sort(), PREFLIGHTED)
  for (const type of ['text/plain', 'application/json']) {
    same(`errors of ${type}`, await page.evaluate(errors, { door, type }), REFUSALS)
  }
  for (let at = 0; at < Number(count); at++) {
    await page.evaluate(sendOnLeaving, { door, prefix, at })
    await (at + 1 < Number(count) ? page.goto(origin) : page.close())
  }
  for await (const _ of process.stdin);
  console.log(`a page in ${browser}`)
})
