// One class for both kinds of modules: a program that mixes them has one.
import client from './index.js'

export const { Analytics, credentials } = client
