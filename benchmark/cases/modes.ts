import { KiB, MiB } from 'userfaultfd';

import type { Case } from '../harness/case.js';
import { inC, ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';

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

/** Faults other than of missing pages. */
export const modes: Case = {
  name: 'modes',
  about:
    'faults of shared pages that are brought through the memfd (64 KiB a fault), and of writes to protected pages',
  contenders: {
    'ours, minor': serving(ours({ window: 64 * KiB, modes: ['missing', 'minor'] }), minor),
    'C CONTINUE': serving(inC('continue', 16), minor),
    'ours, writes': serving(ours({ modes: ['missing', 'write-protect'], populate: 'before' }), written),
    'C unprotecting': serving(inC('protect'), written),
  },
  rows: (['one CPU', 'two CPUs'] as const).flatMap(placement => {
    const common = { placement, figure: 'rate', ratio: 'share', goal: { atLeast: 0.9 } } as const;
    const where = placement.toLowerCase().replace(' ', '-');
    return [
      { ...common, name: `minor-${where}`, unit: 'pages/s', ours: 'ours, minor', floor: 'C CONTINUE' },
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
