import { KiB, MiB } from 'userfaultfd';

import type { Case, Contender, Placement, Row } from '../harness/case.js';
import { output } from '../harness/child.js';
import { inC, inRust, ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';
import { rival } from '../harness/tools.js';

const imageOf = (run: Run): Work['image'] => run.image((run.quick ? 64 : 128) * MiB);
const random = (run: Run): Work => ({ image: imageOf(run), touch: 'order=random seed=11' });
const sequential = (run: Run): Work => ({ image: imageOf(run), touch: 'order=sequential' });

/** Without a pager: everything in one program, where the faults would be. */
const local =
  (how: 'mmap' | 'read', order: string): Contender =>
  async run => {
    const image = imageOf(run);
    await run.warm(image.size);
    const text = await output(run.cpus.handler, [rival('local-file'), image.path, how, order]);
    const { total_ns: ns, sha256: result } = JSON.parse(text) as { total_ns: number; sha256: string };
    return { figures: { total: ns / 1e6 }, result };
  };

const randomly = (suffix: string, placement: Placement, bulk: number, naive?: number): Row[] => [
  {
    name: `random-naive-${suffix}`,
    placement,
    figure: 'total',
    unit: 'ms',
    ours: 'ours',
    floor: 'naive C loop',
    rivals: ['userfaultfd crate', 'Firecracker on-demand', 'Firecracker fault-all', '64 KiB windows'],
    ratio: 'times',
    ...(naive === undefined ? {} : { goal: { atLeast: naive } }),
  },
  {
    name: `random-bulk-${suffix}`,
    placement,
    figure: 'total',
    unit: 'ms',
    ours: 'ours',
    floor: 'bulk COPY',
    rivals: ['read it all', 'mmap'],
    ratio: 'share',
    goal: { atMost: bulk },
  },
];

const sequentially = (suffix: string, placement: Placement): Row => ({
  name: `sequential-${suffix}`,
  placement,
  figure: 'total',
  unit: 'ms',
  ours: 'ours, in order',
  floor: 'bulk COPY',
  rivals: ['read it all, in order', 'mmap, in order'],
  ratio: 'share',
  goal: { atMost: 1.25 },
});

/** One word of each page. */
export const wholeImage: Case = {
  name: 'whole-image',
  about: 'one word of each page of an image that is in the page cache, default settings, time until the last',
  rounds: [3, 1],
  contenders: {
    ours: serving(ours(), random),
    '64 KiB windows': serving(ours({ window: 64 * KiB }), random),
    'naive C loop': serving(inC('poll'), random),
    'userfaultfd crate': serving(inRust('naive-loop'), random),
    'Firecracker on-demand': serving(inRust('firecracker-example', 'on-demand'), random),
    'Firecracker fault-all': serving(inRust('firecracker-example', 'fault-all'), random),
    'bulk COPY': serving(inC('bulk'), run => ({ image: imageOf(run) })),
    'read it all': local('read', 'random'),
    mmap: local('mmap', 'random'),
    'ours, in order': serving(ours(), sequential),
    'read it all, in order': local('read', 'sequential'),
    'mmap, in order': local('mmap', 'sequential'),
  },
  rows: [
    ...randomly('two-cpus', 'two CPUs', 2.5, 15),
    sequentially('two-cpus', 'two CPUs'),
    ...randomly('one-cpu', 'one CPU', 1.5),
    sequentially('one-cpu', 'one CPU'),
  ],
};
