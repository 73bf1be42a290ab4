/**
 * A handler in JavaScript that answers every fault with the same page: `node handling.js SOCKET IMAGE KIND`. The image is not read:
 * all of its pages are that page.
 */

import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';

import { EventBatch, type FaultHandlerOptions, Userfaultfd } from 'userfaultfd';

import { listen, say } from '../harness/handed.js';

const page = Buffer.alloc(4096, 1);

interface AnyFault {
  readonly address: bigint;
  defer(): void;
  copy(bytes: Buffer): boolean;
}

function handle(uffd: Userfaultfd, kind: string): void {
  const options: FaultHandlerOptions = kind === 'fallback' ? { notifyBy: 'thread' } : {};
  const deferred = new Set<bigint>();
  const callbacks = {
    main: { fault: (fault: AnyFault) => fault.copy(page) },
    batch: { faults: (batch: { copy(bytes: Buffer): number }) => void batch.copy(page) },
    promise: { fault: async (fault: AnyFault) => fault.copy(page) },
    defer: {
      fault: (fault: AnyFault) => {
        if (deferred.delete(fault.address)) return fault.copy(page);
        deferred.add(fault.address);
        return fault.defer();
      },
    },
    fallback: { fault: (fault: AnyFault) => fault.copy(page) },
  };
  if (!(kind in callbacks)) throw new Error(`no such kind of handler: ${kind}`);
  uffd.createHandler(callbacks[kind as keyof typeof callbacks], options);
}

/** In a worker that does nothing else. */
function loop(fd: number): void {
  const uffd = Userfaultfd.adopt(fd);
  const events = new EventBatch(64);
  const step = (): number => uffd.waitSync(events, { timeout: 100 });
  parentPort?.postMessage('ready');
  for (let count = step(); count >= 0; count = step()) {
    for (let index = 0; index < count; index += 1) uffd.tryCopy(events.page(index), page);
  }
}

async function main(socketPath: string, kind: string): Promise<void> {
  const accept = await listen(socketPath);
  const { uffd } = await accept();
  if (kind === 'worker')
    await once(new Worker(fileURLToPath(import.meta.url), { workerData: uffd }), 'message');
  else handle(Userfaultfd.adopt(uffd), kind);
  say({ event: 'session' });
}

const [socketPath = '', , kind = ''] = process.argv.slice(2);
if (isMainThread) await main(socketPath, kind);
else loop(workerData as number);
