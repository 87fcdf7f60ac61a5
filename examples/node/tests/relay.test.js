// The client and the relay itself, as RELAY_BIN names it.
'use strict'
const assert = require('node:assert')
const { spawn } = require('node:child_process')
const { mkdtempSync, rmSync } = require('node:fs')
const os = require('node:os')
const path = require('node:path')
const readline = require('node:readline')
const { test } = require('node:test')
const { USER, client } = require('./support.js')

const { RELAY_BIN, RELAY_REQUIRE } = process.env
const missing = !RELAY_BIN && 'not run: RELAY_BIN, the path of a built analytics-relay, is not set'
const skip = RELAY_REQUIRE === 'all' ? false : missing

// Starts a relay that sends nothing and logs the bodies that it would send.
async function startRelay (t, settings = {}) {
  assert.ok(!missing, missing)
  const dir = mkdtempSync(path.join(os.tmpdir(), 'relay-data-'))
  const env = {
    PATH: process.env.PATH, TEST_MODE: 'true', LOG_FORMAT: 'json', LOG_LEVEL: 'debug', GRPC_PORT: '0', HTTP_PORT: 'off', METRICS_PORT: '0',
    FLUSH_INTERVAL_SECONDS: '1', ANALYTICS_PROVIDER: 'segment', DATA_DIR: dir, ...settings
  }
  const child = spawn(path.resolve(RELAY_BIN), [], { cwd: dir, env, stdio: ['ignore', 'pipe', 'inherit'] })
  t.after(() => {
    child.kill('SIGKILL')
    rmSync(dir, { recursive: true })
  })
  const relay = { child, lines: [] }
  const started = new Promise((resolve, reject) => {
    child.once('close', () => reject(new Error(`the relay ended: ${relay.lines.join('\n')}`)))
    readline.createInterface({ input: child.stdout }).on('line', (line) => {
      relay.lines.push(line)
      const { message, grpc_addr: address } = line.startsWith('{') ? JSON.parse(line) : {}
      if (message === 'relay started') resolve(Number(address.split(':').at(-1)))
    })
  })
  relay.port = await started
  relay.target = `127.0.0.1:${relay.port}`
  relay.stop = () => new Promise((resolve) => child.once('close', (code) => resolve(code)).kill('SIGTERM'))
  return relay
}

const balance = (relay) => relay.lines.map((line) => JSON.parse(line)).find(({ message }) => message === 'balance')

test('the relay takes what the client makes of any value', { skip }, async (t) => {
  const relay = await startRelay(t)
  const { client: analytics, said } = client(relay.target)
  const circle = {}
  circle.self = circle
  for (let number = 0; number < 1000; number++) {
    analytics.track(`Order ${number}`, {
      userId: number + 1, timestamp: new Date(), context: { ip: '203.0.113.9', userAgent: 'x' },
      properties: { total: 49.9, big: 2n ** 80n, cut: 'half \ud83d', when: new Date(), set: new Set([1]), nan: NaN, circle, coupon: null }
    })
  }
  analytics.identify('user-1', { plan: 'pro', trialEnds: null, gone: undefined })
  const refused = analytics.track('', USER)
  const stats = await analytics.close(10_000)
  assert.deepStrictEqual([stats.queued, stats.accepted, stats.refused, stats.waiting], [1002, 1001, 1, 0])
  assert.ok(said.some((line) => line.includes(`"" ${refused} refused: event_name: `) && line.includes('EVENT_NAME_EMPTY')))
  assert.strictEqual(await relay.stop(), 0)
  assert.strictEqual(balance(relay).delivered, 1001)
  const bodies = relay.lines.join('\n')
  assert.ok(bodies.includes('half \ufffd'))
  assert.ok(bodies.includes('trialEnds') && !bodies.includes('gone'))
})

test('a relay that is stopped and started again gets every event', { skip }, async (t) => {
  const first = await startRelay(t)
  const { client: analytics } = client(first.target, { retryDelayMaxMs: 500 })
  const sending = setInterval(() => analytics.track('Seen', USER), 5)
  while (analytics.stats().accepted < 20) await new Promise((resolve) => setTimeout(resolve, 10))
  assert.strictEqual(await first.stop(), 0)
  while (analytics.stats().waiting < 50) await new Promise((resolve) => setTimeout(resolve, 10))
  const second = await startRelay(t, { GRPC_PORT: String(first.port) })
  clearInterval(sending)
  const { queued, accepted, abandoned } = await analytics.close(20_000)
  assert.deepStrictEqual([accepted, abandoned], [queued, 0])
  assert.strictEqual(await second.stop(), 0)
  // A call whose answer was lost comes twice, with the same ids.
  assert.ok(balance(first).accepted + balance(second).accepted >= queued)
})

test('a full queue defers, and nothing is lost or out of order', { skip }, async (t) => {
  const relay = await startRelay(t, { QUEUE_MAX_EVENTS: '100', BATCH_SIZE: '10' })
  const { client: analytics } = client(relay.target)
  for (let number = 0; number < 2000; number++) analytics.track('Seen', USER)
  const { accepted } = await analytics.close(60_000)
  assert.strictEqual(accepted, 2000)
  assert.strictEqual(await relay.stop(), 0)
  assert.strictEqual(balance(relay).accepted, 2000)
})
