// Faults answered by callbacks: what an answer is, and what becomes of a fault that gets none.

import { once } from 'node:events';
import { setTimeout } from 'node:timers/promises';

import test, { type ExecutionContext } from 'ava';
import {
  type CreateOptions,
  type Fault,
  type FaultCallbacks,
  type FaultHandler,
  type FaultHandlerOptions,
  MemoryMapping,
  type RegisterMode,
  type UffdError,
  type Userfaultfd,
} from 'userfaultfd';

import { inEveryWay, make, mapped, PAGE, pageOf, registered } from './helpers/faults.js';
import { reserveHugePages, resources } from './helpers/serving.js';

interface Handling {
  uffd: Userfaultfd;
  mapping: MemoryMapping;
  handler: FaultHandler;
}

/** Registered memory with a handler, which is closed when the test ends. */
function handling(
  t: ExecutionContext,
  pages: number,
  callbacks: FaultCallbacks,
  options: FaultHandlerOptions & { modes?: RegisterMode[]; create?: CreateOptions } = {},
): Handling | undefined {
  const { modes, create, ...rest } = options;
  const made = registered(t, pages, modes, create);
  if (!made) return undefined;
  const handler = made.uffd.createHandler(callbacks, rest);
  t.teardown(async () => handler.close({ rest: 'zero' }));
  return { ...made, handler };
}

const first = async (mapping: MemoryMapping, page: number): Promise<number | undefined> =>
  (await mapping.read(page * PAGE, 1))[0];

/** Reads of faults that fail: the kernel reads for the thread, and gets an error where the thread itself would get SIGBUS. */
const poisoned = { code: 'ERR_UFFD_SYSTEM', message: /EFAULT/ };

inEveryWay('faults are answered at once, by a promise, and after having been put off', async t => {
  const times = new Map<number, number>();
  const made = handling(t, 8, {
    fault(fault) {
      const { offset = -1 } = fault;
      const count = (times.get(offset) ?? 0) + 1;
      times.set(offset, count);
      if (offset === PAGE) return setTimeout(5).then(() => fault.copy(pageOf(2)));
      if (offset === 2 * PAGE && count < 5) return fault.defer();
      return fault.copy(pageOf(offset / PAGE + 1));
    },
  });
  if (!made) return;

  const read = await Promise.all([0, 1, 2, 3].map(async page => first(made.mapping, page)));

  t.deepEqual(read, [1, 2, 3, 4]);
  t.is(times.get(2 * PAGE), 5);
});

inEveryWay('a fault says what it is about', async t => {
  const faults: object[] = [];
  const made = handling(
    t,
    2,
    {
      fault(fault) {
        const { address, range, mapping, offset, kind, write, removed, settled } = fault;
        faults.push({ address, range, mapping, offset, kind, write, removed, settled });
        if (kind === 'write-protect') fault.unprotect();
        else fault.copy(pageOf(1), { writeProtect: true });
        t.true(fault.settled);
      },
    },
    { modes: ['missing', 'write-protect'], create: { require: ['pagefault-flag-wp'] } },
  );
  if (!made) return;
  const { mapping } = made;

  await mapping.write(PAGE, Buffer.of(7));

  const about = {
    address: mapping.address + BigInt(PAGE),
    range: { mapping, offset: PAGE, length: PAGE },
    mapping,
    offset: PAGE,
    write: true,
    removed: false,
    settled: false,
  };
  t.deepEqual(faults, [
    { ...about, kind: 'missing' },
    { ...about, kind: 'write-protect' },
  ]);
  t.deepEqual([...(await mapping.read(PAGE, 2))], [7, 1]);
});

