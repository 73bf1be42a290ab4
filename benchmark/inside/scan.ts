/**
 * The dirty scan in this process, as `floor/scan.c` does it: `node scan.js PART ROUNDS` prints nanoseconds of a scan, the median of
 * the rounds, and how many pages each has found.
 */

import { MemoryMapping, MiB, Userfaultfd } from 'userfaultfd';

import { median } from '../harness/statistics.js';

const SIZE = 512 * MiB;
const PAGE = 4096;

const [part = 64, rounds = 9] = process.argv.slice(2).map(Number);
const uffd = Userfaultfd.create({ require: ['wp-async', 'wp-unpopulated'] });
const mapping = MemoryMapping.anonymous(SIZE, { pages: 'small' });
const bytes = new Uint8Array(mapping.arrayBuffer());
bytes.fill(1);
uffd.register(mapping.range(), { modes: ['write-protect'] });
mapping.writtenPages({ protect: true });
const into = new Float64Array(1 + 2 * 16_384);

/** Pages that were written to of the first so many bytes; protects them again. */
function scan(length: number): number {
  let bytesFound = 0;
  const found = mapping.tryWrittenPages(into, 0, length, true);
  for (let at = 0; at < found; at += 1) bytesFound += into[2 * at + 2] ?? 0;
  return bytesFound / PAGE;
}

// A function that is called now and then only is never compiled.
for (let call = 0; call < 20_000; call += 1) scan(PAGE);
const times: number[] = [];
let pages = 0;
for (let round = -2; round < rounds; round += 1) {
  for (let at = 0; at < SIZE; at += part * PAGE) bytes[at] = round;
  const start = process.hrtime.bigint();
  pages = scan(SIZE);
  const time = Number(process.hrtime.bigint() - start);
  if (round >= 0) times.push(time);
}
uffd.close();
mapping.close();
process.stdout.write(`${median(times)} ${pages}`);
