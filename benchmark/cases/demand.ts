import { MiB } from 'userfaultfd';

import type { Case } from '../harness/case.js';
import { ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';

const sizeOf = (run: Run): number => (run.quick ? 128 : 512) * MiB;
/** Three quarters are brought in the background; faults are taken in the last, as many as fit into that time. */
const work = (run: Run): Work => ({
  image: run.image(sizeOf(run)),
  touch: `order=random seed=5 offset=${(sizeOf(run) / 4) * 3} limit=${run.quick ? 300 : 1500}`,
  compare: false,
});
const populating =
  (share: number): ReturnType<typeof serving> =>
  async run =>
    serving(ours({ populateFirst: sizeOf(run) * share }), work)(run);

/** Demand comes first. */
export const demand: Case = {
  name: 'demand',
  about: 'faults at random while the rest of the memory is brought in the background, against the same alone',
  contenders: { 'while populating': populating(0.75), alone: serving(ours(), work) },
  rows: (['p99', 'median'] as const).map(figure => ({
    name: `demand-${figure}-two-cpus`,
    placement: 'two CPUs' as const,
    figure,
    unit: 'us',
    ours: 'while populating',
    floor: 'alone',
    ratio: 'share' as const,
    ...(figure === 'p99' ? { goal: { atMost: 1.2 } } : {}),
  })),
};
