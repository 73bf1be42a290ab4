import { MiB } from 'userfaultfd';

import type { Case } from '../harness/case.js';
import { inC, inRust, ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';

const size = (run: Run): number => (run.quick ? 16 : 64) * MiB;
const onePage = ours({ window: 4096, buffered: true });
const work =
  (threads: number) =>
  (run: Run): Work => ({ image: run.image(size(run)), touch: `order=sequential threads=${threads}` });

/** Not one page more than was asked for. */
export const faults: Case = {
  name: 'faults',
  about: "another process's faults, each answered with its page and nothing else, from memory",
  contenders: {
    ours: serving(onePage, work(1)),
    'C poll loop': serving(inC('poll'), work(1)),
    'C spinning': serving(inC('spin'), work(1)),
    'userfaultfd crate': serving(inRust('naive-loop'), work(1)),
    'Firecracker example': serving(inRust('firecracker-example', 'on-demand'), work(1)),
    'ours, 8 threads': serving(onePage, work(8)),
    'C batch loop, 8 threads': serving(inC('batch'), work(8)),
    'Firecracker example, 8 threads': serving(inRust('firecracker-example', 'on-demand'), work(8)),
  },
  rows: [
    {
      name: 'one-fault-one-cpu',
      placement: 'one CPU',
      figure: 'rate',
      unit: 'faults/s',
      ours: 'ours',
      floor: 'C poll loop',
      rivals: ['userfaultfd crate', 'Firecracker example'],
      ratio: 'share',
      goal: { atLeast: 0.9 },
    },
    {
      name: 'one-fault-two-cpus',
      placement: 'two CPUs',
      figure: 'median',
      unit: 'us',
      ours: 'ours',
      floor: 'C poll loop',
      rivals: ['C spinning', 'userfaultfd crate', 'Firecracker example'],
      ratio: 'share',
      goal: { atMost: 0.5 },
    },
    {
      name: 'eight-threads-two-cpus',
      placement: 'two CPUs',
      figure: 'rate',
      unit: 'faults/s',
      ours: 'ours, 8 threads',
      floor: 'C batch loop, 8 threads',
      rivals: ['Firecracker example, 8 threads'],
      ratio: 'share',
      goal: { atLeast: 0.95 },
    },
  ],
};
