// A batching client of the relay: never waits, never throws, keeps order.
'use strict'
const { Misuse, identifyItem, trackItem } = require('./event.js')
const exits = require('./exits.js')
const { checkNumber, readOptions } = require('./options.js')
const { Transport, fewer, tooLarge } = require('./transport.js')
const { kindOf, wellFormed } = require('./values.js')
const { Warnings } = require('./warnings.js')

const EVENT_BYTES_MAX = 64 * 1024 // more than the relay's limits leave
const BATCH_BYTES_MAX = 512 * 1024 // half of what the relay takes
const RETRY_DELAY_FIRST_MS = 100
const RELAY_DELAY_MAX_MS = 60_000
// Whoever waits with a bound gets an attempt before it is over, but no spinning.
const HURRIED_DELAY_MS = 50
const TIMEOUT_MS = 5_000
const TIMEOUT_MAX_MS = 3_600_000

// Events wait in a bounded queue and are sent a batch at a time, so they keep
// their order. They are encoded when they come: an object that the caller changes
// afterwards, or that cannot be encoded, harms nothing.
class Analytics {
  #queue = [] // { name, id, request }
  #queueBytes = 0
  #counts = { queued: 0, accepted: 0, refused: 0, abandoned: 0, dropped: 0, leftOut: 0, retries: 0 }
  #calling = false
  #timer = null
  #firstAt = 0 // when the oldest unsent event came
  #retryAt = 0
  #failures = 0
  #batchNow
  #waiters = new Set()
  #closing = null // the promise of close()
  #closed = false
  #exitBy = null

  constructor (target, options) {
    this.options = readOptions(options)
    this.warnings = new Warnings(this.options.logger, this.options.warnIntervalMs)
    this.transport = new Transport(target, this.options.credentials)
    this.#batchNow = this.options.batchMax
    exits.add(this)
  }

  // Queues an event and returns its id; null if it was dropped.
  track (name, options) {
    return this.#put('track', name, options, (leftOut) => trackItem(name, options, leftOut))
  }

  // The same for what is known about a user; a null removes a trait.
  identify (userId, traits, options) {
    return this.#put('identify', 'identify', options, (leftOut) => identifyItem(userId, traits, options, leftOut))
  }

  // queued = accepted + refused + abandoned + waiting; `dropped` never was queued.
  stats () {
    const { written, unwritten } = this.warnings
    return {
      ...this.#counts, waiting: this.#queue.length, waitingBytes: this.#queueBytes, warnings: written + unwritten, warningsUnwritten: unwritten
    }
  }

  // Sends what waits; resolves to the stats when it has been answered or the time
  // is over. Meanwhile the process does not end.
  async flush (timeoutMs = TIMEOUT_MS) {
    await this.#answered(checkNumber('timeoutMs', timeoutMs, 0, TIMEOUT_MAX_MS))
    return this.stats()
  }

  // Takes nothing more and sends what waits; what the relay has not accepted when
  // the time is over is abandoned.
  async close (timeoutMs = TIMEOUT_MS) {
    checkNumber('timeoutMs', timeoutMs, 0, TIMEOUT_MAX_MS)
    this.#closing ??= this.#answered(timeoutMs).then(() => this.#end())
    await this.#closing
    return this.stats()
  }

