// What the client says: one line of a kind in a while, the rest counted.
'use strict'

class Warnings {
  written = 0
  unwritten = 0
  #kinds = new Map()

  constructor (logger, intervalMs) {
    this.logger = logger
    this.intervalMs = intervalMs
  }

  // `kind` comes from the client's own short list, so the map stays small.
  say (kind, message) {
    const now = performance.now()
    const last = this.#kinds.get(kind) ?? { at: -Infinity, unwritten: 0 }
    this.#kinds.set(kind, last)
    if (now - last.at < this.intervalMs) {
      this.unwritten++
      last.unwritten++
      return
    }
    this.#write(message + (last.unwritten > 0 ? ` (and ${last.unwritten} more of this kind before it)` : ''))
    last.at = now
    last.unwritten = 0
  }

  // What is said once, or at the end, is always written.
  sayAtEnd (message) {
    this.#write(message)
    const unsaid = [...this.#kinds].filter(([, { unwritten }]) => unwritten > 0)
    this.#kinds.clear()
    if (unsaid.length === 0) return
    this.#write('analytics: warnings that were only counted: ' +
      unsaid.map(([kind, { unwritten }]) => `${kind} ${unwritten}`).join(', '))
  }

  // The caller's logger must not fail the caller's request.
  #write (message) {
    this.written++
    try {
      this.logger.warn(message)
    } catch {}
  }
}

module.exports = { Warnings }
