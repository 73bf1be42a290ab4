/**
 * A pager in a worker: its JavaScript source runs there, so that the main thread may touch the memory as it likes, and sleep
 * in a fault without holding up whoever answers it.
 *
 *     node out/examples/pager-in-worker.js
 */

import { once } from 'node:events';
import process from 'node:process';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';

import { callbackSource, KiB, MemoryMapping, MiB, Pager, Userfaultfd } from 'userfaultfd';

const SIZE = 4 * MiB;
const CHUNK = 64 * KiB;

/** Has memory, and gives its faults away. */
async function main(): Promise<void> {
  const memory = MemoryMapping.anonymous(SIZE);
  const uffd = Userfaultfd.create({ prefer: ['event-remove', 'event-unmap'] });
  uffd.register(memory.range(), { modes: ['missing'] });
  // From here on the descriptor is the worker's.
  const data = { fd: uffd.releaseFd(), address: memory.address };
  const worker = new Worker(new URL(import.meta.url), { workerData: data });
  await once(worker, 'message');

  const words = new Uint32Array(memory.arrayBuffer());
  let sum = 0;
  for (let at = 0; at < SIZE; at += CHUNK) sum += words[at / 4] ?? 0;
  process.stdout.write(`the first words of ${SIZE / CHUNK} chunks come to ${sum}\n`);

  worker.postMessage('close');
  const [faults] = (await once(worker, 'message')) as [number];
  process.stdout.write(`the worker answered ${faults} faults\n`);
  await once(worker, 'exit');
  memory.close();
}

/** Brings the bytes: each word of chunk `n` is `n`. */
async function pagerThread({ fd, address }: { fd: number; address: bigint }): Promise<void> {
  const source = callbackSource((offset, length) => new Uint32Array(length / 4).fill(offset / CHUNK), {
    size: SIZE,
    chunk: CHUNK,
  });
  await using pager = Pager.create();
  const session = await pager.adopt(Userfaultfd.adopt(fd), {
    regions: [{ address, length: SIZE, sourceOffset: 0 }],
    source,
  });
  parentPort?.postMessage('ready');
  await once(parentPort as NonNullable<typeof parentPort>, 'message');
  const { faults } = session.stats();
  await session.close({ rest: 'zero' });
  source.close();
  parentPort?.postMessage(faults);
  parentPort?.close();
}

if (isMainThread) await main();
else await pagerThread(workerData as { fd: number; address: bigint });
