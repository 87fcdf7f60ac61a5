// Runs the tests: `npm test`; takes options of Node's runner. Exit code 77 says that they could not be run.
'use strict'
const { spawnSync } = require('node:child_process')
const { readdirSync } = require('node:fs')
const path = require('node:path')

for (const name of ['@grpc/grpc-js', '@grpc/proto-loader']) {
  try {
    require.resolve(name)
  } catch {
    console.log(`not run: ${name} is missing (npm ci in examples/node)`)
    process.exit(77)
  }
}
const files = readdirSync(__dirname).filter((name) => name.endsWith('.test.js')).map((name) => path.join(__dirname, name))
const { status } = spawnSync(process.execPath, ['--test', ...process.argv.slice(2), ...files], { stdio: 'inherit' })
process.exit(status ?? 1)
