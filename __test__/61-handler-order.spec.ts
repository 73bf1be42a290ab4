// Chromium's userfaultfd_unittest.cc, one by one: the faults are another process's.

import test from 'ava';
import { EventBatch, type Fault, type MemoryRange, Userfaultfd } from 'userfaultfd';

import { Faulter, REMAP, REMOVE, THREAD_ID, UNMAP } from './helpers/faulter.js';
import { make, PAGE, pageOf } from './helpers/faults.js';

/** What a callback was told of a range, as numbers. */
function bounds(range: MemoryRange): { address: number; length: number } {
  if ('mapping' in range) throw new Error('it is not memory of this process');
  return { address: Number(range.address), length: range.length };
}

/** Reads every page of some memory, in some order; what each begins with. */
async function readAll(faulter: Faulter, start: number, pages: number[]): Promise<number[]> {
  const bytes: number[] = [];
  for (const page of pages) {
    const { byte } = await faulter.load(start + page * PAGE + ((page * 37) % PAGE));
    bytes.push(byte);
  }
  return bytes;
}

const sequence = (count: number): number[] => Array.from({ length: count }, (_, index) => index);

test('TestBadFD: a userfaultfd that was given up, or no callback, makes no handler', t => {
  const uffd = make(t);
  if (!uffd) return;

  t.throws(() => uffd.createHandler({}), { code: 'ERR_INVALID_ARG_VALUE', message: /`fault` or `faults`/ });
  const other = Userfaultfd.adopt(uffd.releaseFd());
  t.teardown(() => other.close());

  t.throws(() => uffd.createHandler({ fault: () => undefined }), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('SimpleZeroPageReadFault: one read fault at the mapping’s address, and the value is 0', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(1);
  const faults: Fault[] = [];
  faulter.handle(t, {
    fault(fault) {
      faults.push(fault);
      t.true(fault.zero());
    },
  });

  t.is((await faulter.load(start)).byte, 0);

  t.is(faults.length, 1);
  t.like(faults[0], { address: BigInt(start), kind: 'missing', write: false, threadId: undefined });
});

test('SimpleZeroPageReadFaultRetry: a fault that was put off is delivered again', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(1);
  const addresses: bigint[] = [];
  faulter.handle(t, {
    fault(fault) {
      addresses.push(fault.address);
      return addresses.length === 1 ? fault.defer() : fault.zero();
    },
  });

  t.is((await faulter.load(start)).byte, 0);

  t.deepEqual(addresses, [BigInt(start), BigInt(start)]);
});

test('SimpleZeroPageReadFaultWithTid: the thread is the one that faults', async t => {
  const faulter = await Faulter.start(t, THREAD_ID);
  if (!faulter) return;
  const start = await faulter.map(1);
  const threads: (number | undefined)[] = [];
  faulter.handle(t, {
    fault(fault) {
      threads.push(fault.threadId);
      fault.zero();
    },
  });

  const { thread } = await faulter.load(start);

  t.deepEqual(threads, [thread]);
});

test('SimpleZeroPageWriteFault: the write is told and done, and its neighbours are 0', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(1);
  const writes: boolean[] = [];
  faulter.handle(t, {
    fault(fault) {
      writes.push(fault.write);
      fault.zero();
    },
  });

  await faulter.ask('store', start, 99);

  t.deepEqual(writes, [true]);
  t.deepEqual([...(await faulter.bytes(start, 8))], [99, 0, 0, 0, 0, 0, 0, 0]);
});

test('SimpleReadFaultResolveWithCopyPage: the page equals what was copied', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(1);
  const page = Buffer.from(sequence(PAGE).map(index => (index * 7) & 255));
  faulter.handle(t, { fault: fault => fault.copy(page) });

  t.deepEqual(await faulter.bytes(start, PAGE), page);
});

test('ReadFaultResolveWithCopyPageForMultiplePages: one answer of 20 pages, and no other fault', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(20);
  let faults = 0;
  faulter.handle(t, {
    fault(fault) {
      faults += 1;
      fault.copy(pageOf(5, 20));
    },
  });

  t.deepEqual(await readAll(faulter, start, sequence(20)), sequence(20).fill(5));
  t.is(faults, 1);
});

