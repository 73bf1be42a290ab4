/**
 * A read barrier and a write barrier, as a garbage collector that moves objects has them, without a check in the program that
 * is collected: the collector (this thread) moves each page of objects to its new place when the program (a worker) first reads
 * it, and installs it write-protected; the first write to it is told, which puts the page into the remembered set.
 *
 *     node out/examples/read-barrier.js
 */

import { once } from 'node:events';
import process from 'node:process';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';

import { MemoryMapping, Userfaultfd } from 'userfaultfd';

const PAGE = 4096;
const PAGES = 64;
/** Objects are two words: where the next one is, and a value. */
const OBJECT = 8;

/** The program: follows a list through its new heap, and changes some objects. It knows nothing of the collector. */
async function program(): Promise<void> {
  const uffd = Userfaultfd.create({ prefer: ['pagefault-flag-wp'] });
  const heap = MemoryMapping.anonymous(PAGES * PAGE, { pages: 'small' });
  uffd.register(heap.range(), { modes: ['missing', 'write-protect'] });
  // From here on whoever has the descriptor answers.
  parentPort?.postMessage({ fd: uffd.releaseFd(), start: heap.address });
  await once(parentPort as NonNullable<typeof parentPort>, 'message');
  const words = new Uint32Array(heap.arrayBuffer());
  let [sum, at] = [0, 0];
  do {
    const value = words[at / 4 + 1] ?? 0;
    sum += value;
    if (value % 10 === 0) words[at / 4 + 1] = value + 1;
    at = words[at / 4] ?? 0;
  } while (at !== 0);
  parentPort?.postMessage(sum);
}

async function collector(): Promise<void> {
  // The old heap: one object in every page, each pointing to a place that is not true any more.
  const old = new Uint32Array((PAGES * PAGE) / 4);
  for (let page = 0; page < PAGES; page += 1) {
    old[(page * PAGE) / 4] = 0xdead_0000 + ((page + 7) % PAGES);
    old[(page * PAGE) / 4 + 1] = page;
  }
  const worker = new Worker(new URL(import.meta.url));
  const [{ fd, start }] = (await once(worker, 'message')) as [{ fd: number; start: bigint }];
  const moved = new Set<number>();
  const remembered = new Set<number>();
  const handler = Userfaultfd.adopt(fd).createHandler({
    fault(fault) {
      const page = Number(fault.address - start) >> 12;
      if (fault.kind === 'write-protect') {
        remembered.add(page);
        return fault.unprotect();
      }
      // Evacuated: what it points to is told by its new place.
      const copy = old.slice((page * PAGE) / 4, ((page + 1) * PAGE) / 4);
      copy[0] = ((copy[0] ?? 0) & 0xffff) * PAGE;
      moved.add(page);
      return fault.copy(new Uint8Array(copy.buffer), { writeProtect: true });
    },
  });
  worker.postMessage('go');
  const [sum] = (await once(worker, 'message')) as [number];
  process.stdout.write(`the program has followed its list: the sum is ${sum}\n`);
  process.stdout.write(`read barrier    ${moved.size} pages were moved when they were first read\n`);
  process.stdout.write(
    `write barrier   ${remembered.size} pages are remembered: ${[...remembered].join(' ')}\n`,
  );
  process.stdout.write(`object size     ${OBJECT} bytes, and no check in the program\n`);
  await worker.terminate();
  await handler.close({ rest: 'zero' });
}

await (isMainThread ? collector() : program());
