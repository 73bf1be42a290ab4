import { MiB } from 'userfaultfd';

import type { Case, Contender, Row } from '../harness/case.js';
import { inside, printing } from '../harness/inside.js';
import type { Run } from '../harness/run.js';
import { floor } from '../harness/tools.js';

const rounds = (run: Run): string => (run.quick ? '2' : '5');
const call = (which: string): Contender =>
  printing(run => inside('calls', which, rounds(run)), ['ns'], 128 * MiB);
const row = (name: string, ours: string, inC: string, goal?: number): Row => ({
  name,
  placement: 'one CPU',
  figure: 'ns',
  unit: 'ns',
  ours,
  floor: inC,
  ratio: 'share',
  ...(goal === undefined ? {} : { goal: { atMost: goal } }),
});

/** The hot form, the comfortable form, and one call for much. */
export const calls: Case = {
  name: 'calls',
  about:
    'one 4 KiB copy from JavaScript, 64 MiB by one copy, one read of a page that is there; against the same from C',
  contenders: {
    tryCopy: call('tryCopy'),
    copy: call('copy'),
    'copy of 64 MiB': call('bulk'),
    'mapping.read': call('read'),
    'C ioctl': printing(run => [floor('calls'), rounds(run), 'one'], ['ns'], 128 * MiB),
    'C ioctl of 64 MiB': printing(run => [floor('calls'), rounds(run), 'bulk'], ['ns'], 128 * MiB),
    'C process_vm_readv': printing(run => [floor('calls'), rounds(run), 'read'], ['ns'], 128 * MiB),
  },
  rows: [
    row('try-copy', 'tryCopy', 'C ioctl', 1.3),
    row('copy', 'copy', 'C ioctl', 1.6),
    row('bulk-copy', 'copy of 64 MiB', 'C ioctl of 64 MiB', 1.05),
    row('mapping-read', 'mapping.read', 'C process_vm_readv'),
  ],
};
