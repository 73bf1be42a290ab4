/**
 * Creates, registers and closes for a long time and says what was left behind; status 1 if anything was.
 *
 *     node out/__test__/soak/leaks.js [rounds, 100000 by default]
 */

import process from 'node:process';

import { holdings, leaked, manyLives } from '../helpers/rounds.js';

const rounds = Number(process.argv[2] ?? 100_000);

// Until the heap has the size it keeps.
await manyLives(rounds / 10);
const before = holdings();
const start = performance.now();
for (let tenth = 1; tenth <= 10; tenth += 1) {
  await manyLives(rounds / 10);
  process.stdout.write(`${(rounds / 10) * tenth} rounds: ${JSON.stringify(holdings())}\n`);
}
const found = leaked(before, holdings());
process.stdout.write(
  `${rounds} rounds in ${((performance.now() - start) / 1000).toFixed(1)} s, Node ${process.version}: ` +
    `${found.length === 0 ? 'nothing was left behind' : found.join(', ')}\n`,
);
process.exitCode = found.length === 0 ? 0 : 1;