test('ReadFaultResolveWithCopyPageForMultipleIndividualPages: 20 faults, each page with a byte of its own', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(20);
  let faults = 0;
  faulter.handle(t, {
    fault(fault) {
      faults += 1;
      fault.copy(pageOf((Number(fault.address) - start) / PAGE + 1));
    },
  });

  const order = sequence(20).map(index => (index * 7) % 20);
  t.deepEqual(
    await readAll(faulter, start, order),
    order.map(page => page + 1),
  );
  t.is(faults, 20);
});

for (const [name, write] of [
  ['ReadFaultRegisteredOnPartialRange', false],
  ['WriteFaultRegisteredOnPartialRange', true],
] as const) {
  test(`${name}: faults of the registered half only`, async t => {
    const faulter = await Faulter.start(t, 0);
    if (!faulter) return;
    const start = await faulter.map(20, 10);
    let faults = 0;
    faulter.handle(t, {
      fault(fault) {
        t.is(fault.write, write);
        faults += 1;
        fault.copy(pageOf(8));
      },
    });

    for (const page of sequence(20)) {
      if (write) await faulter.ask('store', start + page * PAGE, 3);
      const expected = page < 10 ? 8 : 0;
      const bytes = await faulter.bytes(start + page * PAGE, PAGE);
      t.is(bytes[0], write ? 3 : expected);
      t.true(bytes.subarray(1).every(byte => byte === expected));
    }
    t.is(faults, 10);
  });
}

test('SinglePageRemove: a page given back is told once, and one that is there does not fault', async t => {
  const faulter = await Faulter.start(t, REMOVE);
  if (!faulter) return;
  const start = await faulter.map(1);
  const removed: object[] = [];
  let faults = 0;
  faulter.handle(t, {
    fault(fault) {
      faults += 1;
      fault.zero();
    },
    removed: range => removed.push(bounds(range)),
  });
  await faulter.load(start);
  await faulter.load(start);

  await faulter.ask('discard', start, PAGE);

  t.is(faults, 1);
  t.deepEqual(removed, [{ address: start, length: PAGE }]);
});

test('MultiPageRemove: of three pages the two that are registered are told, once', async t => {
  const faulter = await Faulter.start(t, REMOVE);
  if (!faulter) return;
  const start = await faulter.map(3, 2);
  const removed: object[] = [];
  faulter.handle(t, { fault: fault => fault.zero(), removed: range => removed.push(bounds(range)) });

  await faulter.ask('discard', start, 3 * PAGE);

  t.deepEqual(removed, [{ address: start, length: 2 * PAGE }]);
});

test('SinglePageUnmap: memory that is unmapped is told with its bounds', async t => {
  const faulter = await Faulter.start(t, UNMAP);
  if (!faulter) return;
  const start = await faulter.map(1);
  const unmapped: object[] = [];
  faulter.handle(t, { fault: fault => fault.zero(), unmapped: range => unmapped.push(bounds(range)) });

  await faulter.ask('unmap', start, PAGE);

  t.deepEqual(unmapped, [{ address: start, length: PAGE }]);
});

test('MultiPageUnmap: two registered pages are told once, the third not at all', async t => {
  const faulter = await Faulter.start(t, UNMAP);
  if (!faulter) return;
  const start = await faulter.map(3, 2);
  const unmapped: object[] = [];
  faulter.handle(t, { fault: fault => fault.zero(), unmapped: range => unmapped.push(bounds(range)) });

  await faulter.ask('unmap', start, 2 * PAGE);
  await faulter.ask('unmap', start + 2 * PAGE, PAGE);

  t.deepEqual(unmapped, [{ address: start, length: 2 * PAGE }]);
});

test('MultiPagePartialUnmap: page by page, each is told with bounds of its own', async t => {
  const faulter = await Faulter.start(t, UNMAP);
  if (!faulter) return;
  const start = await faulter.map(3, 2);
  const unmapped: object[] = [];
  faulter.handle(t, { fault: fault => fault.zero(), unmapped: range => unmapped.push(bounds(range)) });

  for (const page of sequence(3)) await faulter.ask('unmap', start + page * PAGE, PAGE);

  t.deepEqual(unmapped, [
    { address: start, length: PAGE },
    { address: start + PAGE, length: PAGE },
  ]);
});

