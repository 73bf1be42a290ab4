// The kernel object: every operation, with real faults.

import { once } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';

import test from 'ava';
import {
  capabilities,
  EventBatch,
  MemoryMapping,
  MiB,
  PageOperations,
  registerRegions,
  unregisterRegions,
  Userfaultfd,
} from 'userfaultfd';

import { inEveryWay, make, mapped, next, PAGE, pageOf, registered, wayOf } from './helpers/faults.js';
import { canRun, reserveHugePages } from './helpers/serving.js';

const { EEXIST, EINVAL, ENOENT } = constants.errno;

inEveryWay('a missing page is filled with what was copied', async t => {
  const { backend, faults } = wayOf(t);
  const uffd = make(t, { threadId: false });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(4 * PAGE));
  const ioctls = uffd.register(mapping.range(), { modes: ['missing'], requireIoctls: ['copy'] });
  const reading = mapping.read(PAGE + 10, 3);
  const batch = next(t, uffd);

  uffd.copy(mapping.range(PAGE, PAGE), pageOf(7));

  t.deepEqual([...(await reading)], [7, 7, 7]);
  t.is(uffd.userModeOnly, faults === 'user');
  t.true(uffd.backend === backend || !capabilities().device.readable);
  t.true(ioctls.includes('copy') && ioctls.includes('wake'));
  t.deepEqual(
    [...batch],
    [{ type: 'fault', address: mapping.address + BigInt(PAGE), kind: 'missing', write: false }],
  );
});

inEveryWay('sources of a copy are views of any kind, shared memory, ranges and addresses', async t => {
  const made = registered(t, 6);
  if (!made) return;
  const { uffd, mapping } = made;
  const other = mapped(t, MemoryMapping.anonymous(2 * PAGE));
  other.writeSync(0, pageOf(5, 2));
  const shared = new Uint8Array(new SharedArrayBuffer(PAGE)).fill(3);
  const words = new BigUint64Array(PAGE / 8).fill(0x0404040404040404n);
  const part = new DataView(pageOf(2, 2).buffer.slice(0), 0, PAGE);
  new Uint8Array(part.buffer).fill(2);

  uffd.copy(mapping.range(0, PAGE), shared);
  uffd.copy(mapping.range(PAGE, PAGE), words);
  uffd.copy(mapping.range(2 * PAGE, PAGE), part);
  uffd.copy(mapping.range(3 * PAGE, PAGE), other.range(PAGE, PAGE));
  uffd.copy(mapping.range(4 * PAGE, PAGE), { address: other.address + 8n, length: PAGE });
  t.is(uffd.tryCopy(mapping.range(5 * PAGE, PAGE), other.range(0, PAGE)), PAGE);

  const bytes = await mapping.read(0, 6 * PAGE);
  t.deepEqual(
    [0, 1, 2, 3, 4, 5].map(page => bytes[page * PAGE + 9]),
    [3, 4, 2, 5, 5, 5],
  );
});

inEveryWay('a copy stops at a page in the way with what was done, or goes on behind it', t => {
  const made = registered(t, 8);
  if (!made) return;
  const { uffd, mapping } = made;
  uffd.zero(mapping.range(3 * PAGE, PAGE));

  t.is(uffd.tryCopy(mapping.range(), pageOf(9, 8)), 3 * PAGE);
  t.is(uffd.tryCopy(mapping.range(), pageOf(9, 8)), -EEXIST);
  const error = t.throws(() => uffd.copy(mapping.range(PAGE * 3), pageOf(9, 5)), {
    code: 'ERR_UFFD_PAGE_EXIST',
  });
  t.like(error, { kind: 'PageExist', errno: EEXIST, syscall: 'UFFDIO_COPY', done: 0 });
  uffd.copy(mapping.range(), pageOf(9, 8), { onPresent: 'skip' });

  const bytes = Buffer.alloc(8 * PAGE);
  mapping.readSync(0, bytes);
  t.deepEqual(
    [2, 3, 4, 7].map(page => bytes[page * PAGE]),
    [9, 0, 9, 9],
  );
});

inEveryWay('whoever waits for a page that turns out to be present is woken, unless told not to', async t => {
  const made = registered(t, 2);
  if (!made) return;
  const { uffd, mapping } = made;
  const reading = mapping.read(0, 1);
  next(t, uffd);
  uffd.copy(mapping.range(0, PAGE), pageOf(1), { wake: false });
  t.is(uffd.waitingThreads(), 1);

  t.is(uffd.tryCopy(mapping.range(0, PAGE), pageOf(2), { wake: false }), -EEXIST);
  t.is(uffd.waitingThreads(), 1);
  t.is(uffd.tryCopy(mapping.range(0, PAGE), pageOf(2)), -EEXIST);

  t.deepEqual([...(await reading)], [1]);
});

