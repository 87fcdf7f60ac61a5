// The package for CommonJS; index.mjs hands out the same two to ES modules.
'use strict'
const { credentials } = require('@grpc/grpc-js')
const { Analytics } = require('./lib/analytics.js')

module.exports = { Analytics, credentials }