inEveryWay('minor faults are answered by continuing, others by waking and ranges of mappings', async t => {
  const uffd = make(t, { require: ['minor-shmem'] });
  if (!uffd) return;
  const memfd = mapped(t, MemoryMapping.memfd(PAGE));
  const alias = mapped(t, MemoryMapping.file(memfd.fd as number, { access: 'shared' }));
  const other = mapped(t, MemoryMapping.anonymous(4 * PAGE));
  const source = mapped(t, MemoryMapping.anonymous(PAGE));
  source.writeSync(0, pageOf(5));
  alias.writeSync(0, pageOf(9));
  uffd.register(memfd.range(), { modes: ['minor'] });
  const handler = uffd.createHandler({
    fault(fault) {
      if (fault.kind === 'minor') return fault.continue();
      if (fault.offset === 0) return fault.copy(source.range());
      uffd.copy(fault.range, pageOf(6), { wake: false });
      return fault.wake();
    },
  });
  t.teardown(async () => handler.close({ rest: 'zero' }));
  uffd.register(other.range(), { modes: ['missing'] });

  t.is(await first(memfd, 0), 9);
  t.is(await first(other, 0), 5);
  t.is(await first(other, 1), 6);
});

test('pages that are there already are answered by waking, and a fault is answered once', async t => {
  const thrown: (UffdError | undefined)[] = [];
  const made = handling(t, 2, {
    fault(fault) {
      made?.uffd.copy(fault.range, pageOf(1), { wake: false });
      t.true(fault.copy(pageOf(2)));
      for (const again of [() => fault.copy(pageOf(3)), () => fault.zero(), () => fault.defer()]) {
        thrown.push(t.throws<UffdError>(again));
      }
    },
  });
  if (!made) return;

  t.is(await first(made.mapping, 0), 1);
  t.deepEqual(
    thrown.map(error => error?.code),
    ['ERR_UFFD_STALE', 'ERR_UFFD_STALE', 'ERR_UFFD_STALE'],
  );
});

test('what is not answered is told and poisoned: forgotten, thrown, rejected, out of time', async t => {
  const told: { code: string; cause: unknown; offset: number | undefined }[] = [];
  const thrown = new Error('thrown');
  const rejected = new Error('rejected');
  const callbacks: ((fault: Fault) => unknown)[] = [
    () => undefined,
    () => {
      throw thrown;
    },
    async () => {
      await setTimeout(1);
      throw rejected;
    },
    async () => setTimeout(1),
    () => new Promise(() => {}),
    fault => fault.defer(),
    fault => fault.copy(new Uint8Array(10)),
    fault => fault.poison(),
  ];
  const made = handling(
    t,
    8,
    {
      fault: fault => callbacks[(fault.offset ?? 0) / PAGE]?.(fault),
      failed: ({ code, cause }, { offset }) => told.push({ code, cause, offset }),
    },
    { faultDeadline: 100, create: { require: ['poison'] } },
  );
  if (!made) return;

  for (const page of callbacks.keys()) await t.throwsAsync(first(made.mapping, page), poisoned);

  t.deepEqual(
    told.map(({ code, offset }) => [code, offset]),
    [
      ['ERR_UFFD_UNANSWERED', 0],
      ['ERR_UFFD_UNANSWERED', PAGE],
      ['ERR_UFFD_UNANSWERED', 2 * PAGE],
      ['ERR_UFFD_UNANSWERED', 3 * PAGE],
      ['ERR_UFFD_TIMEOUT', 4 * PAGE],
      ['ERR_UFFD_TIMEOUT', 5 * PAGE],
      ['ERR_UFFD_UNANSWERED', 6 * PAGE],
    ],
  );
  t.deepEqual([told[1]?.cause, told[2]?.cause], [thrown, rejected]);
  t.like(told[6]?.cause, { code: 'ERR_OUT_OF_RANGE' });
});

test('a fault that nobody is told of as failed is a warning of the process', async t => {
  const made = handling(t, 1, { fault: () => undefined }, { create: { require: ['poison'] } });
  if (!made) return;
  const warned = once(process, 'warning');

  await t.throwsAsync(first(made.mapping, 0), poisoned);

  t.like((await warned)[0], { code: 'ERR_UFFD_UNANSWERED' });
});