inEveryWay('without waking, threads go on only when they are woken', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const { uffd, mapping } = made;
  const reading = mapping.read(0, 1);
  next(t, uffd);

  uffd.zero(mapping.range(), { wake: false });
  t.is(uffd.waitingThreads(), 1);
  uffd.wake(mapping.range());

  t.deepEqual([...(await reading)], [0]);
});

inEveryWay('a poisoned page is an error for who asks the kernel to touch it', async t => {
  const made = registered(t, 2, ['missing'], { require: ['poison'] });
  if (!made) return;
  const { uffd, mapping } = made;

  uffd.poison(mapping.range(PAGE, PAGE));

  t.deepEqual(mapping.residency(), ['absent', 'noted']);
  await t.throwsAsync(mapping.read(PAGE, 1), { code: 'ERR_UFFD_SYSTEM' });
  await t.throwsAsync(mapping.write(PAGE, pageOf(1)), { code: 'ERR_UFFD_SYSTEM' });
  await t.throwsAsync(mapping.populate(PAGE, PAGE), { code: 'ERR_UFFD_SYSTEM' });
  t.is(uffd.tryPoison(mapping.range(PAGE, PAGE)), -EEXIST);
});

inEveryWay('minor faults of shared memory are answered by continuing', async t => {
  const uffd = make(t, { require: ['minor-shmem'] });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.memfd(2 * PAGE, { name: 'minor' }));
  // Another mapping of the same memfd puts bytes into the page cache.
  const other = mapped(t, MemoryMapping.file(mapping.fd as number, { access: 'shared' }));
  other.writeSync(0, pageOf(6));
  uffd.register(mapping.range(), { modes: ['minor'] });
  const reading = mapping.read(0, 1);

  t.like(next(t, uffd).at(0), { type: 'fault', kind: 'minor', write: false });
  uffd.continue(mapping.range(0, PAGE));

  t.deepEqual([...(await reading)], [6]);
  t.throws(() => uffd.continue(mapping.range(PAGE, PAGE)), { code: 'ERR_UFFD_SYSTEM' });
  t.is(uffd.tryContinue(mapping.range(0, PAGE)), -EEXIST);
});

inEveryWay('writes to protected pages are told, and go on when the protection is taken off', async t => {
  const made = registered(t, 2, ['missing', 'write-protect']);
  if (!made) return;
  const { uffd, mapping } = made;
  uffd.copy(mapping.range(0, PAGE), pageOf(1), { writeProtect: true });
  uffd.zero(mapping.range(PAGE, PAGE));
  uffd.writeProtect(mapping.range(PAGE, PAGE));
  const writing = mapping.write(PAGE - 1, Buffer.from([8, 9]));

  for (const page of [0, 1]) {
    const batch = next(t, uffd);
    t.like(batch.at(0), {
      kind: 'write-protect',
      write: true,
      address: mapping.address + BigInt(page * PAGE),
    });
    uffd.writeProtect(mapping.range(page * PAGE, PAGE), { protect: false });
  }

  await writing;
  t.deepEqual([...(await mapping.read(PAGE - 1, 2))], [8, 9]);
});

inEveryWay('pages are moved without copying, and holes are passed over when allowed', async t => {
  const made = registered(t, 4, ['missing'], { require: ['move'] });
  if (!made) return;
  const { uffd, mapping } = made;
  const source = mapped(t, MemoryMapping.anonymous(4 * PAGE, { pages: 'small' }));
  source.writeSync(0, pageOf(3));
  source.writeSync(2 * PAGE, pageOf(4));

  t.is(uffd.tryMove(mapping.range(PAGE, PAGE), source.range(PAGE, PAGE)), -ENOENT);
  uffd.move(mapping.range(), source.range(), { allowSourceHoles: true });

  t.deepEqual(source.residency(), ['absent', 'absent', 'absent', 'absent']);
  uffd.zero(mapping.range(), { onPresent: 'skip' });
  t.deepEqual([...(await mapping.read(0, 1)), ...(await mapping.read(2 * PAGE, 1))], [3, 4]);
});

