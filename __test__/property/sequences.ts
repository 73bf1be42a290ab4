/** Plays random sequences; throws with the shortest one that it can find that goes wrong. */

import * as fc from 'fast-check';

import { commands, kind } from './commands.js';
import { Model } from './model.js';
import { Rig } from './rig.js';

export interface Played {
  sequences: number;
  daemons: number;
  milliseconds: number;
  /** How often each thing happened. */
  done: Record<string, number>;
}

/** After so many, and at the end, what is open is counted. */
const COUNTED = 500;

/**
 * Plays so many.
 *
 * @param told Hears how many it were.
 * @param shrink Whether a sequence that goes wrong is made shorter: that takes seconds for each step in which somebody waits.
 * @throws what fast-check reports: the seed, and the sequence
 */
export async function play(
  runs: number,
  seed: number,
  told: (played: number) => void,
  shrink: boolean,
): Promise<Played> {
  const start = performance.now();
  let rig: Rig | undefined;
  let sequences = 0;
  let daemons = 0;
  const done: Record<string, number> = {};
  const property = fc.asyncProperty(
    fc.array(kind, { minLength: 1, maxLength: 3 }),
    fc.commands(commands, { maxCommands: 24, size: 'max' }),
    async (kinds, sequence) => {
      rig ??= await Rig.start();
      const model = new Model();
      try {
        await rig.begin(model, kinds);
        await fc.asyncModelRun(async () => ({ model, real: rig as Rig }), sequence);
        await rig.finish(model);
        if (rig.played % COUNTED === 0) await rig.compareOpen();
        sequences += 1;
        told(sequences);
        for (const what of model.done) done[what] = (done[what] ?? 0) + 1;
      } catch (error) {
        const broken = rig;
        rig = undefined;
        daemons += broken.daemons;
        await broken.close();
        throw error;
      }
    },
  );
  try {
    await fc.assert(property, {
      numRuns: runs,
      seed,
      plugins: [fc.unbiased()],
      endOnFailure: !shrink,
      includeErrorInReport: true,
    });
    await rig?.compareOpen();
  } finally {
    daemons += rig?.daemons ?? 0;
    await rig?.close();
  }
  return { sequences, daemons, milliseconds: performance.now() - start, done };
}
