import { KiB, MiB } from 'userfaultfd';

import type { Case } from '../harness/case.js';
import { inC, ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';
import type { ServingOptions } from '../harness/serving.js';

const imageOf = (run: Run): Work['image'] => run.image((run.quick ? 16 : 64) * MiB);
const touch = 'order=sequential';

/** In the memfd, or not even there. */
const minor = (run: Run): Work => ({
  image: imageOf(run),
  peer: ['--memfd', '--modes', 'missing,minor', '--fd', 'memfd'],
  touch,
});

/** There, and written to for the first time. */
const written = (run: Run): Work => ({
  image: imageOf(run),
  peer: ['--modes', 'missing,write-protect'],
  touch: `${touch} access=store`,
});

const minorOptions: ServingOptions = { window: 64 * KiB, modes: ['missing', 'minor'] };

/** Faults other than of missing pages. */
export const modes: Case = {
  name: 'modes',
  about:
    'faults of shared pages that are brought through the memfd (64 KiB a fault, from memory), and of writes to protected pages',
  contenders: {
    'ours, minor': serving(ours({ ...minorOptions, buffered: true }), minor),
    'from a file': serving(ours(minorOptions), minor),
    'C CONTINUE': serving(inC('continue', 16), minor),
    'ours, writes': serving(ours({ modes: ['missing', 'write-protect'], populate: 'before' }), written),
    'C unprotecting': serving(inC('protect'), written),
  },
  rows: (['one CPU', 'two CPUs'] as const).flatMap(placement => {
    const common = { placement, figure: 'rate', ratio: 'share', goal: { atLeast: 0.9 } } as const;
    const where = placement.toLowerCase().replace(' ', '-');
    return [
      {
        ...common,
        name: `minor-${where}`,
        unit: 'pages/s',
        ours: 'ours, minor',
        floor: 'C CONTINUE',
        rivals: ['from a file'],
      },
      {
        ...common,
        name: `protect-${where}`,
        unit: 'faults/s',
        ours: 'ours, writes',
        floor: 'C unprotecting',
      },
    ];
  }),
};
