// A relay that answers as a test wants, and programs that end.
'use strict'
const { spawn } = require('node:child_process')
const path = require('node:path')

let grpc, protoLoader
try {
  grpc = require('@grpc/grpc-js')
  protoLoader = require('@grpc/proto-loader')
} catch {
  console.log('not run: @grpc/grpc-js or @grpc/proto-loader is missing (npm ci in examples/node)')
  process.exit(77)
}
const { Analytics } = require('analytics-relay-client')

const PACKAGE = path.join(__dirname, '..')
const { analytics } = grpc.loadPackageDefinition(protoLoader.loadSync('analytics/v1/analytics.proto', {
  includeDirs: [path.join(PACKAGE, 'proto')], longs: Number, enums: String, oneofs: true, defaults: true
}))
const ACCEPTED = { accepted: { eventId: 'x' } }
const USER = { userId: 'user-1' }

// `answer(items, callNumber)` is the response, an error with a code, or nothing:
// then the call hangs. `calls` holds the items of each call.
async function fakeRelay (answer = acceptAll, port = 0, credentials = grpc.ServerCredentials.createInsecure()) {
  const server = new grpc.Server()
  const relay = { calls: [], sessions: 0, server }
  server.addService(analytics.v1.AnalyticsService.service, {
    trackBatch ({ request }, reply) {
      relay.calls.push(request.items)
      const response = answer(request.items, relay.calls.length)
      if (response instanceof Error) reply(response)
      else if (response) reply(null, response)
    }
  })
  relay.port = await new Promise((resolve, reject) => {
    server.bindAsync(`127.0.0.1:${port}`, credentials, (error, bound) => error ? reject(error) : resolve(bound))
  })
  relay.target = `127.0.0.1:${relay.port}`
  relay.items = () => relay.calls.flat().map(({ track, identify }) => track ?? identify)
  relay.stop = () => server.forceShutdown()
  return relay
}

const acceptAll = (items) => ({ answers: items.map(() => ACCEPTED), retryDelayMs: 0 })

const failure = (code, details, metadata) => Object.assign(new Error(details), { code, details, metadata })

// A client and what it said.
function client (target, options) {
  const said = []
  const made = new Analytics(target, { logger: { warn: (message) => said.push(message) }, warnIntervalMs: 0, ...options })
  return { client: made, said }
}

// What one call sends: the event and its properties, and what was said.
async function sent (call) {
  const relay = await fakeRelay()
  const { client: made, said } = client(relay.target)
  const id = call(made)
  const stats = await made.close()
  relay.stop()
  const [event] = relay.items()
  const json = event && Buffer.from(event.propertiesJson).toString()
  return { id, event, json, properties: json ? JSON.parse(json) : undefined, said, stats }
}

// Runs a program to its end; fails if it does not end.
function run (script, args = [], { limitMs = 20_000, file, ...options } = {}) {
  const started = performance.now()
  const child = spawn(process.execPath, file ? [file, ...args] : ['-e', script, ...args], { cwd: PACKAGE, ...options })
  const output = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr']) child[name].on('data', (data) => { output[name] += data })
  const timer = setTimeout(() => child.kill('SIGKILL'), limitMs)
  return new Promise((resolve) => {
    child.on('close', (code, signal) => {
      clearTimeout(timer)
      resolve({ ...output, code, signal, tookMs: performance.now() - started })
    })
  })
}

module.exports = { Analytics, PACKAGE, USER, acceptAll, client, failure, fakeRelay, grpc, run, sent }
