import { MiB } from 'userfaultfd';

import type { Case, Contender, Row } from '../harness/case.js';
import { inside, printing } from '../harness/inside.js';
import type { Run } from '../harness/run.js';
import { floor } from '../harness/tools.js';

const rounds = (run: Run): string => (run.quick ? '3' : '9');
const ours = (part: number): Contender =>
  printing(run => inside('scan', `${part}`, rounds(run)), ['ns'], 512 * MiB);
const inC = (part: number): Contender =>
  printing(run => [floor('scan'), `${part}`, rounds(run)], ['ns'], 512 * MiB);
const row = (name: string, part: string): Row => ({
  name,
  placement: 'one CPU',
  figure: 'ns',
  unit: 'ns',
  ours: `tryWrittenPages, ${part}`,
  floor: `C PAGEMAP_SCAN, ${part}`,
  ratio: 'times',
  goal: { atLeast: 0.95 },
});

/** Who was written to. */
export const scan: Case = {
  name: 'scan',
  about:
    'what was written to of 512 MiB since the last time, protected again (PAGEMAP_SCAN), from JavaScript',
  contenders: {
    'tryWrittenPages, all': ours(1),
    'C PAGEMAP_SCAN, all': inC(1),
    'tryWrittenPages, 1 in 64': ours(64),
    'C PAGEMAP_SCAN, 1 in 64': inC(64),
  },
  rows: [row('scan-all-written', 'all'), row('scan-one-in-64', '1 in 64')],
};
