import { ChannelCredentials, credentials } from '@grpc/grpc-js'

/** An id: a whole number or a BigInt travels as text, an ObjectId as its hex digits. */
export type Id = string | number | bigint | { toHexString (): string }

/**
 * A moment: a Date (or what has `toDate`, `toJSDate` or `epochMilliseconds`), an ISO 8601 text, or Unix time in
 * milliseconds. A number that would lie before 1973 as milliseconds is taken as seconds.
 */
export type Time = Date | string | number | bigint | { toDate (): Date } | { toJSDate (): Date } |
  { readonly epochMilliseconds: number }

export interface Context {
  /** Address of the user's device, without a port. */
  ip?: string | null
  userAgent?: string | null
}

export interface EventOptions {
  anonymousId?: Id | null
  context?: Context | null
  /** When it happened; not given means now, at the call. */
  timestamp?: Time
  /** The same, under the relay's own name. Not both. */
  timestampMs?: Time
  /** Your id of this event; not given means a random UUID. */
  eventId?: Id
  /** How far the event must have come before the relay says OK. */
  durability?: 'QUEUED' | 'WRITTEN' | 'SYNCED'
}

/** One of `userId` and `anonymousId` must be there. */
export interface TrackOptions extends EventOptions {
  userId?: Id | null
  properties?: object | null
}

export interface Stats {
  /** Events that came into the queue: queued = accepted + refused + abandoned + waiting. */
  queued: number
  accepted: number
  /** Never will be accepted: they break a rule of the relay's. */
  refused: number
  /** Given up by `close()`, or at the end of the program: lost, as far as the client knows. */
  abandoned: number
  /** Never came into the queue: no room, closed, or a call of another shape. */
  dropped: number
  /** Values that were left out of events that went on without them. */
  leftOut: number
  retries: number
  waiting: number
  waitingBytes: number
  warnings: number
  /** Warnings that were counted only, because one of their kind was written a moment before. */
  warningsUnwritten: number
}

export interface Options {
  queueMax?: number
  queueBytesMax?: number
  batchMax?: number
  flushIntervalMs?: number
  callTimeoutMs?: number
  retryDelayMaxMs?: number
  /** How long the end of a program that did not call `close()` may be held up. */
  exitTimeoutMs?: number
  /** One warning of a kind in this time; the others are counted. */
  warnIntervalMs?: number
  /** gRPC credentials, such as `credentials.createSsl(ca)`. */
  credentials?: ChannelCredentials
  logger?: { warn (message: string): void }
}

export class Analytics {
  /** `host:port`, `https://host:port` for TLS, or any target that gRPC knows. Throws a TypeError for bad options. */
  constructor (target: string, options?: Options)
  /** Queues an event and returns its id; null if it was dropped. Never waits, never throws. */
  track (name: string, options: TrackOptions): string | null
  /** The same for what is known about a user; a null removes a trait. */
  identify (userId: Id, traits?: object | null, options?: EventOptions): string | null
  /** Sends what waits; resolves when it has been answered, or when the time is over. */
  flush (timeoutMs?: number): Promise<Stats>
  /** Takes nothing more and sends what waits; what is left when the time is over is abandoned. */
  close (timeoutMs?: number): Promise<Stats>
  stats (): Stats
}

export { credentials }
