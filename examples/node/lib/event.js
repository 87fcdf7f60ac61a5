// A call of track() or identify() as an item of the relay's. What is wrong with
// the call is a Misuse that names the field, what came and what is wanted.
'use strict'
const { randomUUID } = require('node:crypto')
const { types: is } = require('node:util')
const { jsonOf, kindOf, wellFormed } = require('./values.js')

const OPTIONS = {
  track: ['userId', 'anonymousId', 'properties', 'timestamp', 'timestampMs', 'eventId', 'context', 'durability'],
  identify: ['anonymousId', 'timestamp', 'timestampMs', 'eventId', 'context', 'durability']
}
const CONTEXT = ['ip', 'userAgent']
const DURABILITY = ['QUEUED', 'WRITTEN', 'SYNCED']
// What people write who come from another client.
const MEANT = {
  userid: 'userId', anonymousid: 'anonymousId', eventid: 'eventId', messageid: 'eventId', insertid: 'eventId', time: 'timestamp',
  date: 'timestamp', timestampms: 'timestampMs', props: 'properties', traits: 'properties', useragent: 'userAgent',
  ipaddress: 'ip', distinctid: 'userId', id: 'userId'
}
// As milliseconds these lie before the first time that the relay takes, so they
// are seconds: from 2000 on.
const SECONDS_MIN = 946_684_800
const SECONDS_MAX = 100_000_000_000
const ISO = /^[+-]?\d{4,6}-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?\s*(Z|[+-]\d\d(:?\d\d)?)?)?)?$/i

class Misuse extends Error {}

const misuse = (field, got, want) => new Misuse(`${field}: got ${kindOf(got)}, want ${want}`)

function trackItem (name, options, leftOut) {
  if (typeof name !== 'string') throw misuse('name', name, 'a text, as in track(name, { userId, properties })')
  checkOptions('track', options, '{ userId, properties }')
  const event = { eventName: wellFormed(name), ...common(options, leftOut) }
  event.userId = id('userId', options.userId)
  if (!event.userId && !event.anonymousId) throw misuse('userId', options.userId, 'an id, here or in anonymousId')
  return { track: withProperties(event, 'properties', options.properties, leftOut) }
}

function identifyItem (userId, traits, options, leftOut) {
  checkOptions('identify', options ?? {}, '{ anonymousId }')
  const event = { ...common(options ?? {}, leftOut), userId: id('userId', userId) }
  if (!event.userId) throw misuse('userId', userId, 'an id, as in identify(userId, traits)')
  return { identify: withProperties(event, 'traits', traits, leftOut) }
}

function checkOptions (call, options, want) {
  if (!isRecord(options)) throw misuse('options', options, `an object such as ${want}`)
  for (const key of Object.keys(options)) unknown(OPTIONS[call], key, '')
}

function unknown (known, key, where) {
  if (known.includes(key)) return
  const meant = MEANT[key.toLowerCase().replace(/[^a-z]/g, '')]
  const hint = known.includes(meant) ? `${meant} is meant?` : `want one of ${known.join(', ')}`
  throw new Misuse(`${where}${wellFormed(key.slice(0, 100))}: not an option; ${hint}`)
}

// An id and a time before the first try make a second one harmless.
function common (options, leftOut) {
  if (options.timestamp !== undefined && options.timestampMs !== undefined) {
    throw new Misuse('timestamp, timestampMs: got both, want one of them')
  }
  const field = options.timestamp !== undefined ? 'timestamp' : 'timestampMs'
  const time = options[field]
  const event = {
    anonymousId: id('anonymousId', options.anonymousId),
    eventId: id('eventId', options.eventId) || randomUUID(),
    timestampMs: time === undefined ? Date.now() : millis(field, time)
  }
  if (options.context != null) event.context = context(options.context, leftOut)
  if (options.durability != null) event.durability = durability(options.durability)
  return event
}

function withProperties (event, field, properties, leftOut) {
  if (properties == null) return event
  if (!isRecord(properties) && !is.isMap(properties)) throw misuse(field, properties, 'an object')
  const json = jsonOf(properties, leftOut)
  if (typeof json !== 'string' || json[0] !== '{') throw misuse(field, properties, 'an object')
  event.propertiesJson = Buffer.from(json)
  return event
}

// An object with fields: not a list, not a date, not bytes.
function isRecord (value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && !is.isDate(value) &&
    !is.isBoxedPrimitive(value) && !ArrayBuffer.isView(value) && !is.isAnyArrayBuffer(value) &&
    !is.isMap(value) && !is.isSet(value) && !is.isPromise(value) && !is.isRegExp(value)
}

function id (field, value) {
  if (value == null) return ''
  if (typeof value === 'string') return wellFormed(value)
  if (typeof value === 'bigint' || Number.isSafeInteger(value)) return String(value)
  if (is.isStringObject(value)) return wellFormed(String(value))
  if (typeof value.toHexString === 'function') return wellFormed(String(value.toHexString()))
  throw misuse(field, value, 'a text or a whole number')
}

// Never silently "now": what is no time is said.
function millis (field, value) {
  const want = 'a Date, an ISO 8601 text or milliseconds'
  let ms = NaN
  if (typeof value === 'number' || typeof value === 'bigint') ms = fromNumber(Number(value))
  else if (typeof value === 'string') ms = ISO.test(value.trim()) ? Date.parse(value.trim().replace(',', '.')) : NaN
  else if (is.isDate(value)) ms = value.getTime()
  else if (value !== null && typeof value === 'object') ms = fromObject(value)
  if (typeof ms !== 'number' || Number.isNaN(new Date(ms).getTime())) throw misuse(field, value, want)
  ms = Math.trunc(ms)
  if (ms === 0) throw new Misuse(`${field}: got 0, which is 1970, want ${want}`) // 0 is "now" on the wire
  return ms
}

const fromNumber = (value) => value >= SECONDS_MIN && value < SECONDS_MAX ? Math.round(value * 1000) : value

// Temporal.Instant and ZonedDateTime, Luxon, Moment, Day.js, Firestore.
function fromObject (value) {
  if (typeof value.epochMilliseconds === 'number') return value.epochMilliseconds
  const date = typeof value.toJSDate === 'function' ? value.toJSDate() : value.toDate?.()
  return is.isDate(date) ? date.getTime() : NaN
}

// Context never costs the event.
function context (value, leftOut) {
  const known = {}
  if (!isRecord(value)) {
    leftOut('context', `got ${kindOf(value)}, want an object`)
    return known
  }
  for (const [key, field] of Object.entries(value)) {
    if (field == null) continue
    if (!CONTEXT.includes(key)) leftOut(`context.${key.slice(0, 100)}`, `not a field; want one of ${CONTEXT.join(', ')}`)
    else if (typeof field !== 'string') leftOut(`context.${key}`, `got ${kindOf(field)}, want a text`)
    else known[key] = wellFormed(field)
  }
  return known
}

function durability (value) {
  const name = String(value).replace(/^DURABILITY_/, '')
  if (!DURABILITY.includes(name)) throw misuse('durability', value, `one of ${DURABILITY.join(', ')}`)
  return `DURABILITY_${name}`
}

module.exports = { Misuse, identifyItem, trackItem }
