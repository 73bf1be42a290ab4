import type { Case, Row } from '../harness/case.js';
import { storm } from '../harness/storm.js';

const row = (name: string, placement: Row['placement']): Row => ({
  name,
  placement,
  figure: 'ns',
  unit: 'ns a fault',
  ours: '256 sessions',
  floor: 'one session',
  ratio: 'times',
  goal: { atLeast: 0.9 },
});

/** One pager, many processes. */
export const sessions: Case = {
  name: 'sessions',
  about: "this process's own faults, in 256 sessions in turn that share one file, against all in one session",
  contenders: {
    '256 sessions': storm({ threads: 1, sessions: 256, file: true }),
    'one session': storm({ threads: 1, file: true }),
  },
  rows: [row('sessions-one-cpu', 'one CPU')],
};