  // Of exits.js only. The time is given once: a program that tracks something
  // each time it is about to end does end.
  beforeExit () {
    const now = performance.now()
    this.#exitBy ??= now + this.options.exitTimeoutMs
    if (this.#queue.length === 0 || now >= this.#exitBy) return
    // A call that is still under way then would hold the process up.
    this.#answered(this.#exitBy - now).then(() => performance.now() >= this.#exitBy && this.transport.cancel())
  }

  exit () {
    this.#end()
  }

  #put (call, name, options, makeItem) {
    try {
      if (this.#closing || this.#closed) return this.#dropped('closed', call, name, options, 'the client is closed')
      const { queueMax, queueBytesMax } = this.options
      if (this.#queue.length >= queueMax) return this.#dropped('queue full', call, name, options, `${queueMax} events wait`)
      const leftOut = []
      const item = makeItem((path, why) => leftOut.push(`${path}: ${why}`))
      const id = item[call].eventId
      const request = this.transport.encode(item)
      if (request.length > EVENT_BYTES_MAX) throw new Misuse(`got ${request.length} bytes, want at most ${EVENT_BYTES_MAX}`)
      if (this.#queueBytes + request.length > queueBytesMax) {
        return this.#dropped('queue full', call, name, options, `${this.#queueBytes} bytes wait`)
      }
      this.#queued({ name: label(call, name), id, request }, leftOut)
      return id
    } catch (error) {
      const why = error instanceof Misuse || error instanceof RangeError ? error.message : `its values' own code threw ${kindOf(error)}`
      return this.#dropped('misuse', call, name, options, why)
    }
  }

  #queued (entry, leftOut) {
    this.#queue.push(entry)
    this.#queueBytes += entry.request.length
    this.#counts.queued++
    if (leftOut.length > 0) {
      this.#counts.leftOut += leftOut.length
      const others = leftOut.length > 1 ? ` (and ${leftOut.length - 1} more in this event)` : ''
      this.warnings.say('left out', `analytics: ${entry.name} ${entry.id}: left out ${leftOut[0]}${others}`)
    }
    if (this.#queue.length === 1) this.#firstAt = performance.now()
    if (!this.#timer || this.#queue.length === this.#batchNow) this.#arm()
  }

  #dropped (kind, call, name, options, why) {
    this.#counts.dropped++
    let id = ''
    try {
      if (typeof options?.eventId === 'string') id = ` ${wellFormed(options.eventId.slice(0, 100))}`
    } catch {} // a getter of the caller's
    this.warnings.say(kind, `analytics: ${label(call, name)}${id} dropped: ${why}`)
    return null
  }

  // Resolves when all that is in the queue now has been answered, or in time.
  #answered (timeoutMs) {
    const target = this.#counts.queued
    if (this.#ended() >= target) return Promise.resolve()
    return new Promise((resolve) => {
      const waiter = { target, until: performance.now() + timeoutMs, resolve }
      waiter.timer = setTimeout(() => this.#waited(waiter), timeoutMs)
      this.#waiters.add(waiter)
      this.#arm()
    })
  }

  #waited (waiter) {
    clearTimeout(waiter.timer)
    this.#waiters.delete(waiter)
    waiter.resolve()
    if (this.#waiters.size === 0) this.#timer?.unref()
  }

  #ended () {
    const { accepted, refused, abandoned } = this.#counts
    return accepted + refused + abandoned
  }

  // Sets the one timer to the moment of the next call. Without anybody who waits
  // it does not keep the process alive: beforeExit() does that, for a while.
  #arm () {
    clearTimeout(this.#timer)
    this.#timer = null
    if (this.#calling || this.#closed || this.#queue.length === 0) return
    const now = performance.now()
    const until = Math.min(...[...this.#waiters].map((waiter) => waiter.until))
    const waited = this.#waiters.size > 0
    const full = this.#queue.length >= this.#batchNow
    let at = Math.max(this.#retryAt, full || waited ? now : this.#firstAt + this.options.flushIntervalMs)
    if (waited) at = Math.min(at, now + Math.max(HURRIED_DELAY_MS, (until - now) / 2))
    this.#timer = setTimeout(() => this.#send(), Math.max(0, at - now))
    if (!waited) this.#timer.unref()
  }

  async #send () {
    this.#timer = null
    this.#calling = true
    const entries = this.#nextBatch()
    let delayMs
    try {
      const response = await this.transport.trackBatch(entries.map(({ request }) => request), this.options.callTimeoutMs)
      if (this.#closed) return
      delayMs = this.#settle(entries, response)
    } catch (error) {
      if (this.#closed) return
      delayMs = this.#failed(entries, error)
    } finally {
      this.#calling = false
    }
    this.#firstAt = performance.now()
    this.#retryAt = this.#firstAt + delayMs
    if (delayMs > 0) this.#counts.retries++
    for (const waiter of this.#waiters) if (this.#ended() >= waiter.target) this.#waited(waiter)
    this.#arm()
  }

  // The events stay in the queue until they are answered.
  #nextBatch () {
    let total = 0
    const most = this.#queue.slice(0, this.#batchNow)
    const end = most.findIndex(({ request }) => (total += request.length) > BATCH_BYTES_MAX)
    return end < 0 ? most : most.slice(0, Math.max(end, 1))
  }

  // Takes out what was answered for good; returns the delay for the rest.
  #settle (entries, { answers, retryDelayMs }) {
    if (answers.length !== entries.length) {
      this.warnings.say('answers', `analytics: ${answers.length} answers to ${entries.length} events, sending again`)
      return this.#backoff()
    }
    // What is no answer that we know is no answer: a newer relay's, or none.
    const rest = entries.filter((_, index) => !['accepted', 'refused'].includes(answers[index].answer))
    const unknown = answers.filter(({ answer }) => !['accepted', 'refused', 'deferred'].includes(answer)).length
    answers.forEach(({ answer, refused }, index) => {
      if (answer === 'accepted') this.#counts.accepted++
      else if (answer === 'refused') this.#refused(entries[index], violationsText(refused.violations))
    })
    this.#takeOut(entries.length, rest)
    this.#batchNow = Math.min(this.#batchNow * 2, this.options.batchMax)
    if (unknown > 0) {
      this.warnings.say('answers', `analytics: ${unknown} events got an answer that this client does not know, sending them again`)
      return Math.max(this.#backoff(), relayDelay(retryDelayMs))
    }
    this.#failures = 0
    return rest.length > 0 ? relayDelay(retryDelayMs) : 0
  }

  #failed (entries, error) {
    const most = Math.ceil(entries.length / 2)
    if (tooLarge(error)) {
      this.#batchNow = most
      if (entries.length > 1) return 1
      this.#refused(entries[0], error.details)
      this.#takeOut(1, [])
      return 0
    }
    if (fewer(error)) this.#batchNow = most
    else this.transport.disconnect()
    this.warnings.say('relay down', `analytics: the relay does not take events, ${this.#queue.length} wait, ` +
      `the first is ${entries[0].name} ${entries[0].id}: ${error.message}`)
    return this.#backoff()
  }

  #backoff () {
    const growing = RETRY_DELAY_FIRST_MS * 2 ** Math.min(this.#failures++, 16)
    return Math.min(growing, this.options.retryDelayMaxMs) * (0.5 + Math.random() / 2)
  }

  #refused ({ name, id }, why) {
    this.#counts.refused++
    this.warnings.say('refused', `analytics: ${name} ${id} refused: ${why}`)
  }

  #takeOut (count, rest) {
    for (const { request } of this.#queue.splice(0, count, ...rest)) this.#queueBytes -= request.length
    for (const { request } of rest) this.#queueBytes += request.length
  }

  // Nothing is sent after this; what still waits is lost, and said.
  #end () {
    if (this.#closed) return
    this.#closed = true
    exits.remove(this)
    clearTimeout(this.#timer)
    const lost = this.#queue.length
    this.#counts.abandoned += lost
    if (lost > 0) {
      const { name, id } = this.#queue[0]
      this.warnings.sayAtEnd(`analytics: ended before the relay had taken ${lost} events, the first is ${name} ${id}: they are lost`)
      this.#takeOut(lost, [])
    } else if (this.warnings.unwritten > 0) {
      this.warnings.sayAtEnd('analytics: closed, nothing is lost')
    }
    this.transport.cancel()
    this.transport.disconnect()
  }
}

function label (call, name) {
  if (call === 'identify') return 'identify'
  return typeof name === 'string' ? JSON.stringify(wellFormed(name.slice(0, 255))) : 'an event'
}

const relayDelay = (ms) => Math.min(Math.max(ms, RETRY_DELAY_FIRST_MS), RELAY_DELAY_MAX_MS)

function violationsText (violations) {
  return violations.map(({ field, description, reason }) => `${field}: ${description} (${reason})`).join('; ')
}

module.exports = { Analytics }
