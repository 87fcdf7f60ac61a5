// The package itself.
'use strict'
const assert = require('node:assert')
const { existsSync, readFileSync } = require('node:fs')
const os = require('node:os')
const path = require('node:path')
const { test } = require('node:test')
const { PACKAGE, run } = require('./support.js')

test('the package\'s proto file is the repository\'s', (t) => {
  const file = 'proto/analytics/v1/analytics.proto'
  const original = path.join(PACKAGE, '../..', file)
  if (!existsSync(original)) return t.skip('not run: the package stands outside of its repository')
  assert.strictEqual(readFileSync(path.join(PACKAGE, file), 'utf8'), readFileSync(original, 'utf8'))
})

test('CommonJS and ES modules get the same class', async () => {
  const { stdout, stderr } = await run('', [
    '--input-type=module', '-e', `
    import { createRequire } from 'node:module'
    import { Analytics, credentials } from 'analytics-relay-client'
    const common = createRequire('${PACKAGE}/x.js')('analytics-relay-client')
    console.log(common.Analytics === Analytics, common.credentials === credentials)`
  ].slice(0), { file: '--no-deprecation' })
  assert.deepStrictEqual([stdout, stderr], ['true true\n', ''])
})

test('it works from any directory', async () => {
  const { code, stderr } = await run(`const { Analytics } = require('${PACKAGE}'); new Analytics('localhost')`, [], { cwd: os.tmpdir() })
  assert.deepStrictEqual([code, stderr], [0, ''])
})

test('the lock file names no host, and the types name every option', () => {
  const lock = JSON.parse(readFileSync(path.join(PACKAGE, 'package-lock.json')))
  for (const entry of Object.values(lock.packages)) assert.strictEqual(entry.resolved, undefined)
  const types = readFileSync(path.join(PACKAGE, 'index.d.ts'), 'utf8')
  const options = readFileSync(path.join(PACKAGE, 'lib/options.js'), 'utf8')
  for (const [, name] of options.matchAll(/^ {2}(\w+): \[/gm)) assert.match(types, new RegExp(`\\b${name}\\?: number`))
})
