import { execFileSync } from 'node:child_process';

import { KiB, MiB } from 'userfaultfd';

import type { Case, Contender } from '../harness/case.js';
import { ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';

/** A tenth of the pages, at random. */
function tenth(run: Run): Work {
  const image = run.image((run.quick ? 64 : 128) * MiB);
  return { image, touch: `order=random seed=7 limit=${image.size / (4 * KiB) / 10}`, hash: false };
}

/** With nothing of the image in the page cache. */
const cold =
  (contender: Contender): Contender =>
  async run => {
    const { path } = tenth(run).image;
    // What is not on the disk yet cannot be dropped. `nocache` of a whole file: posix_fadvise(POSIX_FADV_DONTNEED).
    execFileSync('sync', [path]);
    execFileSync('dd', [`if=${path}`, 'iflag=nocache', 'count=0', 'status=none']);
    return contender(run);
  };

/** How much a disk costs where a source has to wait for it. */
export const coldCache: Case = {
  name: 'cold',
  about: 'a tenth of the pages at random, nothing of the image in the page cache, time until the last',
  rounds: [3, 1],
  contenders: {
    ours: cold(serving(ours(), tenth)),
    'the same, cached': serving(ours(), tenth),
    '64 KiB windows': cold(serving(ours({ window: 64 * KiB }), tenth)),
    '4 KiB windows': cold(serving(ours({ window: 4 * KiB }), tenth)),
  },
  rows: [
    {
      name: 'cold-working-set-two-cpus',
      placement: 'two CPUs',
      figure: 'total',
      unit: 'ms',
      ours: 'ours',
      floor: '4 KiB windows',
      rivals: ['the same, cached', '64 KiB windows'],
      ratio: 'times',
    },
  ],
};
