// Outages, dead paths, bounds.
'use strict'
const assert = require('node:assert')
const { once } = require('node:events')
const { mkdtempSync, readFileSync, rmSync } = require('node:fs')
const { execFileSync } = require('node:child_process')
const net = require('node:net')
const os = require('node:os')
const path = require('node:path')
const { test } = require('node:test')
const { USER, acceptAll, client, failure, fakeRelay, grpc } = require('./support.js')

test('what waits is bounded by count', async () => {
  const { client: analytics, said } = client('127.0.0.1:1', { queueMax: 3 })
  const ids = [1, 2, 3, 4].map(() => analytics.track('Seen', USER))
  assert.strictEqual(ids[3], null)
  assert.match(said[0], /"Seen" dropped: 3 events wait/)
  const { queued, abandoned, dropped } = await analytics.close(0)
  assert.deepStrictEqual([queued, abandoned, dropped], [3, 3, 1])
})

test('what waits is bounded by bytes', async () => {
  const { client: analytics, said } = client('127.0.0.1:1', { queueBytesMax: 50_000 })
  const properties = { text: 'x'.repeat(9_000) }
  for (let number = 0; number < 100; number++) analytics.track('Seen', { ...USER, properties })
  const { waiting, waitingBytes, dropped } = analytics.stats()
  assert.deepStrictEqual([waiting, dropped], [5, 95])
  assert.ok(waitingBytes <= 50_000)
  assert.match(said[0], /\d+ bytes wait/)
  await analytics.close(0)
  assert.strictEqual(analytics.stats().waitingBytes, 0)
})

test('a batch is bounded by bytes', async () => {
  const relay = await fakeRelay()
  const { client: analytics } = client(relay.target, { batchMax: 1000 })
  for (let number = 0; number < 100; number++) analytics.track('Seen', { ...USER, properties: { text: 'x'.repeat(10_000) } })
  const { accepted } = await analytics.close()
  relay.stop()
  assert.strictEqual(accepted, 100)
  assert.deepStrictEqual(relay.calls.map((items) => items.length), [52, 48])
})

test('a relay that comes later gets all, in order, within a second', async () => {
  const relay = await fakeRelay()
  relay.stop()
  const { client: analytics, said } = client(relay.target, { retryDelayMaxMs: 200 })
  const names = [...Array(120).keys()].map(String)
  for (const name of names) analytics.track(name, USER)
  while (analytics.stats().retries < 4) await new Promise((resolve) => setTimeout(resolve, 10))
  const back = await fakeRelay(acceptAll, relay.port)
  const { accepted } = await analytics.flush()
  await analytics.close()
  back.stop()
  assert.strictEqual(accepted, 120)
  assert.deepStrictEqual(back.items().map(({ eventName }) => eventName), names)
  assert.match(said[0], /the relay does not take events, 120 wait, the first is "0" \S{36}: 14 UNAVAILABLE/)
})

test('a path that died without a word is left after one call', async () => {
  // Something on the way that stops forwarding, as a firewall that forgot the connection.
  const relay = await fakeRelay()
  let dead = false
  const ways = []
  const middle = net.createServer((near) => {
    const far = net.connect(relay.port, '127.0.0.1')
    ways.push(near)
    for (const [from, to] of [[near, far], [far, near]]) {
      from.on('error', () => {}).on('close', () => to.destroy())
    }
    const way = ways.length
    near.on('data', (data) => { if (!dead || way > 1) far.write(data) })
    far.on('data', (data) => { if (!dead || way > 1) near.write(data) })
  }).listen(0, '127.0.0.1')
  await once(middle, 'listening')
  const { client: analytics } = client(`127.0.0.1:${middle.address().port}`, { callTimeoutMs: 300 })
  analytics.track('before', USER)
  assert.strictEqual((await analytics.flush()).accepted, 1)
  dead = true
  analytics.track('after', USER)
  const { accepted, retries } = await analytics.close()
  middle.close()
  relay.stop()
  assert.deepStrictEqual([accepted, retries, ways.length], [2, 1, 2])
})

test('a relay that takes the connection and never answers: flush and close are bounded', async () => {
  const silent = net.createServer(() => {}).listen(0, '127.0.0.1')
  await once(silent, 'listening')
  const { client: analytics } = client(`127.0.0.1:${silent.address().port}`)
  analytics.track('Seen', USER)
  for (const [call, want] of [['flush', { waiting: 1, abandoned: 0 }], ['close', { waiting: 0, abandoned: 1 }]]) {
    const started = performance.now()
    const { waiting, abandoned } = await analytics[call](300)
    assert.deepStrictEqual({ waiting, abandoned }, want)
    assert.ok(performance.now() - started < 4000)
  }
  silent.close()
})

test('close before the answer cancels the call; close again and later events are harmless', async () => {
  const relay = await fakeRelay(() => undefined)
  const { client: analytics, said } = client(relay.target)
  const id = analytics.track('Seen', USER)
  const closes = await Promise.all([analytics.close(300), analytics.close(300)])
  assert.deepStrictEqual(closes.map(({ abandoned }) => abandoned), [1, 1])
  assert.match(said[0], new RegExp(`ended before the relay had taken 1 events, the first is "Seen" ${id}: they are lost`))
  assert.strictEqual(analytics.track('late', USER), null)
  assert.match(said.at(-1), /"late" dropped: the client is closed/)
  relay.stop()
})

test('any code is waited out, and the ids stay', async () => {
  const codes = [grpc.status.UNAVAILABLE, grpc.status.INTERNAL, grpc.status.UNKNOWN, grpc.status.UNIMPLEMENTED, grpc.status.PERMISSION_DENIED]
  const relay = await fakeRelay((items, call) => call <= codes.length ? failure(codes[call - 1], 'no') : acceptAll(items))
  const { client: analytics } = client(relay.target, { retryDelayMaxMs: 20 })
  analytics.track('Seen', USER)
  const { accepted } = await analytics.close()
  relay.stop()
  assert.strictEqual(accepted, 1)
  assert.strictEqual(new Set(relay.items().map(({ eventId }) => eventId)).size, 1)
  assert.strictEqual(relay.items().length, codes.length + 1)
})

test('TLS, with an authority of the caller\'s own', async (t) => {
  const dir = mkdtempSync(path.join(os.tmpdir(), 'relay-tls-'))
  t.after(() => rmSync(dir, { recursive: true }))
  const [key, cert] = ['key.pem', 'cert.pem'].map((name) => path.join(dir, name))
  try {
    execFileSync('openssl', ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', key, '-out', cert, '-days', '2',
      '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'], { stdio: 'ignore' })
  } catch {
    return t.skip('not run: openssl is missing')
  }
  const [ca, pair] = [readFileSync(cert), [{ private_key: readFileSync(key), cert_chain: readFileSync(cert) }]]
  const relay = await fakeRelay(acceptAll, 0, grpc.ServerCredentials.createSsl(null, pair))
  const { client: analytics } = client(relay.target, { credentials: grpc.credentials.createSsl(ca) })
  analytics.track('Seen', USER)
  assert.strictEqual((await analytics.close()).accepted, 1)
  const { client: distrustful, said } = client(`https://${relay.target}`)
  distrustful.track('Seen', USER)
  assert.strictEqual((await distrustful.close(500)).abandoned, 1)
  assert.match(said[0], /certificate/)
  relay.stop()
})

test('http:// is taken for what it means', async () => {
  const relay = await fakeRelay()
  const { client: analytics } = client(`http://${relay.target}/`)
  analytics.track('Seen', USER)
  assert.strictEqual((await analytics.close()).accepted, 1)
  relay.stop()
})
