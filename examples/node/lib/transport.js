// One connection to the relay, made anew when it is not trusted any more, and
// what the end of a call means.
'use strict'
const { AsyncLocalStorage } = require('node:async_hooks')
const { subscribe } = require('node:diagnostics_channel')
const path = require('node:path')
const grpc = require('@grpc/grpc-js')
const protoLoader = require('@grpc/proto-loader')

const PROTO_DIR = path.join(__dirname, '..', 'proto')
const DEFAULT_PORT = 50054
const CHANNEL = {
  // A relay that vanished without a word is noticed, also between calls.
  'grpc.keepalive_time_ms': 20_000,
  'grpc.keepalive_timeout_ms': 5_000,
  'grpc.keepalive_permit_without_calls': 1,
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 10_000,
  // Or a new channel would get the old one's dead connection.
  'grpc.use_local_subchannel_pool': 1
}
const TOO_LARGE_WORDS = /larger than|too large|message size|max(imum)?[ _]size|\b413\b/i

// A socket that is still connecting keeps a program alive until TCP gives up,
// minutes later, and gRPC does not end it with its channel. So we know ours:
// those made while one of our calls runs.
const connections = new AsyncLocalStorage()
subscribe('net.client.socket', ({ socket }) => connections.getStore()?.add(socket))

let method = null

class Transport {
  #channel = null
  #sockets = new Set()
  #call = null

  // Throws a TypeError for a target or credentials that gRPC does not know.
  constructor (target, credentials) {
    const { address, secure } = parseTarget(target)
    this.address = address
    this.credentials = credentials ?? (secure ? grpc.credentials.createSsl() : grpc.credentials.createInsecure())
    method ??= loadMethod()
    this.#client() // so that bad credentials fail here
  }

  // An item as it stands in a request; requests of one item each, one behind
  // another, are the request of all of them.
  encode (item) {
    return method.requestSerialize({ items: [item] })
  }

  trackBatch (requests, timeoutMs) {
    const message = Buffer.concat(requests)
    return new Promise((resolve, reject) => {
      connections.run(this.#sockets, () => {
        this.#call = this.#client().makeUnaryRequest(method.path, (bytes) => bytes, method.responseDeserialize, message,
          { deadline: Date.now() + timeoutMs }, (error, response) => {
            this.#call = null
            error ? reject(error) : resolve(response)
          })
      })
    })
  }

  cancel () {
    this.#call?.cancel()
  }

  // The next call connects anew: a dead path is not waited for, the name is
  // looked up again, and the only backoff is the caller's.
  disconnect () {
    this.#channel?.close()
    this.#channel = null
    for (const socket of this.#sockets) socket.destroy()
    this.#sockets = new Set()
  }

  #client () {
    for (const socket of this.#sockets) if (socket.destroyed) this.#sockets.delete(socket)
    this.#channel ??= new grpc.Client(this.address, this.credentials, CHANNEL)
    return this.#channel
  }
}

// The package carries its own copy of the proto file.
function loadMethod () {
  const definition = protoLoader.loadSync('analytics/v1/analytics.proto', {
    includeDirs: [PROTO_DIR], longs: Number, enums: String, oneofs: true
  })
  return definition['analytics.v1.AnalyticsService'].TrackBatch
}

// What gRPC would take for a scheme of its own, and never connect to.
function parseTarget (target) {
  const want = 'want host:port, http://host:port, https://host:port or a target of gRPC'
  if (typeof target !== 'string' || target.trim() === '') throw new TypeError(`target: got ${typeof target}, ${want}`)
  const text = target.trim()
  const url = /^(https?):\/\/([^/?#@]+)\/?$/i.exec(text)
  if (!url && /^\w+:\/\//.test(text) && !/^(dns|unix|ipv4|ipv6|xds):/i.test(text)) {
    throw new TypeError(`target: got ${JSON.stringify(text)}, ${want}`)
  }
  const secure = url?.[1].toLowerCase() === 'https'
  const host = url ? url[2] : text
  const bare = /^([\w.-]+|\[[0-9a-f:.]+\])$/i.test(host)
  return { address: bare ? `${host}:${secure ? 443 : DEFAULT_PORT}` : host, secure }
}

// The batch as a whole breaks a limit of the relay's, or of something on the way:
// fewer at a time, and a lone event is to blame.
function tooLarge ({ code, details, metadata }) {
  if (code === grpc.status.OUT_OF_RANGE || code === grpc.status.INVALID_ARGUMENT) return true
  const relaysOwn = metadata?.get('grpc-status-details-bin').length > 0 // it says when to try again
  return !relaysOwn && TOO_LARGE_WORDS.test(details ?? '')
}

// No room without a word on size: it may be a limit on bytes, or on calls. Fewer
// at a time, later; no event is to blame.
function fewer ({ code }) {
  return code === grpc.status.RESOURCE_EXHAUSTED
}

module.exports = { Transport, fewer, tooLarge }
