/**
 * Swapping in user space, with compression: pages that have not been wanted for a while are compressed and given back to the
 * system, and decompressed when they are touched again. Writes while a page is on its way out are caught by write-protection.
 *
 *     node out/examples/swap.js
 */

import process from 'node:process';
import { deflateSync, inflateSync } from 'node:zlib';

import { MemoryMapping, Userfaultfd } from 'userfaultfd';

const PAGE = 4096;
const PAGES = 256;

const uffd = Userfaultfd.create({ prefer: ['pagefault-flag-wp'] });
const memory = MemoryMapping.anonymous(PAGES * PAGE, { pages: 'small' });
uffd.register(memory.range(), { modes: ['missing', 'write-protect'] });

/** What is out, by page. */
const swapped = new Map<number, Buffer>();
/** Being compressed: may still stay. */
const leaving = new Set<number>();
/** Being given back: whoever writes to it now waits until it is out, and then brings it in again. */
const going = new Set<number>();
let faults = 0;

const handler = uffd.createHandler({
  fault(fault) {
    faults += 1;
    const page = (fault.offset ?? 0) / PAGE;
    if (fault.kind === 'write-protect') {
      if (going.has(page)) return fault.defer();
      leaving.delete(page);
      return fault.unprotect();
    }
    const compressed = swapped.get(page);
    if (compressed === undefined) return fault.zero();
    const done = fault.copy(inflateSync(compressed));
    if (done) swapped.delete(page);
    return done;
  },
});

/** Takes a page out, unless somebody writes to it before it is. */
async function swapOut(page: number): Promise<void> {
  leaving.add(page);
  uffd.writeProtect(memory.range(page * PAGE, PAGE));
  const compressed = deflateSync(await memory.read(page * PAGE, PAGE));
  if (!leaving.delete(page)) return;
  swapped.set(page, compressed);
  going.add(page);
  await memory.discard(page * PAGE, PAGE);
  going.delete(page);
}

function resident(): number {
  return memory.residency().filter(state => state === 'present').length;
}

for (let page = 0; page < PAGES; page += 1) {
  await memory.write(page * PAGE, Buffer.alloc(PAGE, `this is page ${page}; `));
}
process.stdout.write(`${resident()} pages are in memory\n`);

for (let page = 0; page < PAGES; page += 1) {
  const swapping = swapOut(page);
  // Somebody writes to the last one just then.
  if (page === PAGES - 1) await memory.write(page * PAGE, Buffer.from('THIS'));
  await swapping;
}
const out = swapped.size;
const bytes = [...swapped.values()].reduce((sum, { length }) => sum + length, 0);
process.stdout.write(
  `${out} pages are out, ${resident()} in memory, ${bytes} bytes instead of ${out * PAGE}\n`,
);

faults = 0;
const text = await memory.read(100 * PAGE, 16);
process.stdout.write(`page 100 says "${text.toString()}", after ${faults} fault\n`);
await memory.write(7 * PAGE, Buffer.from('this was page 7;'));
const [seventh, last] = [await memory.read(7 * PAGE, 16), await memory.read((PAGES - 1) * PAGE, 16)];
process.stdout.write(`page 7 says "${seventh.toString()}", the last one "${last.toString()}"\n`);
process.stdout.write(`${swapped.size} pages are still out\n`);

await handler.close({ rest: 'zero' });
memory.close();
