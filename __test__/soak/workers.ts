/**
 * Starts 20 workers with faults pending and terminates them at random moments, again and again; status 1 if anything was
 * left behind, or an error where one hung.
 *
 *     node out/__test__/soak/workers.js [rounds, 50 by default] [seed]
 */

import process from 'node:process';

import { holdings, leaked, random, terminateWorkers } from '../helpers/rounds.js';

const rounds = Number(process.argv[2] ?? 50);
const seed = Number(process.argv[3] ?? Date.now() % 2 ** 32);
const next = random(seed);
process.stdout.write(`seed ${seed}\n`);
await terminateWorkers(20, next);
const before = holdings();
const start = performance.now();
for (let round = 1; round <= rounds; round += 1) {
  await terminateWorkers(20, next);
  if (round % Math.ceil(rounds / 10) === 0) {
    process.stdout.write(`${round} rounds: ${JSON.stringify(holdings())}\n`);
  }
}
const found = leaked(before, holdings());
process.stdout.write(
  `${rounds} rounds of 20 workers in ${((performance.now() - start) / 1000).toFixed(1)} s, Node ${process.version}: ` +
    `${found.length === 0 ? 'nothing was left behind' : found.join(', ')}\n`,
);
process.exitCode = found.length === 0 ? 0 : 1;