inEveryWay('huge pages are filled whole; zeros are copied where the kernel has no zero page', async t => {
  if (!canRun(t) || !reserveHugePages(t, 2)) return;
  const uffd = make(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(4 * MiB, { pages: 2 * MiB }));
  uffd.register(mapping.range(), { modes: ['missing'] });
  const reading = mapping.read(3 * MiB, 1);
  const batch = next(t, uffd);

  t.is(uffd.tryZero(mapping.range(0, 2 * MiB)), -EINVAL);
  uffd.zero(mapping.range(2 * MiB, 2 * MiB));
  uffd.copy(mapping.range(0, 2 * MiB), Buffer.alloc(2 * MiB, 5));

  t.is(mapping.pageSize, 2 * MiB);
  t.deepEqual(batch.page(0, 2 * MiB), { address: mapping.address + BigInt(2 * MiB), length: 2 * MiB });
  t.deepEqual([...(await reading), ...(await mapping.read(0, 1))], [0, 5]);
});

inEveryWay('modes of one range add up', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const { uffd, mapping } = made;

  uffd.register(mapping.range(), { modes: ['write-protect'] });
  const writing = mapping.write(0, Buffer.from([1]));
  const missing = next(t, uffd);
  uffd.copy(mapping.range(), pageOf(0), { writeProtect: true });
  const protectedPage = next(t, uffd);
  uffd.writeProtect(mapping.range(), { protect: false });

  await writing;
  t.deepEqual([missing.kind(0), protectedPage.kind(0)], ['missing', 'write-protect']);
});

inEveryWay('a registration that lacks a required ioctl is undone', t => {
  const uffd = make(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));

  t.throws(() => uffd.register(mapping.range(), { modes: ['missing'], requireIoctls: ['continue'] }), {
    code: 'ERR_UFFD_UNSUPPORTED',
    message: /continue/,
  });

  t.is(uffd.tryZero(mapping.range()), -ENOENT);
});

inEveryWay('exact addresses and thread ids are told only where they were asked for', async t => {
  const plain = registered(t, 1, ['missing'], { threadId: false });
  if (!plain || !make(t, { require: ['exact-address', 'thread-id'] })) return;
  // Touched by a worker itself, because a read that the kernel does has the address of a page.
  const worker = new Worker(join(import.meta.dirname, 'fixtures', 'touching.js'), {
    workerData: { way: wayOf(t) },
  });
  t.teardown(async () => worker.terminate());
  const [fd] = (await once(worker, 'message')) as [number];
  const uffd = Userfaultfd.adopt(fd);
  t.teardown(() => uffd.close({ waiting: 'zero' }));
  const exact = next(t, uffd);
  const reading = plain.mapping.read(123, 1);
  const rounded = next(t, plain.uffd);

  t.is(exact.address(0) % BigInt(PAGE), 123n);
  t.true(((exact.at(0) as { threadId?: number }).threadId ?? 0) > 0);
  t.is(exact.page(0).address, exact.address(0) - 123n);
  t.is(rounded.address(0), plain.mapping.address);
  t.false('threadId' in rounded.at(0));

  const touched = once(worker, 'message');
  t.is(uffd.tryCopy(exact.page(0), pageOf(7)), PAGE);
  plain.uffd.zero(plain.mapping.range());
  t.deepEqual([await touched, [...(await reading)]], [[7], [0]]);
});

inEveryWay('discarded memory is told before it is gone', async t => {
  const made = registered(t, 4, ['missing'], { require: ['event-remove'] });
  if (!made) return;
  const { uffd, mapping } = made;
  uffd.zero(mapping.range());
  const discarding = mapping.discard(PAGE, 2 * PAGE);

  const batch = next(t, uffd);
  await discarding;

  const start = mapping.address + BigInt(PAGE);
  t.deepEqual(batch.at(0), { type: 'remove', start, end: start + BigInt(2 * PAGE) });
  t.deepEqual(mapping.residency(), ['present', 'absent', 'absent', 'present']);
});

