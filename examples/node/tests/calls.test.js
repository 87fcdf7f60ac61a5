// Calls of another shape, values and times that JavaScript has and JSON has not.
'use strict'
const assert = require('node:assert')
const { test } = require('node:test')
const { Analytics, USER, client, fakeRelay, sent } = require('./support.js')

const nameless = { get userId () { throw new Error('no') } }
for (const [what, call, want] of [
  ['an object where the name belongs', (a) => a.track({ userId: 'u', event: 'x' }), /^analytics: an event dropped: name: got an object, want a text/],
  ['a missing name', (a) => a.track(undefined, USER), /name: got undefined/],
  ['user_id for userId', (a) => a.track('Paid', { user_id: 'u' }), /"Paid" dropped: user_id: not an option; userId is meant\?/],
  ['an unknown option', (a) => a.track('Paid', { userId: 'u', plan: 'pro' }), /"Paid" dropped: plan: not an option; want one of userId/],
  ['properties in place of the options', (a) => a.track('Paid', { total: 5 }), /total: not an option/],
  ['the user as a second argument', (a) => a.track('Paid', 'u'), /"Paid" dropped: options: got a text, want an object/],
  ['no options', (a) => a.track('Paid'), /options: got undefined/],
  ['no user', (a) => a.track('Paid', {}), /"Paid" dropped: userId: got undefined, want an id/],
  ['an empty user', (a) => a.track('Paid', { userId: '' }), /userId: got an empty text/],
  ['a user that is an object', (a) => a.track('Paid', { userId: { id: 5 } }), /userId: got an object, want a text or a whole number/],
  ['a user that is NaN', (a) => a.track('Paid', { userId: NaN }), /userId: got NaN/],
  ['properties that are a list', (a) => a.track('Paid', { ...USER, properties: [1] }), /properties: got a list, want an object/],
  ['properties that are a text', (a) => a.track('Paid', { ...USER, properties: '{}' }), /properties: got a text/],
  ['an object where identify wants the user', (a) => a.identify({ userId: 'u', traits: {} }), /identify dropped: userId: got an object/],
  ['traits that are a date', (a) => a.identify('u', new Date()), /traits: got a Date/],
  ['a durability that is none', (a) => a.track('Paid', { ...USER, durability: 'disk' }), /durability: got a text, want one of QUEUED/],
  ['options that throw', (a) => a.track('Paid', nameless), /"Paid" dropped: its values' own code threw/],
  ['an event too large', (a) => a.track('Paid', { ...USER, properties: { text: 'x'.repeat(1e6) } }), /got \d+ bytes, want at most 65536/],
  ['more values than the relay has names', (a) => a.track('Paid', { ...USER, properties: { list: Array(1e6).fill(1) } }), /properties: got over/]
]) {
  test(`${what} is dropped, and the warning names it`, async () => {
    const { id, event, said, stats } = await sent(call)
    assert.strictEqual(id, null)
    assert.strictEqual(event, undefined)
    assert.match(said[0], want)
    assert.strictEqual(stats.dropped, 1)
  })
}

test('a wrong option of the constructor is a TypeError that names it', () => {
  for (const [target, options, want] of [
    ['localhost:1', { flushInterval: 5 }, /flushInterval: not an option; want some of queueMax/],
    ['localhost:1', { batchMax: 0 }, /batchMax: got 0, want a whole number from 1 to 1000/],
    ['localhost:1', { batchMax: '5' }, /batchMax: got string/],
    ['localhost:1', { logger: {} }, /logger/],
    ['localhost:1', { credentials: 'secret' }, /redentials/],
    ['localhost:1', null, /options: got null/],
    [undefined, {}, /target: got undefined/],
    ['ftp://localhost', {}, /target: got "ftp/],
    ['https://localhost/path', {}, /target: got "https/]
  ]) {
    assert.throws(() => new Analytics(target, options), (error) => error instanceof TypeError && want.test(error.message))
  }
})

test('ids in JavaScript\'s forms become texts', async () => {
  const objectId = { toHexString: () => '507f1f77bcf86cd799439011' }
  for (const [userId, want] of [[4821, '4821'], [9007199254740993n, '9007199254740993'], [objectId, objectId.toHexString()]]) {
    assert.strictEqual((await sent((a) => a.track('Seen', { userId }))).event.userId, want)
  }
})

test('only a null that the caller wrote is a null; what JSON has no form for is left out and named', async () => {
  const circle = { ok: 1 }
  circle.self = circle
  const { properties, said, stats } = await sent((a) => a.identify('u', {
    removed: null, nan: NaN, infinite: -Infinity, date: new Date(NaN), missing: undefined, call: () => 1, symbol: Symbol('s'),
    promise: Promise.resolve(1), nulled: { toJSON: () => null }, throws: { get x () { throw new Error('no') } }, circle, list: [1, NaN, 2], name: 'Ada'
  }))
  assert.deepStrictEqual(properties, { removed: null, circle: { ok: 1 }, list: [1, 2], name: 'Ada' })
  assert.strictEqual(stats.leftOut, 11)
  assert.match(said[0], /^analytics: identify \S{36}: left out properties\.nan: got NaN \(and 10 more in this event\)$/)
})

test('values in JavaScript\'s forms become JSON\'s', async () => {
  class Money { amount = 5; #secret = 1; get secret () { return this.#secret } }
  const shared = { a: 1 }
  const { properties, said } = await sent((a) => a.track('Seen', {
    ...USER,
    properties: new Map(Object.entries({
      big: 9007199254740993n, date: new Date(0), map: new Map([['k', 1], [2, 'two']]), set: new Set(['a', 'b']), buffer: Buffer.from('hi'),
      bytes: new Uint8Array([1, 2]).buffer, numbers: new Float64Array([1.5, 2]), json: { toJSON: () => ({ x: 1 }) }, money: new Money(),
      error: new TypeError('bad'), pattern: /x/g, url: new URL('http://a/b'), boxed: Object('text'), twice: [shared, shared], zero: -0
    }))
  }))
  assert.deepStrictEqual(said, [])
  assert.deepStrictEqual(properties, {
    big: '9007199254740993', date: '1970-01-01T00:00:00.000Z', map: { k: 1, 2: 'two' }, set: ['a', 'b'], buffer: 'aGk=',
    bytes: 'AQI=', numbers: [1.5, 2], json: { x: 1 }, money: { amount: 5 },
    error: { name: 'TypeError', message: 'bad' }, pattern: '/x/g', url: 'http://a/b', boxed: 'text', twice: [{ a: 1 }, { a: 1 }], zero: 0
  })
})

test('an object nested without end is cut, not an overflow', async () => {
  const top = {}
  for (let level = 0, here = top; level < 5000; level++) here = here.x = {}
  const { id, said } = await sent((a) => a.track('Seen', { ...USER, properties: top }))
  assert.ok(id)
  assert.match(said[0], /nested deeper than 64 levels/)
})

test('texts travel as UTF-8, and half an emoji costs nothing but itself', async () => {
  const { event, json, said } = await sent((a) => a.track('Ду\ud83d', { userId: 'u\udc00', properties: { 'k\ud83d': 'При\ud83d', ok: '😀' } }))
  assert.deepStrictEqual([event.eventName, event.userId], ['Ду\ufffd', 'u\ufffd'])
  assert.strictEqual(json, '{"k\ufffd":"При\ufffd","ok":"😀"}')
  assert.deepStrictEqual(said, [])
})

test('context never costs the event', async () => {
  const { event, said } = await sent((a) => a.track('Seen', { ...USER, context: { ip: ['1.2.3.4'], userAgent: 'x', city: 'Turin' } }))
  assert.deepStrictEqual([event.context.ip, event.context.userAgent, event.context.json.length], ['', 'x', 0])
  assert.match(said[0], /left out context\.ip: got a list, want a text/)
})

const MOMENT = 1_790_000_000_123
for (const [what, time, want = MOMENT] of [
  ['a Date', new Date(MOMENT)], ['milliseconds', MOMENT], ['a BigInt', BigInt(MOMENT)], ['milliseconds with a fraction', MOMENT + 0.7],
  ['seconds', 1_790_000_000, 1_790_000_000_000], ['seconds with a fraction', MOMENT / 1000],
  ['an ISO text', new Date(MOMENT).toISOString()], ['an ISO text with an offset', '2026-09-21T16:13:20.123+02:00'],
  ['a day', '2026-09-21', Date.UTC(2026, 8, 21)], ['Temporal.Instant', { epochMilliseconds: MOMENT }],
  ['Moment and Day.js', { toDate: () => new Date(MOMENT) }], ['Luxon', { toJSDate: () => new Date(MOMENT) }]
]) {
  test(`the time may be ${what}`, async () => {
    for (const field of ['timestamp', 'timestampMs']) {
      assert.strictEqual((await sent((a) => a.track('Seen', { ...USER, [field]: time }))).event.timestampMs, want)
    }
  })
}

for (const [what, time] of [
  ['null', null], ['an invalid Date', new Date(NaN)], ['NaN', NaN], ['an empty text', ''], ['another text', 'yesterday'], ['digits', '1790000000123'],
  ['zero', 0], ['a boolean', true], ['an object', {}], ['a list', [MOMENT]], ['nanoseconds', 1_790_000_000_123_000_000n]
]) {
  test(`a time that is ${what} is never "now": the event is dropped and the field named`, async () => {
    const { id, said } = await sent((a) => a.track('Seen', { ...USER, timestamp: time }))
    assert.strictEqual(id, null)
    assert.match(said[0], /^analytics: "Seen" dropped: timestamp: got /)
  })
}

test('the time is fixed at the call', async () => {
  const before = Date.now()
  const { event } = await sent((a) => a.track('Seen', USER))
  assert.ok(event.timestampMs >= before && event.timestampMs <= Date.now())
})

test('what the caller changes after the call is not sent', async () => {
  const properties = { n: 1 }
  const { properties: got } = await sent((a) => { a.track('Seen', { ...USER, properties }); properties.n = 2 })
  assert.deepStrictEqual(got, { n: 1 })
})

test('one warning of a kind in a while, the others are counted', async () => {
  const relay = await fakeRelay()
  const { client: analytics, said } = client(relay.target, { warnIntervalMs: 60_000 })
  for (let number = 0; number < 1000; number++) analytics.track('Paid', { user_id: number })
  assert.strictEqual(said.length, 1)
  const stats = await analytics.close()
  relay.stop()
  assert.deepStrictEqual([stats.dropped, stats.warningsUnwritten], [1000, 999])
  assert.match(said.at(-1), /warnings that were only counted: misuse 999/)
})

test('a logger that throws fails nobody', async () => {
  const analytics = new Analytics('localhost:1', { logger: { warn () { throw new Error('no') } } })
  assert.strictEqual(analytics.track('Paid', {}), null)
  await analytics.close(0)
})
