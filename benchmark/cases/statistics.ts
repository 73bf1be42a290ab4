import { MiB } from 'userfaultfd';

import type { Case, Contender, Row } from '../harness/case.js';
import { printing } from '../harness/inside.js';
import type { Run } from '../harness/run.js';
import { bench } from '../harness/tools.js';

const rounds = (run: Run): string => (run.quick ? '2' : '5');
const storm = (threads: number, counting: boolean): Contender =>
  printing(run => [bench('storm', counting), `${threads}`, rounds(run)], ['ns'], 64 * MiB);
const row = (threads: number): Row => ({
  name: `statistics-${threads === 1 ? 'one-thread' : 'four-threads'}`,
  placement: 'one CPU',
  figure: 'ns',
  unit: 'ns a fault',
  ours: `with, ${threads}`,
  floor: `without, ${threads}`,
  ratio: 'times',
  goal: { atLeast: 0.97 },
});

/** Always on: what that takes. */
export const statistics: Case = {
  name: 'statistics',
  about:
    'the highest rate of faults, page after page from memory, against a pager that was built without statistics',
  rounds: [7, 1],
  contenders: {
    'with, 1': storm(1, true),
    'without, 1': storm(1, false),
    'with, 4': storm(4, true),
    'without, 4': storm(4, false),
  },
  rows: [row(1), row(4)],
};