inEveryWay('closing is refused while threads wait, until it is said what they get', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const { uffd, mapping } = made;
  const reading = mapping.read(0, 1);
  next(t, uffd);

  const error = t.throws(() => uffd.close(), { code: 'ERR_UFFD_FAULTS_WAITING' });
  t.regex((error as { hint?: string }).hint ?? '', /poison/);
  t.false(uffd.closed);
  t.throws(() => mapping.close(), { code: 'ERR_UFFD_FAULTS_WAITING' });
  uffd.close({ waiting: 'zero' });

  t.deepEqual([...(await reading)], [0]);
  t.true(uffd.closed);
  t.throws(() => uffd.isDead(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

inEveryWay('closing with poison leaves errors and no zeros behind', async t => {
  const made = registered(t, 3, ['missing'], { require: ['poison'] });
  if (!made) return;
  const { uffd, mapping } = made;
  uffd.copy(mapping.range(PAGE, PAGE), pageOf(1));

  uffd.close({ waiting: 'poison' });

  t.deepEqual(mapping.residency(), ['noted', 'present', 'noted']);
});

inEveryWay('a clone keeps the userfaultfd open, and a released descriptor can be adopted', async t => {
  const made = registered(t, 2);
  if (!made) return;
  const { uffd, mapping } = made;
  const clone = uffd.clone();
  uffd.close();
  const reading = mapping.read(0, 1);
  next(t, clone);
  clone.copy(mapping.range(0, PAGE), pageOf(4));
  t.deepEqual([...(await reading)], [4]);

  const fd = clone.releaseFd();
  t.throws(() => clone.fd, { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  const adopted = Userfaultfd.adopt(fd);
  t.teardown(() => adopted.close({ waiting: 'zero' }));

  t.is(adopted.supportedFeatures, undefined);
  t.is(adopted.tryCopy(mapping.range(PAGE, PAGE), pageOf(5)), PAGE);
  t.false(adopted.isDead());
});

test('what is no userfaultfd is not adopted and stays open', t => {
  if (!canRun(t)) return;
  const fd = openSync('/dev/null', 'r');
  t.throws(() => Userfaultfd.adopt(fd), { code: 'ERR_UFFD_PROTOCOL' });
  t.notThrows(() => closeSync(fd));
  t.throws(() => Userfaultfd.adopt(fd), { code: 'ERR_UFFD_SYSTEM', message: /fcntl/ });
});

inEveryWay('many ranges are registered in one call and unregistered in one', async t => {
  const first = make(t);
  const second = make(t);
  if (!first || !second) return;
  const [a, b] = [4, 2].map(pages => mapped(t, MemoryMapping.anonymous(pages * PAGE))) as [
    MemoryMapping,
    MemoryMapping,
  ];
  const targets = [
    { uffd: first, ranges: [a.range(0, PAGE), a.range(2 * PAGE, PAGE)] },
    { uffd: second, ranges: [b.range()] },
  ];

  t.deepEqual(registerRegions(targets, { modes: ['missing'] }), []);
  t.deepEqual(
    [0, 1, 2].map(page => first.tryZero(a.range(page * PAGE, PAGE))),
    [PAGE, -ENOENT, PAGE],
  );
  const reading = b.read(0, 1);
  next(t, second);
  t.deepEqual(unregisterRegions(targets), []);

  t.deepEqual([...(await reading)], [0]);
  const taken = mapped(t, MemoryMapping.anonymous(PAGE));
  second.register(taken.range(), { modes: ['missing'] });
  t.throws(
    () => registerRegions([{ uffd: first, ranges: [a.range(), taken.range()] }], { modes: ['missing'] }),
    { code: 'ERR_UFFD_SYSTEM' },
  );
  t.is(first.tryZero(a.range(3 * PAGE, PAGE)), -ENOENT);
});

test('what the machine can do is told without exceptions', t => {
  const told = capabilities();

  t.is(told.pageSize, PAGE);
  t.regex(told.kernel, /^\d+\.\d+/);
  t.is(told.usable, told.error === undefined);
  if (!told.usable) {
    t.log(`skipped: ${told.error?.message ?? ''}`);
    return;
  }
  t.true(told.ioctls.includes('register') && told.ioctls.includes('api'));
  t.true(told.faults === 'all' || told.faults === 'user');
  t.true(told.hugePages.every(pool => pool.size > told.pageSize && pool.free <= pool.total));
});

inEveryWay('features that are required and missing are named; preferred ones are left out', t => {
  const uffd = make(t, { prefer: ['exact-address', 'event-fork'] });
  if (!uffd) return;
  const has = (name: 'exact-address' | 'event-fork'): boolean =>
    uffd.supportedFeatures?.includes(name) ?? false;

  t.is(uffd.enabledFeatures?.includes('exact-address'), has('exact-address'));
  t.is(uffd.enabledFeatures?.includes('event-fork'), has('event-fork') && capabilities().ptrace);
});

inEveryWay('reading nothing is nothing, and a batch has bounds', t => {
  const made = registered(t, 1);
  if (!made) return;
  const batch = new EventBatch(1);

  t.is(made.uffd.readEvents(batch), 0);
  t.is(made.uffd.waitSync(batch, { timeout: 1 }), 0);
  t.deepEqual([...batch], []);
  t.throws(() => batch.at(0), { code: 'ERR_OUT_OF_RANGE' });
  t.true(made.uffd instanceof PageOperations);
});
