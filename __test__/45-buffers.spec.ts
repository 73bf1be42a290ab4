// Mappings as buffers: what touching them does, and how long the memory lives.

import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { setImmediate } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { Worker } from 'node:worker_threads';

import test, { type ExecutionContext } from 'ava';
import { GiB, KiB, MemoryMapping, Userfaultfd } from 'userfaultfd';

import { inEveryWay, make, mapped, next, PAGE, pageOf, wayOf } from './helpers/faults.js';
import { folder } from './helpers/serving.js';

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc') as () => void;

/** Whether an address is mapped, as the kernel tells. */
function isMapped(address: bigint): boolean {
  return readFileSync('/proc/self/maps', 'utf8')
    .split('\n')
    .some(line => {
      const [, start, end] = /^([0-9a-f]+)-([0-9a-f]+) /.exec(line) ?? [];
      return start !== undefined && BigInt(`0x${start}`) <= address && address < BigInt(`0x${end}`);
    });
}

/** Collects garbage until something is so; fails the test when it never is. */
async function collected(t: ExecutionContext, isSo: () => boolean): Promise<void> {
  const until = performance.now() + 10_000;
  while (!isSo()) {
    if (performance.now() > until) return t.fail('nothing was collected');
    collect();
    // Finalizers run between two turns of the event loop.
    await setImmediate();
  }
}

/** Whether this runtime has shared buffers over memory of its own; the reason logged where not. */
function hasShared(t: ExecutionContext): boolean {
  const mapping = MemoryMapping.anonymous(PAGE);
  try {
    mapping.sharedArrayBuffer();
    return true;
  } catch (error) {
    t.is((error as { code?: string }).code, 'ERR_UFFD_UNSUPPORTED');
    t.regex((error as Error).message, /this runtime cannot/);
    t.regex(process.version, /^v20\./, 'newer runtimes can');
    t.log(`skipped: Node ${process.version} cannot make a SharedArrayBuffer over memory of its own`);
    return false;
  } finally {
    mapping.close();
  }
}

test('a buffer is the memory itself, and the same one each time', async t => {
  const mapping = mapped(t, MemoryMapping.anonymous(2 * PAGE));
  const buffer = mapping.arrayBuffer();

  new Uint8Array(buffer)[PAGE] = 7;
  await mapping.write(0, Buffer.from([5]));

  t.is(buffer.byteLength, 2 * PAGE);
  t.is(mapping.arrayBuffer(), buffer);
  t.deepEqual([...(await mapping.read(PAGE, 1))], [7]);
  t.is(new Uint8Array(buffer)[0], 5);
  // From and to the mapping itself, overlapping.
  mapping.writeSync(1, new Uint8Array(buffer, 0, 2));
  t.deepEqual([...new Uint8Array(buffer, 0, 4)], [5, 5, 0, 0]);
});

inEveryWay(
  'a thread that touches a missing page through a buffer waits until another has filled it',
  async t => {
    if (!make(t)) return;
    const worker = new Worker(join(import.meta.dirname, 'fixtures', 'touching.js'), {
      workerData: { way: wayOf(t), buffer: true },
    });
    t.teardown(async () => worker.terminate());
    const [fd] = (await once(worker, 'message')) as [number];
    const uffd = Userfaultfd.adopt(fd);
    t.teardown(() => uffd.close({ waiting: 'zero' }));
    const touched = once(worker, 'message');

    const batch = next(t, uffd);
    t.is(batch.address(0) % BigInt(PAGE), 123n);
    uffd.copy(batch.page(0), pageOf(9));

    t.deepEqual(await touched, [9]);
  },
);