inEveryWay(
  'memory that goes while its fault is answered makes the answer stale; it is delivered again',
  async t => {
    const order: string[] = [];
    const removal = `removed ${PAGE}`;
    const stale: unknown[] = [];
    let signal: AbortSignal | undefined;
    const made = handling(
      t,
      4,
      {
        async fault(fault) {
          if (fault.removed) order.push('fault again');
          // It is told before it goes: what is answered meanwhile may go as well, and is another fault then.
          if (order.includes(removal)) return fault.zero();
          order.push('fault');
          ({ signal } = fault);
          await once(fault.signal, 'abort');
          order.push('aborted');
          for (const answer of [() => fault.copy(pageOf(1)), () => fault.continue()]) {
            stale.push(t.throws<UffdError>(answer).code);
          }
          return undefined;
        },
        removed: range => order.push(`removed ${(range as { offset: number }).offset}`),
      },
      { create: { require: ['event-remove'] } },
    );
    if (!made) return;
    const reading = first(made.mapping, 2);
    while (order.length === 0) await setTimeout(1);

    await made.mapping.discard(PAGE, 2 * PAGE);

    t.is(await reading, 0);
    t.is(order[0], 'fault');
    t.true(order.indexOf(removal) < order.indexOf('fault again'));
    t.deepEqual([...new Set(order)].toSorted(), ['aborted', 'fault', 'fault again', removal].toSorted());
    t.deepEqual(stale, ['ERR_UFFD_STALE', 'ERR_UFFD_STALE']);
    t.is((signal?.reason as UffdError | undefined)?.code, 'ERR_UFFD_STALE');
  },
);

inEveryWay('a whole batch is answered by one call, or one by one, or by a promise', async t => {
  const sizes: number[] = [];
  const made = handling(t, 32, {
    faults(batch) {
      sizes.push(batch.length);
      const offset = batch.offset(0) ?? 0;
      if (offset < 8 * PAGE) {
        t.is(batch.copy(pageOf(1)), batch.length);
        return undefined;
      }
      if (offset < 16 * PAGE) {
        const bytes = Buffer.concat(
          Array.from({ length: batch.length }, (_, index) => pageOf((batch.offset(index) ?? 0) / PAGE)),
        );
        t.is(batch.copy(bytes), batch.length);
        return undefined;
      }
      if (offset < 24 * PAGE) return setTimeout(1).then(() => batch.zero());
      for (const fault of batch) fault.copy(pageOf(4));
      return undefined;
    },
  });
  if (!made) return;
  const { mapping } = made;

  for (const start of [0, 8, 16, 24]) {
    const pages = Array.from({ length: 8 }, (_, index) => start + index);
    const read = await Promise.all(pages.map(async page => first(mapping, page)));
    const expected = pages.map(page => [1, page, 0, 4][start / 8]);
    t.deepEqual(read, expected);
  }
  t.is(
    sizes.reduce((sum, size) => sum + size, 0),
    32,
  );
});

test('of a batch, what an operation has left open meets the policy, and nothing else', async t => {
  const told: string[] = [];
  const made = handling(
    t,
    4,
    {
      faults(batch) {
        if (batch.offset(0) === 0) return batch.continue();
        if (batch.offset(0) === PAGE) throw new Error('thrown');
        return undefined;
      },
      failed: (error, fault) => told.push(`${fault.offset} ${String(error.cause)}`),
    },
    { create: { require: ['poison'] } },
  );
  if (!made) return;

  for (const page of [0, 1, 2]) await t.throwsAsync(first(made.mapping, page), poisoned);

  t.regex(told[0] ?? '', /^0 UffdError: UFFDIO_CONTINUE/);
  t.deepEqual(told.slice(1), [`${PAGE} Error: thrown`, `${2 * PAGE} undefined`]);
});

