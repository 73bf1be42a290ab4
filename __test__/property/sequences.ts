/** Plays random sequences; throws with the shortest one that it can find that goes wrong. */

import * as fc from 'fast-check';

import { commands, kind } from './commands.js';
import { Model } from './model.js';
import { Rig } from './rig.js';

/** After so many, and at the end, what is open is counted. */
const COUNTED = 500;

/** One daemon after the other, each for as long as all is well. */
export class Player {
  /** Sequences that were played. */
  played = 0;
  /** How often each thing happened. */
  readonly done: Record<string, number> = {};
  #rig: Rig | undefined;
  #holders = 0;
  #stopped = false;

  /** Holders there were. */
  get holders(): number {
    return this.#holders + (this.#rig?.daemons ?? 0);
  }

  /** What its processes have, in words. */
  async footprint(): Promise<string> {
    return (await this.#rig?.footprint()) ?? 'there is no daemon';
  }

  /**
   * Plays so many: the same ones for the same seed.
   *
   * @param shrink Whether a sequence that goes wrong is made shorter: that takes seconds for each step in which somebody waits.
   * @throws what fast-check reports: the seed, and the sequence
   */
  async play(runs: number, seed: number, shrink: boolean): Promise<void> {
    const property = fc.asyncProperty(
      fc.array(kind, { minLength: 1, maxLength: 3 }),
      fc.commands(commands, { maxCommands: 24, size: 'max' }),
      async (kinds, sequence) => {
        if (this.#stopped) return;
        this.#rig ??= await Rig.start();
        const rig = this.#rig;
        const model = new Model();
        try {
          await rig.begin(model, kinds);
          await fc.asyncModelRun(async () => ({ model, real: rig }), sequence);
          await rig.finish(model);
          if (rig.played % COUNTED === 0) await rig.compareOpen();
        } catch (error) {
          this.#rig = undefined;
          this.#holders += rig.daemons;
          await rig.close();
          throw error;
        }
        this.played += 1;
        for (const what of model.done) this.done[what] = (this.done[what] ?? 0) + 1;
      },
    );
    await fc.assert(property, {
      numRuns: runs,
      seed,
      plugins: [fc.unbiased()],
      endOnFailure: !shrink,
      includeErrorInReport: true,
    });
  }

  /** What is being played goes to its end; no other begins. */
  stop(): void {
    this.#stopped = true;
  }

  get stopped(): boolean {
    return this.#stopped;
  }

  /** Throws where something is open that was not at first. */
  async compareOpen(): Promise<void> {
    await this.#rig?.compareOpen();
  }

  /** Ends everything. */
  async close(): Promise<void> {
    const rig = this.#rig;
    this.#rig = undefined;
    this.#holders += rig?.daemons ?? 0;
    await rig?.close();
  }
}