test('closing empties a buffer and every view of it, and unmaps at once', t => {
  const mapping = MemoryMapping.anonymous(4 * PAGE);
  const buffer = mapping.arrayBuffer();
  const view = new Uint8Array(buffer, PAGE);
  const node = Buffer.from(buffer);
  view.fill(1);

  mapping.close();

  t.deepEqual([buffer.byteLength, view.length, node.length], [0, 0, 0]);
  t.false(isMapped(mapping.address));
  t.throws(() => mapping.arrayBuffer(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  t.throws(() => mapping.sharedArrayBuffer(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('a buffer keeps memory that nobody closes, and what nobody can reach is unmapped', async t => {
  let buffer: ArrayBuffer | undefined = MemoryMapping.anonymous(PAGE).arrayBuffer();
  const addresses = [1, 2, 3].map(() => MemoryMapping.anonymous(64 * KiB).address);

  await collected(t, () => !addresses.some(isMapped));
  new Uint8Array(buffer).fill(3);
  t.is(new Uint8Array(buffer)[PAGE - 1], 3);
  buffer = undefined;
});

test('memory that must not be written has no buffer', t => {
  const path = join(folder(t), 'file');
  writeFileSync(path, pageOf(1));
  const reading = mapped(t, MemoryMapping.file(path));
  const copying = mapped(t, MemoryMapping.file(path, { access: 'copy-on-write' }));

  t.throws(() => reading.arrayBuffer(), { code: 'ERR_UFFD_UNSUPPORTED', message: /for reading only/ });
  new Uint8Array(copying.arrayBuffer()).fill(2);

  t.deepEqual(readFileSync(path), pageOf(1));
});

test('memory too large for a buffer is read and written by offset', async t => {
  const mapping = mapped(t, MemoryMapping.anonymous(5 * GiB));
  const large = 5 * GiB - 10;

  await mapping.write(large, Buffer.from('far away'));

  t.is((await mapping.read(large, 8)).toString(), 'far away');
  if (process.version.startsWith('v20.')) {
    t.throws(() => mapping.arrayBuffer(), { code: 'ERR_UFFD_UNSUPPORTED', message: /so large/ });
  } else {
    t.is(new Uint8Array(mapping.arrayBuffer())[large], 'f'.charCodeAt(0));
  }
  // Refusing must not have unmapped it.
  t.is((await mapping.read(large, 8)).toString(), 'far away');
});

test('passing a buffer on copies it, or is refused', t => {
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  const buffer = mapping.arrayBuffer();
  new Uint8Array(buffer).fill(4);

  t.deepEqual(new Uint8Array(structuredClone(buffer)), new Uint8Array(pageOf(4)));
  if (process.version.startsWith('v20.')) {
    t.is(structuredClone(buffer, { transfer: [buffer] }).byteLength, PAGE);
    t.is(buffer.byteLength, PAGE, 'copied, not transferred');
  } else {
    t.throws(() => structuredClone(buffer, { transfer: [buffer] }), { name: 'DataCloneError' });
  }
});

test('a shared buffer is one memory for all threads', async t => {
  if (!hasShared(t)) return;
  const uffd = make(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  uffd.register(mapping.range(), { modes: ['missing'] });
  const shared = mapping.sharedArrayBuffer();
  const worker = new Worker(join(import.meta.dirname, 'fixtures', 'touching.js'), {
    workerData: { way: wayOf(t), shared },
  });
  t.teardown(async () => worker.terminate());
  worker.postMessage('touch');
  const touched = once(worker, 'message');

  const batch = next(t, uffd);
  t.is(batch.address(0), mapping.address);
  uffd.copy(mapping.range(), pageOf(6));

  t.deepEqual(await touched, [6]);
  t.is(mapping.sharedArrayBuffer(), shared);
  t.throws(() => mapping.arrayBuffer(), { code: 'ERR_UFFD_UNSUPPORTED', message: /a SharedArrayBuffer/ });
});

test('memory and its registration outlive closing as long as a thread has a shared buffer', async t => {
  if (!hasShared(t)) return;
  const uffd = make(t);
  if (!uffd) return;
  const mapping = MemoryMapping.anonymous(PAGE);
  const { address } = mapping;
  uffd.register(mapping.range(), { modes: ['missing'] });
  const worker = new Worker(join(import.meta.dirname, 'fixtures', 'touching.js'), {
    workerData: { way: wayOf(t), shared: mapping.sharedArrayBuffer() },
  });
  t.teardown(async () => worker.terminate());

  mapping.close();
  t.throws(() => mapping.readSync(0, new Uint8Array(1)), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  worker.postMessage('touch');
  const touched = once(worker, 'message');
  const batch = next(t, uffd);
  uffd.copy(batch.page(0), pageOf(8));

  t.deepEqual(await touched, [8]);
  t.true(isMapped(address));
  await worker.terminate();
  await collected(t, () => !isMapped(address));
  t.is(uffd.waitingThreads(), 0);
});
