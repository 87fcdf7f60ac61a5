// A batching client of the relay: never waits, never throws, keeps order.
//
//   npm install @grpc/grpc-js @grpc/proto-loader
//
//   const analytics = new Analytics('localhost:50054')
//   analytics.track('Order Placed', { userId: 'user-1', properties: { total: 49.9, items: ['book', 'pen'] } })
//   ...
//   process.once('SIGTERM', async () => { await analytics.close(); process.exit() })
'use strict'
const grpc = require('@grpc/grpc-js')
const protoLoader = require('@grpc/proto-loader')
const { randomUUID } = require('node:crypto')

const EVENT_BYTES_MAX = 64 * 1024 // more than the relay's limits leave
const BATCH_BYTES_MAX = 512 * 1024 // half of what the relay takes
// A relay that vanished without a word is noticed.
const KEEP_ALIVE = { 'grpc.keepalive_time_ms': 20_000, 'grpc.keepalive_timeout_ms': 5_000 }
const RETRY_DELAY_FIRST_MS = 100
// The batch as a whole breaks a limit: fewer at a time, and a lone event is to blame.
const TOO_LARGE = new Set([grpc.status.OUT_OF_RANGE, grpc.status.INVALID_ARGUMENT])
const ENDED = ['accepted', 'refused', 'abandoned']

// Events wait in a bounded queue and are sent a batch at a time. `counters()`
// says what became of them: queued = accepted + refused + abandoned + waiting.
// What did not fit into the queue is `dropped`.
class Analytics {
  #queue = []
  #counts = { queued: 0, accepted: 0, refused: 0, abandoned: 0, dropped: 0, retries: 0 }
  #sending = null
  #timer = null
  #closesAt = Infinity
  #failures = 0
  #call = null
  #wake = () => {}

  constructor (target, {
    protoDir = 'proto', queueMax = 10_000, batchMax = 50, flushIntervalMs = 100, callTimeoutMs = 10_000,
    retryDelayMaxMs = 10_000, credentials = grpc.credentials.createInsecure(), warn = console.warn
  } = {}) {
    const { analytics } = grpc.loadPackageDefinition(protoLoader.loadSync(
      'analytics/v1/analytics.proto', { includeDirs: [protoDir], longs: Number, enums: String, oneofs: true }))
    this.client = new analytics.v1.AnalyticsService(target, credentials, KEEP_ALIVE)
    this.serialize = analytics.v1.AnalyticsService.service.TrackBatch.requestSerialize
    Object.assign(this, { queueMax, batchMax, flushIntervalMs, callTimeoutMs, retryDelayMaxMs, warn })
    this.batchNow = batchMax
  }

  // Queues an event and returns its id; null if it was dropped.
  track (eventName, options) {
    const { properties, ...fields } = options ?? {}
    return this.#put('track', { ...fields, eventName }, properties)
  }

  // The same for what is known about a user; a null removes a trait.
  identify (userId, traits, fields) {
    return this.#put('identify', { ...fields, userId }, traits)
  }

