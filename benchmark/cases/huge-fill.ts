import { MiB } from 'userfaultfd';

import type { Case } from '../harness/case.js';
import { ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';

/** A word of every page, from the first to the last. */
const scanned = (run: Run): Work => ({
  image: run.image((run.quick ? 64 : 256) * MiB),
  touch: 'order=sequential',
  huge: true,
});

/** Small pages or huge ones. */
export const hugeFill: Case = {
  name: 'huge-fill',
  about: 'a process filled before anything of it runs, and then its first scan of all of it',
  rounds: [3, 1],
  contenders: {
    'huge-fill': serving(ours({ server: { mode: 'huge-fill' } }), scanned),
    fill: serving(ours({ server: { mode: 'fill' } }), scanned),
    'huge-fill, from memory': serving(ours({ buffered: true, server: { mode: 'huge-fill' } }), scanned),
  },
  rows: [
    {
      name: 'huge-fill-and-scan',
      placement: 'two CPUs',
      figure: 'total',
      unit: 'ms',
      ours: 'huge-fill',
      floor: 'fill',
      rivals: ['huge-fill, from memory'],
      ratio: 'share',
      goal: { atMost: 0.6 },
    },
  ],
};