test('SimpleRemap: a move is told with where it was and its length then', async t => {
  const faulter = await Faulter.start(t, REMAP);
  if (!faulter) return;
  const start = await faulter.map(1);
  // In the way, so that it has to move.
  const moves: { from: bigint; to: bigint; length: number }[] = [];
  faulter.handle(t, { fault: fault => fault.zero(), remapped: move => moves.push(move) });

  const to = await grown(faulter, start);

  t.deepEqual(moves, [{ from: BigInt(start), to: BigInt(to), length: PAGE }]);
});

test('RemapAndFaultAtNewAddress: faults come from where it is, and from where it has grown', async t => {
  const faulter = await Faulter.start(t, REMAP);
  if (!faulter) return;
  const start = await faulter.map(1);
  const told: bigint[] = [];
  const addresses: bigint[] = [];
  faulter.handle(t, {
    fault(fault) {
      addresses.push(fault.address);
      fault.copy(pageOf(4));
    },
    remapped: move => told.push(move.to),
  });

  const to = await grown(faulter, start);
  t.deepEqual(await readAll(faulter, to, [0, 1]), [4, 4]);

  t.deepEqual(told, [BigInt(to)]);
  t.deepEqual(addresses, [BigInt(to), BigInt(to + PAGE)]);
});

/** Lets a page grow to two, which it can only do elsewhere. */
async function grown(faulter: Faulter, start: number): Promise<number> {
  await faulter.ask('fence', start + PAGE);
  const [to] = await faulter.ask('remap', start, PAGE, 2 * PAGE);
  return Number(to);
}

test('a second handler, reading, giving up and closing are refused while there is a handler', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const { uffd } = faulter;
  const handler = faulter.handle(t, { fault: fault => fault.zero() });
  const inUse = { code: 'ERR_UFFD_IN_USE' };

  t.throws(() => uffd.createHandler({ fault: fault => fault.zero() }), inUse);
  t.throws(() => uffd.readEvents(new EventBatch()), inUse);
  t.throws(() => uffd.waitSync(new EventBatch(), { timeout: 0 }), inUse);
  await t.throwsAsync(uffd.events().next(), inUse);
  t.throws(() => uffd.releaseFd(), inUse);
  t.throws(() => uffd.close(), inUse);
  const clone = uffd.clone();
  t.throws(() => clone.createHandler({ fault: fault => fault.zero() }), inUse);
  t.throws(() => clone.readEvents(new EventBatch()), inUse);
  clone.close();

  await handler.close();
  t.true(uffd.closed);
});

test('QEMU’s background snapshot: every page is saved as it was, before it is written to', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(8, 8, 1 | 2);
  const saved = new Map<number, Buffer>();
  const content = new Map<number, Buffer>();
  const pageAt = (address: bigint): number => (Number(address) - start) / PAGE;
  faulter.handle(t, {
    fault(fault) {
      const page = pageAt(fault.address);
      if (fault.kind === 'write-protect') {
        // Saved first; then whoever waits may write.
        saved.set(page, content.get(page) ?? Buffer.alloc(0));
        return fault.unprotect();
      }
      content.set(page, pageOf(page + 1));
      return fault.copy(pageOf(page + 1));
    },
  });
  // Protecting passes over what is not there.
  for (const page of sequence(8)) await faulter.load(start + page * PAGE);
  faulter.uffd.writeProtect({ address: BigInt(start), length: 8 * PAGE });

  for (const page of [2, 5, 2]) await faulter.ask('store', start + page * PAGE, 99);

  t.deepEqual([...saved.keys()], [2, 5]);
  t.deepEqual(saved.get(2), pageOf(3));
  t.deepEqual(await readAll(faulter, start, [1, 2]), [2, 3]);
  t.is((await faulter.load(start + 2 * PAGE)).byte, 99);
  // Released with a wake, as QEMU does when it has saved the rest.
  faulter.uffd.writeProtect({ address: BigInt(start), length: 8 * PAGE }, { protect: false });
  await faulter.ask('store', start, 7);
  t.deepEqual([...saved.keys()], [2, 5]);
});
