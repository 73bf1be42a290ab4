/**
 * Random sequences of {touch, discard, kill a guest, kill the daemon, kill Node, upgrade, slow source, failing source, hold,
 * resume}, against a model that knows what each page must read (`property/model.ts`). A longer run of the same: `npm run soak`.
 */

import test from 'ava';

import { canRun } from './helpers/serving.js';
import { play } from './property/sequences.js';

const SEQUENCES = 200;

test('random sequences of deaths, holds and broken sources leave every page as the model says', async t => {
  if (!canRun(t)) return;
  t.timeout(300_000);
  // What went wrong once is played again with the seed that is told.
  const seed = Number(process.env['UFFD_SEED'] ?? Date.now() % 2 ** 31);
  const { sequences, daemons, milliseconds, done } = await play(SEQUENCES, seed, () => {}, false);
  const often = Object.entries(done).map(([what, times]) => `${times} ${what}`);
  t.log(`seed ${seed}: ${sequences} sequences, ${daemons} holders, ${(milliseconds / 1000).toFixed(1)} s`);
  t.log(often.join(', '));
  t.is(sequences, SEQUENCES);
});
