// Public lists of user agents, for the tests of how they are read: known crawlers, and
// people's browsers. RELAY_AGENT_LISTS names a folder with other versions of them.
const fs = require('node:fs')
const { createRequire } = require('node:module')
const path = require('node:path')

const folder = process.env.RELAY_AGENT_LISTS || __dirname
const required = createRequire(path.join(path.resolve(folder), 'here.cjs'))

const crawlers = required('crawler-user-agents').map(({ pattern, instances, tags }) => ({
  pattern,
  instances,
  tags: tags ?? [],
}))

// The package hands out samples of its list, and not the list.
const samples = path.join(path.dirname(required.resolve('user-agents')), 'user-agents.json')
const people = new Map()
for (const { userAgent, deviceCategory, weight } of JSON.parse(fs.readFileSync(samples, 'utf8'))) {
  const known = people.get(userAgent) ?? { agent: userAgent, device: deviceCategory, weight: 0 }
  known.weight += weight
  people.set(userAgent, known)
}

console.log(JSON.stringify({ crawlers, people: [...people.values()] }))
