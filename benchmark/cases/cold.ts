import { execFileSync } from 'node:child_process';

import { KiB, MiB } from 'userfaultfd';

import type { Case, Contender, Row } from '../harness/case.js';
import { Child } from '../harness/child.js';
import { ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';
import { rival } from '../harness/tools.js';

const pagesOf = (size: number): number => Math.floor(size / (4 * KiB) / 10);

/** A tenth of the pages, at random. */
function tenth(run: Run): Work {
  const image = run.image((run.quick ? 64 : 128) * MiB);
  return { image, touch: `order=random seed=7 limit=${pagesOf(image.size)}`, compare: false };
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

/** As many pages of the file itself, mapped privately: what Firecracker's `File` backend does. */
const mapped: Contender = async run => {
  const { path, size } = tenth(run).image;
  const child = new Child(run.cpus.faulter, [
    rival('local-file'),
    path,
    'mmap',
    'random',
    `${pagesOf(size)}`,
  ]);
  try {
    const { total_ns: ns } = await child.says<{ total_ns: number }>();
    return { figures: { total: ns / 1e6 } };
  } finally {
    await child.end();
  }
};

const SHARED = { placement: 'two CPUs', figure: 'total', unit: 'ms' } as const satisfies Partial<Row>;

/** How much a disk costs where a source has to wait for it. */
export const coldCache: Case = {
  name: 'cold',
  about:
    'a tenth of the pages at random, with nothing of the image in the page cache and with all of it, time until the last',
  rounds: [3, 1],
  contenders: {
    ours: cold(serving(ours(), tenth)),
    'the same, cached': serving(ours(), tenth),
    '64 KiB windows': cold(serving(ours({ window: 64 * KiB }), tenth)),
    '4 KiB windows': cold(serving(ours({ window: 4 * KiB }), tenth)),
    mmap: cold(mapped),
    'mmap, cached': mapped,
  },
  rows: [
    {
      ...SHARED,
      name: 'cold-working-set-two-cpus',
      ours: 'ours',
      floor: '4 KiB windows',
      rivals: ['the same, cached', '64 KiB windows'],
      ratio: 'times',
    },
    { ...SHARED, name: 'ready-cold-two-cpus', ours: 'ours', floor: 'mmap', ratio: 'share' },
    {
      ...SHARED,
      name: 'ready-warm-two-cpus',
      ours: 'the same, cached',
      floor: 'mmap, cached',
      ratio: 'share',
    },
  ],
};
