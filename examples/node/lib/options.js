// The constructor's options: a wrong one is an error where it stands, not an
// event that is missing a month later.
'use strict'

const NUMBERS = {
  // name: [default, least, most]
  queueMax: [10_000, 1, 10_000_000],
  queueBytesMax: [16 * 1024 * 1024, 1024, 4 * 1024 ** 3],
  batchMax: [50, 1, 1000],
  flushIntervalMs: [100, 0, 3_600_000],
  callTimeoutMs: [5_000, 10, 60_000],
  retryDelayMaxMs: [10_000, 10, 600_000],
  exitTimeoutMs: [2_000, 0, 60_000],
  warnIntervalMs: [10_000, 0, 86_400_000]
}
const OTHERS = ['credentials', 'logger']

function readOptions (given = {}) {
  if (given === null || typeof given !== 'object' || Array.isArray(given)) {
    throw new TypeError(`options: got ${given === null ? 'null' : typeof given}, want an object`)
  }
  const known = [...Object.keys(NUMBERS), ...OTHERS]
  const unknown = Object.keys(given).filter((key) => !known.includes(key))
  if (unknown.length > 0) throw new TypeError(`${unknown.join(', ')}: not an option; want some of ${known.join(', ')}`)
  const options = { credentials: given.credentials, logger: given.logger ?? console }
  for (const [name, [otherwise, least, most]] of Object.entries(NUMBERS)) {
    options[name] = checkNumber(name, given[name] ?? otherwise, least, most)
  }
  if (typeof options.logger.warn !== 'function') throw new TypeError('logger: want an object with warn(message)')
  return options
}

function checkNumber (name, value, least, most) {
  if (Number.isInteger(value) && value >= least && value <= most) return value
  const got = typeof value === 'number' ? value : typeof value
  throw new TypeError(`${name}: got ${got}, want a whole number from ${least} to ${most}`)
}

module.exports = { checkNumber, readOptions }
