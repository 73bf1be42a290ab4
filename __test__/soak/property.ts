/**
 * Plays random sequences of what may happen to those who are served, to Node and to the daemon (`property/`); status 1, the
 * shortest sequence and its seed where one goes wrong.
 *
 *     npm run soak -- [sequences, 10000 by default] [seed]
 */

import process from 'node:process';

import { play } from '../property/sequences.js';

const sequences = Number(process.argv[2] ?? 10_000);
const seed = Number(process.argv[3] ?? Date.now() % 2 ** 31);
process.stdout.write(`seed ${seed}\n`);
const told = (played: number): void => {
  if (played % 100 === 0) process.stdout.write(`${played} sequences\n`);
};
try {
  const { daemons, milliseconds, done } = await play(sequences, seed, told, true);
  const seconds = (milliseconds / 1000).toFixed(1);
  process.stdout.write(
    `${sequences} sequences in ${seconds} s, ${daemons} holders, Node ${process.version}\n`,
  );
  process.stdout.write(`${JSON.stringify(done)}\n`);
} catch (error) {
  process.stdout.write(`${(error as Error).message}\n`);
  process.exitCode = 1;
}