  counters () {
    return { ...this.#counts, waiting: this.#counts.queued - this.#ended() }
  }

  // Sends what waits at once, and resolves when all of it has been answered.
  async flush () {
    const queued = this.#counts.queued
    this.#wake()
    while (this.#ended() < queued) await this.#send()
  }

  #ended () {
    return ENDED.reduce((sum, name) => sum + this.#counts[name], 0)
  }

  // Takes nothing more and sends what waits; what the relay has not accepted
  // when the time is over is abandoned. Resolves to the counters.
  async close (patienceMs = 5000) {
    if (this.#closesAt === Infinity) {
      this.#closesAt = Date.now() + patienceMs
      // Its deadline was set for a client that stays open.
      const call = this.#call
      if (call) setTimeout(() => call.cancel(), patienceMs).unref()
    }
    await this.flush()
    this.client.close()
    return this.counters()
  }

  #put (kind, fields, properties) {
    if (this.#closesAt !== Infinity || this.#queue.length >= this.queueMax) {
      if (this.#counts.dropped++ === 0) {
        this.warn('event dropped: the queue is full or closed; counters() tells of the others')
      }
      return null
    }
    try {
      // An id and a time before the first try make a second one harmless.
      const event = { ...fields }
      event.eventId ||= randomUUID()
      if (!event.timestamp && !event.timestampMs) event.timestampMs = Date.now()
      if (properties) event.propertiesJson = Buffer.from(JSON.stringify(properties, exact))
      const item = { [kind]: event }
      // What cannot be encoded must not come into a batch.
      const bytes = this.serialize({ items: [item] }).length
      if (bytes > EVENT_BYTES_MAX) throw new RangeError(`got ${bytes} bytes, want at most ${EVENT_BYTES_MAX}`)
      this.#queue.push({ item, bytes })
      this.#counts.queued++
      this.#schedule()
      return event.eventId
    } catch (error) {
      this.#counts.dropped++
      this.warn('event dropped: it cannot be encoded', error)
      return null
    }
  }

  #schedule () {
    if (this.#sending) return
    if (this.#queue.length >= this.batchNow) this.#send()
    else this.#timer ??= setTimeout(() => this.#send(), this.flushIntervalMs)
  }

  // One batch at a time: whoever asks meanwhile waits for the one under way.
  #send () {
    clearTimeout(this.#timer)
    this.#timer = null
    this.#sending ??= this.#sendBatch().finally(() => {
      this.#sending = null
      if (this.#queue.length > 0) this.#schedule()
    })
    return this.#sending
  }

  async #sendBatch () {
    if (Date.now() >= this.#closesAt) {
      this.#counts.abandoned += this.#queue.length
      this.warn(`closed before the relay had taken ${this.#queue.length} events: they are lost`)
      this.#queue = []
      return
    }
    const entries = this.#nextBatch()
    let delayMs
    try {
      const response = await this.#request({ items: entries.map(({ item }) => item) })
      this.#failures = 0
      this.batchNow = this.batchMax
      delayMs = this.#settle(entries, response)
    } catch (error) {
      delayMs = this.#failed(entries, error)
    }
    if (delayMs > 0) {
      this.#counts.retries++
      await new Promise((resolve) => {
        this.#wake = resolve // a flush asks for an attempt at once
        setTimeout(resolve, Math.min(delayMs, Math.max(0, this.#closesAt - Date.now())))
      })
    }
  }

  // The items stay in the queue until they are answered.
  #nextBatch () {
    let total = 0
    const most = this.#queue.slice(0, this.batchNow)
    const end = most.findIndex(({ bytes }) => (total += bytes) > BATCH_BYTES_MAX)
    return end < 0 ? most : most.slice(0, Math.max(end, 1))
  }

  #request (request) {
    const deadline = Math.min(Date.now() + this.callTimeoutMs, this.#closesAt)
    return new Promise((resolve, reject) => {
      this.#call = this.client.trackBatch(request, { deadline }, (error, response) => {
        this.#call = null
        error ? reject(error) : resolve(response)
      })
    })
  }

  // Takes out what was answered for good; returns the delay for the rest.
  #settle (entries, { answers, retryDelayMs }) {
    if (answers.length !== entries.length) {
      this.warn(`${answers.length} answers to ${entries.length} events, sending again`)
      return this.retryDelayMaxMs
    }
    const deferred = entries.filter((_, index) => answers[index].answer === 'deferred')
    for (const { answer, refused } of answers) {
      if (answer === 'accepted') this.#counts.accepted++
      if (answer !== 'refused') continue
      this.#counts.refused++
      for (const { reason, field, description } of refused.violations) {
        this.warn(`event refused: ${field}: ${description} (${reason})`)
      }
    }
    this.#queue.splice(0, entries.length, ...deferred)
    return deferred.length > 0 ? Math.max(retryDelayMs, 1) : 0
  }

  #failed (entries, error) {
    this.#failures++
    if (TOO_LARGE.has(error.code)) {
      if (entries.length > 1) {
        this.batchNow = Math.ceil(entries.length / 2)
        return 1
      }
      this.#queue.shift()
      this.#counts.refused++
      this.warn('event refused:', error.details)
      return 0
    }
    if (this.#failures === 1) this.warn('the relay does not take events, they wait:', error.message)
    const limit = Math.min(RETRY_DELAY_FIRST_MS * 2 ** Math.min(this.#failures, 16), this.retryDelayMaxMs)
    return limit * (0.5 + Math.random() / 2)
  }
}

// A BigInt travels as a text: JSON has no other form for it here.
const exact = (_, value) => typeof value === 'bigint' ? value.toString() : value

module.exports = { Analytics }
