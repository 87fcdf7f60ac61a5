// What the client makes of the relay's answers.
'use strict'
const assert = require('node:assert')
const { test } = require('node:test')
const { USER, acceptAll, client, failure, fakeRelay, grpc } = require('./support.js')

const names = (items) => items.map(({ track }) => track.eventName)

for (const [what, answer] of [['an unset', {}], ['an unknown', { deferred: undefined }]]) {
  test(`${what} answer is deferred with a delay, and flush and close do not spin`, async () => {
    const relay = await fakeRelay((items) => ({ answers: items.map(() => answer), retryDelayMs: 0 }))
    const { client: analytics, said } = client(relay.target)
    analytics.track('Seen', USER)
    let turns = 0
    const turning = setInterval(() => turns++, 10)
    const flushed = await analytics.flush(500)
    assert.strictEqual(flushed.waiting, 1)
    const closed = await analytics.close(500)
    clearInterval(turning)
    relay.stop()
    assert.ok(relay.calls.length >= 2 && relay.calls.length < 40, `${relay.calls.length} calls`)
    assert.ok(turns > 20, 'the host goes on')
    assert.deepStrictEqual([closed.accepted, closed.abandoned, closed.waiting], [0, 1, 0])
    assert.match(said[0], /an answer that this client does not know/)
  })
}

test('too few answers settle nothing', async () => {
  const relay = await fakeRelay((items, call) => call === 1 ? { answers: [], retryDelayMs: 0 } : acceptAll(items))
  const { client: analytics } = client(relay.target)
  analytics.track('Seen', USER)
  const { accepted, retries } = await analytics.close()
  relay.stop()
  assert.deepStrictEqual([accepted, retries], [1, 1])
})

test('what is deferred keeps its place, its id and its time', async () => {
  const relay = await fakeRelay((items, call) => call > 1
    ? acceptAll(items)
    : { answers: items.map((_, index) => index < 1 ? { accepted: {} } : { deferred: { reason: 'QUEUE_FULL' } }), retryDelayMs: 1 })
  const { client: analytics } = client(relay.target)
  const ids = ['a', 'b', 'c'].map((name) => analytics.track(name, USER))
  const { accepted } = await analytics.close()
  relay.stop()
  assert.strictEqual(accepted, 3)
  assert.deepStrictEqual(relay.calls.map(names), [['a', 'b', 'c'], ['b', 'c']])
  assert.deepStrictEqual(relay.calls[1], relay.calls[0].slice(1))
  assert.strictEqual(relay.calls[1][0].track.eventId, ids[1])
})

test('a refused event is named with its id and field, and costs no other', async () => {
  const violations = [{ reason: 'EVENT_NAME_EMPTY', field: 'event_name', description: 'got "", want 1 to 255 bytes' }]
  const relay = await fakeRelay((items) => ({
    answers: items.map(({ track }) => track.eventName ? { accepted: {} } : { refused: { violations } }), retryDelayMs: 0
  }))
  const { client: analytics, said } = client(relay.target)
  analytics.track('a', USER)
  const id = analytics.track('', USER)
  const { accepted, refused } = await analytics.close()
  relay.stop()
  assert.deepStrictEqual([accepted, refused], [1, 1])
  assert.match(said[0], new RegExp(`^analytics: "" ${id} refused: event_name: got "", want 1 to 255 bytes \\(EVENT_NAME_EMPTY\\)$`))
})

for (const [code, details] of [
  [grpc.status.RESOURCE_EXHAUSTED, 'grpc: received message larger than max (900 vs. 500)'],
  [grpc.status.UNKNOWN, 'Received HTTP status code 413'],
  [grpc.status.OUT_OF_RANGE, 'decoded message length too large'],
  [grpc.status.RESOURCE_EXHAUSTED, 'no room']
]) {
  test(`a batch that is too large (${details}) is split`, async () => {
    const relay = await fakeRelay((items) => items.length > 2 ? failure(code, details) : acceptAll(items))
    const { client: analytics } = client(relay.target)
    for (let number = 0; number < 8; number++) analytics.track(`event ${number}`, USER)
    const { accepted } = await analytics.close()
    relay.stop()
    assert.strictEqual(accepted, 8)
    const taken = relay.calls.filter((items) => items.length <= 2).flatMap(names)
    assert.deepStrictEqual(taken, [...Array(8).keys()].map((number) => `event ${number}`))
  })
}

test('a lone event that is too large for a proxy is refused, and the next goes on', async () => {
  const relay = await fakeRelay((items) => items.some(({ track }) => track.eventName === 'large')
    ? failure(grpc.status.RESOURCE_EXHAUSTED, 'received message larger than max')
    : acceptAll(items))
  const { client: analytics } = client(relay.target)
  for (const name of ['a', 'large', 'b']) analytics.track(name, USER)
  const { accepted, refused } = await analytics.close()
  relay.stop()
  assert.deepStrictEqual([accepted, refused], [2, 1])
})

test('no room without a word on size refuses nothing', async () => {
  const relay = await fakeRelay((items, call) => call < 3 ? failure(grpc.status.RESOURCE_EXHAUSTED, 'rate limit') : acceptAll(items))
  const { client: analytics } = client(relay.target)
  analytics.track('a', USER)
  const { accepted } = await analytics.close()
  relay.stop()
  assert.strictEqual(accepted, 1)
})
