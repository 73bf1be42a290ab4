import type { Case, Placement, Row } from '../harness/case.js';
import { storm } from '../harness/storm.js';

const row = (name: string, placement: Placement, ours: string, floor: string): Row => ({
  name: `recording-${name}`,
  placement,
  figure: 'ns',
  unit: 'ns a fault',
  ours,
  floor,
  ratio: 'times',
});

/** A recording that is switched off, and one that is on. */
export const recording: Case = {
  name: 'recording',
  about:
    'the highest rate of faults, page after page from memory, each of them recorded; not recorded; and by a pager that was built without it',
  rounds: [3, 1],
  contenders: {
    recorded: storm({ threads: 1, how: 'recorded' }),
    'not recorded': storm({ threads: 1 }),
    'built without': storm({ threads: 1, without: 'recording' }),
  },
  rows: [
    row('on-one-cpu', 'one CPU', 'recorded', 'not recorded'),
    row('off-one-cpu', 'one CPU', 'not recorded', 'built without'),
    row('on-two-cpus', 'two CPUs', 'recorded', 'not recorded'),
    row('off-two-cpus', 'two CPUs', 'not recorded', 'built without'),
  ],
};
