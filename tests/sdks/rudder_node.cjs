// Sends every kind of event with RudderStack's SDK for Node: <address> <how many of each> <ids begin with>
const { createRequire } = require('node:module')
const path = require('node:path')
const Analytics = require('@rudderstack/rudder-sdk-node')
const [address, count, prefix] = process.argv.slice(2)

const client = new (Analytics.default ?? Analytics)('wk', {
  dataPlaneUrl: `http://${address}`, flushAt: 7, flushInterval: 200, retryCount: 20, gzip: true,
})
// Its flush tells of one batch: each event is waited for.
let waiting = 0
const sent = (error) => {
  waiting -= 1
  if (error) console.error(String(error))
}
const send = (kind, message) => {
  waiting += 1
  client[kind](message, sent)
}
const messages = {
  track: { event: 'Order Placed', properties: { total: 19.5 } },
  identify: { traits: { plan: 'pro' } },
  page: { name: 'Home', properties: { url: 'https://x.example/' } },
  screen: { name: 'Main' },
  group: { groupId: 'acme', traits: { plan: 'pro' } },
  alias: { previousId: 'before' },
}
const pause = (ms) => new Promise((then) => setTimeout(then, ms))

async function main() {
  for (let at = 0; at < Number(count); at++) {
    for (const [kind, message] of Object.entries(messages)) {
      send(kind, { ...message, userId: `user-${at % 5}`, messageId: `${prefix}-${kind}-${at}-of-rudder-node` })
    }
    await pause(5)
  }
  // One that no relay takes: it costs the others nothing.
  send('track', { event: 'Bad', userId: 'u', messageId: 'x'.repeat(101) })
  while (waiting > 0) await pause(20)
  const found = require.resolve('@rudderstack/rudder-sdk-node')
  const home = found.slice(0, found.indexOf('rudder-sdk-node') + 'rudder-sdk-node'.length)
  console.log(`@rudderstack/rudder-sdk-node ${createRequire(path.join(home, 'x.js'))('./package.json').version}`)
  process.exit(0)
}
main()
