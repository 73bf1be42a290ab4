import type { Case, Row } from '../harness/case.js';
import { storm } from '../harness/storm.js';

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
    'with, 1': storm({ threads: 1 }),
    'without, 1': storm({ threads: 1, without: 'statistics' }),
    'with, 4': storm({ threads: 4 }),
    'without, 4': storm({ threads: 4, without: 'statistics' }),
  },
  rows: [row(1), row(4)],
};
