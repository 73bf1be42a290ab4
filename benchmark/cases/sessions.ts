import { MiB } from 'userfaultfd';

import type { Case, Contender, Row } from '../harness/case.js';
import { printing } from '../harness/inside.js';
import type { Run } from '../harness/run.js';
import { bench } from '../harness/tools.js';

const rounds = (run: Run): string => (run.quick ? '2' : '5');
const storm = (threads: number, sessions: number): Contender =>
  printing(
    run => [bench('storm'), `${threads}`, rounds(run), `${sessions}`, run.image(64 * MiB).path],
    ['ns'],
    64 * MiB,
  );
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
  contenders: { '256 sessions': storm(1, 256), 'one session': storm(1, 1) },
  rows: [row('sessions-one-cpu', 'one CPU')],
};
