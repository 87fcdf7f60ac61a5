// The end of a process, a worker thread or a cluster's worker. Clients that were
// not closed send what waits, for a bounded time, and say what they lost.
'use strict'

const open = new Set()

// A program that has nothing else to do: here a flush may still hold it up.
function beforeExit () {
  for (const client of open) client.beforeExit()
}

// process.exit(), or the time was over: nothing can be sent any more.
function exit () {
  for (const client of open) client.exit()
}

// One pair of listeners for all clients.
function add (client) {
  if (open.size === 0) process.on('beforeExit', beforeExit).on('exit', exit)
  open.add(client)
}

function remove (client) {
  open.delete(client)
  if (open.size === 0) process.off('beforeExit', beforeExit).off('exit', exit)
}

module.exports = { add, remove }
