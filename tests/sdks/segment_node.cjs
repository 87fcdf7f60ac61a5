// Sends every kind of event with Segment's SDK for Node: <address> <how many of each> <ids begin with>
const { Analytics } = require('@segment/analytics-node')
const [address, count, prefix] = process.argv.slice(2)

const analytics = new Analytics({
  writeKey: 'wk', host: `http://${address}`, maxEventsInBatch: 7, flushInterval: 200, maxRetries: 20,
})
analytics.on('error', (error) => console.error(String(error.reason ?? error.code ?? error)))
const kinds = {
  track: (it) => analytics.track({ ...it, event: 'Order Placed', properties: { total: 19.5 } }),
  identify: (it) => analytics.identify({ ...it, traits: { plan: 'pro' } }),
  page: (it) => analytics.page({ ...it, name: 'Home', properties: { url: 'https://x.example/' } }),
  screen: (it) => analytics.screen({ ...it, name: 'Main' }),
  group: (it) => analytics.group({ ...it, groupId: 'acme', traits: { plan: 'pro' } }),
  alias: (it) => analytics.alias({ ...it, previousId: 'before' }),
}
async function main() {
  for (let at = 0; at < Number(count); at++) {
    for (const [kind, send] of Object.entries(kinds)) {
      send({ userId: `user-${at % 5}`, messageId: `${prefix}-${kind}-${at}-of-segment-node` })
    }
    // So that what happens to the relay meanwhile meets some of them.
    await new Promise((then) => setTimeout(then, 5))
  }
  // One that no relay takes: it costs the others nothing.
  analytics.track({ event: 'Bad', userId: 'u', messageId: 'x'.repeat(101) })
  await analytics.closeAndFlush({ timeout: 60000 })
  console.log(`@segment/analytics-node ${require('@segment/analytics-node/package.json').version}`)
}
main()
