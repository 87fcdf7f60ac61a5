// What JavaScript holds as what JSON can say. A value that JSON has no form for
// is left out and named: never a null, because a null removes a trait.
'use strict'
const { types: is } = require('node:util')

// More than the relay takes (16 levels, 256 names): it says so better than we
// do, and these only keep the walk short.
const DEPTH_MAX = 64
const VALUES_MAX = 10_000
const TEXT_MAX = 64 * 1024
// A lone half of a surrogate pair, as a cut through an emoji leaves it, is no UTF-8.
const LONE_SURROGATES = /\p{Surrogate}/gu
const LEFT_OUT = Symbol('left out')

const wellFormed = (text) => text.replace(LONE_SURROGATES, '\ufffd')

// Says what came without showing it: values may be private.
function kindOf (value) {
  if (value === null) return 'null'
  if (typeof value === 'number' && !Number.isFinite(value)) return String(value)
  if (typeof value === 'string' && value === '') return 'an empty text'
  if (typeof value !== 'object') return { undefined: 'undefined', string: 'a text' }[typeof value] ?? `a ${typeof value}`
  if (Array.isArray(value)) return 'a list'
  if (is.isDate(value)) return Number.isNaN(value.getTime()) ? 'an invalid Date' : 'a Date'
  try {
    const { name } = value.constructor
    if (typeof name === 'string' && name !== 'Object') return `an object (${name.slice(0, 50)})`
  } catch {}
  return 'an object'
}

// The JSON text of an object. `leftOut(path, why)` hears of what is not in it.
function jsonOf (properties, leftOut) {
  const walk = { values: 0, above: new Set(), leftOut }
  return JSON.stringify(plain(properties, 'properties', walk))
}

function plain (value, path, walk) {
  if (++walk.values > VALUES_MAX) throw new RangeError(`properties: got over ${VALUES_MAX} values, want at most 256 names`)
  const out = (why) => {
    walk.leftOut(path, why)
    return LEFT_OUT
  }
  switch (typeof value) {
    case 'string': return text(value)
    case 'boolean': return value
    case 'number': return Number.isFinite(value) ? value : out(`got ${value}`)
    case 'bigint': return text(value.toString()) // JSON's readers would round it
    case 'object': break
    default: return out(`got ${kindOf(value)}`)
  }
  if (value === null) return null
  if (walk.above.has(value)) return out('got an object that contains itself')
  if (walk.above.size >= DEPTH_MAX) return out(`nested deeper than ${DEPTH_MAX} levels`)
  walk.above.add(value)
  try {
    return objectOf(value, path, walk, out)
  } catch (error) {
    if (error instanceof RangeError && walk.values > VALUES_MAX) throw error
    return out('its own code threw an error') // a getter, a toJSON, a proxy
  } finally {
    walk.above.delete(value)
  }
}

function text (value) {
  return value.length > TEXT_MAX ? value.slice(0, TEXT_MAX + 1) : wellFormed(value) // too large in any case
}

function objectOf (value, path, walk, out) {
  if (is.isDate(value)) return Number.isNaN(value.getTime()) ? out('got an invalid Date') : value.toISOString()
  if (is.isBoxedPrimitive(value)) return plain(value.valueOf(), path, walk)
  if (is.isUint8Array(value) || is.isAnyArrayBuffer(value) || is.isDataView(value)) return bytes(value)
  if (Array.isArray(value) || is.isSet(value) || is.isTypedArray(value)) return list(value, path, walk)
  if (is.isMap(value)) return fields(value, path, walk)
  if (is.isNativeError(value)) return plain(errorFields(value), path, walk)
  if (is.isRegExp(value)) return text(String(value))
  if (is.isPromise(value)) return out('got a Promise, want what it resolves to')
  if (typeof value.toHexString === 'function') return text(String(value.toHexString()))
  if (typeof value.toJSON === 'function') {
    const json = value.toJSON()
    return json === null ? out(`its toJSON() says null (${kindOf(value)})`) : plain(json, path, walk)
  }
  if (value instanceof URLSearchParams) return text(String(value))
  return fields(Object.entries(value), path, walk)
}

// Buffers have a toJSON that makes a list of numbers: four times the size.
function bytes (value) {
  const view = ArrayBuffer.isView(value) ? value : new Uint8Array(value)
  const most = Math.min(view.byteLength, TEXT_MAX) // longer is too large in any case
  return Buffer.from(view.buffer, view.byteOffset, most).toString('base64')
}

function errorFields ({ name, message, code }) {
  return code === undefined ? { name, message } : { name, message, code }
}

function list (values, path, walk) {
  const items = []
  let index = 0
  for (const value of values) {
    const item = plain(value, `${path}[${index++}]`, walk)
    if (item !== LEFT_OUT) items.push(item)
  }
  return items
}

function fields (entries, path, walk) {
  const object = Object.create(null) // a field named __proto__ is one like any other
  for (const [key, value] of entries) {
    if (typeof key === 'object' || typeof key === 'symbol' || typeof key === 'function') {
      walk.leftOut(path, `got ${kindOf(key)} as a name, want a text`)
      continue
    }
    const name = text(String(key))
    const field = plain(value, `${path}.${name.slice(0, 100)}`, walk)
    if (field !== LEFT_OUT) object[name] = field
  }
  return object
}

module.exports = { jsonOf, kindOf, wellFormed }
