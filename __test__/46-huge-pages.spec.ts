// Huge pages from the pool: every operation in their size, or refused as the kernel refuses it.

import { readFileSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';

import test, { type ExecutionContext } from 'ava';
import { GiB, MemoryMapping, MiB } from 'userfaultfd';

import { inEveryWay, make, mapped, next } from './helpers/faults.js';
import { canRun, reserveHugePages } from './helpers/serving.js';

const { EEXIST, EINVAL } = constants.errno;
const HUGE = 2 * MiB;

inEveryWay('huge pages are copied, zeroed, poisoned and woken whole', async t => {
  if (!canRun(t) || !reserveHugePages(t, 4)) return;
  const uffd = make(t, { require: ['poison', 'missing-hugetlbfs'] });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(4 * HUGE, { pages: HUGE }));
  const page = (index: number): ReturnType<typeof mapping.range> => mapping.range(index * HUGE, HUGE);
  const ioctls = uffd.register(mapping.range(), { modes: ['missing'] });
  const reading = mapping.read(HUGE - 1, 2);

  t.is(next(t, uffd).address(0), mapping.address);
  uffd.copy(page(0), Buffer.alloc(HUGE, 1), { wake: false });
  t.is(uffd.waitingThreads(), 1);
  uffd.wake(page(0));
  t.is(next(t, uffd).address(0), mapping.address + BigInt(HUGE));
  uffd.zero(page(1));
  uffd.poison(page(2));

  t.deepEqual([...(await reading)], [1, 0]);
  t.false(ioctls.includes('zeropage'));
  t.is(uffd.tryZero(page(3)), -EINVAL);
  t.is(uffd.tryMove(page(3), page(0)), -EINVAL);
  t.is(uffd.tryCopy(page(0), Buffer.alloc(HUGE)), -EEXIST);
  await t.throwsAsync(mapping.read(2 * HUGE, 1), { code: 'ERR_UFFD_SYSTEM' });
  t.deepEqual(mapping.residency(), ['present', 'present', 'noted', 'absent']);
  uffd.zero({ address: mapping.address + BigInt(3 * HUGE), length: HUGE });
  t.deepEqual([...(await mapping.read(4 * HUGE - 1, 1))], [0]);
  await mapping.discard(0, HUGE);
  t.deepEqual(mapping.residency(0, HUGE), ['absent']);
});

inEveryWay('huge pages of a memfd are continued and write-protected', async t => {
  if (!canRun(t) || !reserveHugePages(t, 2)) return;
  const uffd = make(t, { require: ['minor-hugetlbfs', 'wp-hugetlbfs-shmem'] });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.memfd(2 * HUGE, { pages: HUGE }));
  const other = mapped(t, MemoryMapping.file(mapping.fd as number, { access: 'shared' }));
  other.writeSync(5, Buffer.from([6]));
  uffd.register(mapping.range(), { modes: ['minor', 'write-protect', 'missing'] });
  const writing = mapping.write(4, Buffer.from([9]));

  t.like(next(t, uffd).at(0), { type: 'fault', kind: 'minor', write: true, address: mapping.address });
  uffd.continue(mapping.range(0, HUGE), { writeProtect: true });
  t.like(next(t, uffd).at(0), { kind: 'write-protect', write: true, address: mapping.address });
  uffd.writeProtect(mapping.range(0, HUGE), { protect: false });

  await writing;
  t.deepEqual([...(await mapping.read(4, 2))], [9, 6]);
  uffd.writeProtect(mapping.range(0, HUGE));
  const again = mapping.write(0, Buffer.from([1]));
  t.is(next(t, uffd).kind(0), 'write-protect');
  t.is(uffd.tryWriteProtect(mapping.range(0, HUGE), { protect: false, wake: false }), HUGE);
  t.is(uffd.waitingThreads(), 1);
  uffd.wake(mapping.range(0, HUGE));
  await again;
});

/** One free page of 1 GiB, given back when the test ends; or the reason logged. */
function reserveGibibyte(t: ExecutionContext): boolean {
  const folder = '/sys/kernel/mm/hugepages/hugepages-1048576kB';
  const figure = (name: string): number => Number(readFileSync(`${folder}/${name}`, 'utf8'));
  try {
    const before = figure('nr_hugepages');
    t.teardown(() => writeFileSync(`${folder}/nr_hugepages`, `${before}`));
    writeFileSync(`${folder}/nr_hugepages`, `${before - figure('free_hugepages') + 1}`);
    if (figure('free_hugepages') === 1) return true;
    t.log('skipped: no page of 1 GiB can be put together now');
  } catch (error) {
    t.log(`skipped: there are no pages of 1 GiB (${String(error)})`);
  }
  t.pass();
  return false;
}

test('a page of 1 GiB is filled whole', async t => {
  if (!canRun(t) || !reserveGibibyte(t)) return;
  const uffd = make(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(1, { pages: GiB }));
  uffd.register(mapping.range(), { modes: ['missing'] });
  const reading = mapping.read(GiB - 1, 1);
  const source = mapped(t, MemoryMapping.anonymous(GiB, { pages: 'transparent' }));
  // Where a part of the source is not there, the kernel wants a second huge page to copy by.
  await source.populate(0, GiB, { write: true });
  source.writeSync(GiB - 1, Buffer.from([7]));

  t.is(next(t, uffd).address(0), mapping.address);
  uffd.copy(mapping.range(), source.range());

  t.is(mapping.pageSize, GiB);
  t.deepEqual([...(await reading)], [7]);
  t.deepEqual(mapping.residency(), ['present']);
  mapping.discardSync();
  uffd.zero(mapping.range());
  t.deepEqual([...(await mapping.read(GiB - 1, 1))], [0]);
});
