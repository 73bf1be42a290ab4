/**
 * What a call costs in this process: `node calls.js tryCopy|copy|bulk|read ROUNDS` prints nanoseconds, the median of the rounds, of one
 * 4 KiB copy, of 64 MiB by one, and of one `MemoryMapping.read` of a page that is there.
 */

import { MemoryMapping, MiB, Userfaultfd } from 'userfaultfd';

import { median } from '../harness/statistics.js';

const SIZE = 64 * MiB;
const PAGE = 4096;
const READS = 4096;

const [which = '', rounds = '5'] = process.argv.slice(2);
const uffd = Userfaultfd.create();
const mapping = MemoryMapping.anonymous(SIZE, { pages: 'small' });
uffd.register(mapping.range(), { modes: ['missing'] });
const page = Buffer.alloc(PAGE, 1);
const all = Buffer.alloc(SIZE, 1);
const ranges = Array.from({ length: SIZE / PAGE }, (_, index) => mapping.range(index * PAGE, PAGE));
const options = { writeProtect: false, wake: true };

/** What is measured, and how many calls that is. */
const works: Record<string, { calls: number; run: () => void | Promise<void> }> = {
  tryCopy: {
    calls: ranges.length,
    run: () => {
      for (const range of ranges)
        if (uffd.tryCopy(range, page) !== PAGE) throw new Error('a page was not copied');
    },
  },
  copy: {
    calls: ranges.length,
    run: () => {
      for (const range of ranges) uffd.copy(range, page, options);
    },
  },
  bulk: { calls: 1, run: () => uffd.copy(mapping.range(), all) },
  read: {
    calls: READS,
    run: async () => {
      for (let index = 0; index < READS; index += 1) {
        const bytes = await mapping.read(index * PAGE, PAGE);
        if (bytes[0] !== 1) throw new Error('other bytes were read');
      }
    },
  },
};

const work = works[which];
if (work === undefined) throw new Error(`no such call: ${which}`);
const times: number[] = [];
for (let round = -2; round < Number(rounds); round += 1) {
  if (which === 'read') uffd.copy(mapping.range(), all);
  const start = process.hrtime.bigint();
  await work.run();
  const time = Number(process.hrtime.bigint() - start);
  if (round >= 0) times.push(time / work.calls);
  mapping.discardSync();
}
uffd.close();
mapping.close();
process.stdout.write(`${median(times)}`);
