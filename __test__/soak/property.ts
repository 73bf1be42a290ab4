/**
 * Plays random sequences of what may happen to those who are served, to Node and to the daemon (`property/`); status 1, the
 * shortest sequence and its seed where one goes wrong, or where something grows.
 *
 *     npm run soak -- [sequences, 10000 by default; 0: until it is ended] [seed] [sequences of one seed, 200 by default]
 *
 * Tells after each of these what it has, and the seed that plays them again. SIGINT and SIGTERM let the sequence under way go to its end,
 * end everything in order, and give status 128 and the signal's number; SIGKILL leaves a daemon.
 */

import { constants } from 'node:os';
import process from 'node:process';

import { MiB } from 'userfaultfd';

import { type Holdings, holdings, leaked } from '../helpers/rounds.js';
import { Player } from '../property/sequences.js';

/** After so many sequences the heap has the size that it keeps. */
const WARM = 600;

const wanted = Number(process.argv[2] ?? 10_000) || Infinity;
const first = Number(process.argv[3] ?? Date.now() % 2 ** 31);
const each = Number(process.argv[4] ?? 200);
const say = (line: string): void => void process.stdout.write(`${line}\n`);
const start = performance.now();
const player = new Player();
const sequences = (): string =>
  `${player.played} sequences in ${((performance.now() - start) / 1000).toFixed(1)} s`;

let signal: 'SIGINT' | 'SIGTERM' | undefined;
for (const name of ['SIGINT', 'SIGTERM'] as const) {
  // npm passes on what a terminal has sent already.
  process.on(name, () => {
    signal ??= name;
    player.stop();
  });
}

/** Plays all of them, in rounds that each have a seed of their own. */
async function playAll(): Promise<void> {
  let before: Holdings | undefined;
  for (let seed = first; player.played < wanted && !player.stopped; seed += 1) {
    const runs = Math.min(each, wanted - player.played);
    const began = player.played;
    await player.play(runs, seed, true);
    const now = holdings();
    const here = `${now.fds} descriptors and ${(now.bytes / MiB).toFixed(0)} MiB`;
    say(
      `${sequences()}, the last ${player.played - began} of seed ${seed}; this program ${here}, ${await player.footprint()}`,
    );
    if (before) {
      const grown = leaked(before, now);
      if (grown.length > 0) throw new Error(`this program has grown: ${grown.join(', ')}`);
    } else if (player.played >= WARM) before = now;
  }
  if (!player.stopped) await player.compareOpen();
}

try {
  await playAll();
} catch (error) {
  say((error as Error).message);
  process.exitCode = 1;
} finally {
  await player.close();
}
say(`${sequences()} from seed ${first} on, ${player.holders} holders, Node ${process.version}`);
say(JSON.stringify(player.done));
if (signal) {
  say(`ended by ${signal}`);
  process.exitCode ??= 128 + constants.signals[signal];
}