test('pages of 2 MiB are answered whole', async t => {
  if (!reserveHugePages(t, 2)) return;
  const uffd = make(t, { require: ['missing-hugetlbfs'] });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(2 * 2 ** 21, { pages: 2 ** 21 }));
  uffd.register(mapping.range(), { modes: ['missing'] });
  const lengths: number[] = [];
  const handler = uffd.createHandler({
    fault(fault) {
      lengths.push(fault.range.length);
      return fault.offset === 0 ? fault.copy(Buffer.alloc(2 ** 21, 3)) : fault.zero();
    },
  });
  t.teardown(async () => handler.close({ rest: 'zero' }));

  t.is((await mapping.read(2 ** 21 - 1, 1))[0], 3);
  t.is((await mapping.read(2 ** 21 + 12_345, 1))[0], 0);
  t.deepEqual(lengths, [2 ** 21, 2 ** 21]);
});

inEveryWay('the thread that only notifies serves as well as the event loop', async t => {
  const made = handling(
    t,
    64,
    { fault: fault => fault.copy(pageOf((fault.offset ?? 0) / PAGE)) },
    { notifyBy: 'thread' },
  );
  if (!made) return;

  const pages = Array.from({ length: 64 }, (_, page) => page);
  t.deepEqual(await Promise.all(pages.map(async page => first(made.mapping, page))), pages);
  t.true(resources().threads.includes('uffd-notifier'));
  await made.handler.close();
  t.false(resources().threads.includes('uffd-notifier'));
});

test('a thread that only notifies is heard again after a turn that was broken off for being long', async t => {
  const made = handling(
    t,
    256,
    {
      fault(fault) {
        // Meanwhile those that were answered before fault again: there is always more to read.
        for (const until = performance.now() + 0.3; performance.now() < until;);
        return fault.copy(pageOf(9));
      },
    },
    { notifyBy: 'thread' },
  );
  if (!made) return;

  const pages = Array.from({ length: 256 }, (_, page) => page);
  const bytes = await Promise.all(pages.map(async page => first(made.mapping, page)));

  t.true(bytes.every(byte => byte === 9));
});

test('what cannot be is refused by name, and leaves no handler behind', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const { uffd, mapping } = made;
  const fault = (one: Fault): boolean => one.copy(pageOf(1));
  const before = resources();
  const create = (callbacks: unknown, options?: unknown): FaultHandler =>
    uffd.createHandler(callbacks as FaultCallbacks, options as FaultHandlerOptions);

  for (const [callbacks, options, message] of [
    [{}, undefined, /`fault` or `faults`/],
    [{ fault, faults: fault }, undefined, /`fault` or `faults`/],
    [{ falt: fault }, undefined, /Unknown option `falt`/],
    [{ fault: 7 }, undefined, /`callbacks.fault`/],
    [undefined, undefined, /`callbacks`/],
    [{ fault }, { faultDeadline: 0 }, /`options.faultDeadline`/],
    [{ fault }, { onFailure: 'zero' }, /`options.onFailure`/],
    [{ fault }, { onSelfFault: 'poison' }, /`options.onSelfFault`/],
    [{ fault }, { signal: 7 }, /`options.signal`/],
    [{ fault }, { notifyBy: 'luck' }, /`options.notifyBy`/],
    [{ fault }, { pidfd: -1 }, /`options.pidfd`/],
    [{ fault }, { deadline: 5 }, /Unknown option `deadline`/],
  ] as const) {
    t.throws(() => create(callbacks, options), { message });
  }
  t.throws(() => create({ fault }, { signal: AbortSignal.abort(new Error('over')) }), { message: 'over' });
  t.deepEqual(resources(), before);

  const handler = create({ fault });
  t.is(await first(mapping, 0), 1);
  await t.throwsAsync(handler.close({ rest: 'populate' } as never), { message: /`options.rest`/ });
  await handler.close();
});

test('a handler of events has to say what becomes of children', t => {
  const uffd = make(t, { prefer: ['event-fork'] });
  if (!uffd) return;
  if (!uffd.enabledFeatures?.includes('event-fork')) {
    t.log('skipped: event-fork needs CAP_SYS_PTRACE');
    t.pass();
    return;
  }
  t.throws(() => uffd.createHandler({ fault: fault => fault.zero() }), { message: /`callbacks.forked`/ });
});
