// Memory: what it can be made of, reading and writing it, giving it back, and what was written.

import { constants as buffer } from 'node:buffer';
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';

import test from 'ava';
import { capabilities, GiB, MemoryMapping, MiB } from 'userfaultfd';

import { inEveryWay, make, mapped, PAGE, pageOf, registered } from './helpers/faults.js';
import { folder, reserveHugePages } from './helpers/serving.js';

test('memory is whole pages, reads zero, and keeps what is written', async t => {
  for (const mapping of [
    MemoryMapping.anonymous(PAGE + 1),
    MemoryMapping.anonymous(PAGE + 1, { shared: true, pages: 'small' }),
    MemoryMapping.anonymous(PAGE + 1, { pages: 'transparent' }),
    MemoryMapping.memfd(PAGE + 1, { name: 'test', sealed: false }),
  ]) {
    mapped(t, mapping);
    t.is(mapping.length, 2 * PAGE);
    t.is(mapping.pageSize, PAGE);
    await mapping.write(PAGE - 2, new Uint16Array([1, 2]));
    t.deepEqual([...(await mapping.read(PAGE - 3, 6))], [0, 1, 0, 2, 0, 0]);
    await mapping.discard();
    t.deepEqual(mapping.residency(), ['absent', 'absent']);
  }
});

test('what a private mapping of a memfd gives back is the memfd’s again', async t => {
  const mapping = mapped(t, MemoryMapping.memfd(2 * PAGE, { shared: false }));
  await mapping.write(0, pageOf(1));

  await mapping.discard();

  t.deepEqual(mapping.residency(), ['cached', 'absent']);
  t.deepEqual([...(await mapping.read(0, 1))], [0]);
});

test('behind the end of a file that was cut short, reading and writing are errors', t => {
  const path = join(folder(t), 'file');
  writeFileSync(path, pageOf(1, 4));
  // In a process of its own: a signal would end it.
  const program = `
    import { truncateSync } from 'node:fs';
    import { MemoryMapping } from 'userfaultfd';
    const mapping = MemoryMapping.file(process.argv[1], { access: 'shared' });
    truncateSync(process.argv[1], ${PAGE} + 1);
    const errno = error => error.errno;
    const found = [
      (await mapping.read(0, ${PAGE} + 2)).subarray(-2),
      await mapping.read(2 * ${PAGE} - 1, 2).catch(errno),
      await mapping.write(3 * ${PAGE}, Buffer.from('bytes')).catch(errno),
    ];
    process.stdout.write(JSON.stringify(found));
  `;
  const output = execFileSync(process.execPath, ['--input-type=module', '-e', program, path], {
    encoding: 'utf8',
    timeout: 30_000,
    cwd: join(import.meta.dirname, '..', '..'),
  });

  const { EFAULT } = constants.errno;
  t.deepEqual(JSON.parse(output), [{ type: 'Buffer', data: [1, 0] }, EFAULT, EFAULT]);
});

test('a file is mapped for reading, for writing to a copy, and for writing', async t => {
  const path = join(folder(t), 'file');
  writeFileSync(path, pageOf(1, 2));
  const reading = mapped(t, MemoryMapping.file(path));
  const copying = mapped(t, MemoryMapping.file(path, { access: 'copy-on-write' }));
  const writing = mapped(t, MemoryMapping.file(path, { access: 'shared', offset: PAGE }));

  await t.throwsAsync(reading.write(0, Buffer.from([9])), { code: 'ERR_UFFD_SYSTEM' });
  await copying.write(PAGE, Buffer.from([8]));
  await writing.write(1, Buffer.from([7]));

  t.is(writing.length, PAGE);
  t.deepEqual([...(await reading.read(PAGE, 3))], [1, 7, 1]);
  t.deepEqual([...(await copying.read(PAGE, 1))], [8]);
  t.throws(() => MemoryMapping.file(path, { offset: 0, length: 3 * PAGE }), { code: 'ERR_UFFD_SYSTEM' });
  t.throws(() => MemoryMapping.file(join(path, 'none')), { message: /open/ });
});

test('huge pages come from the pool, and one that is empty is named', t => {
  if (!reserveHugePages(t, 1)) return;
  const mapping = mapped(t, MemoryMapping.memfd(1, { pages: 2 * MiB }));

  t.is(mapping.length, 2 * MiB);
  t.throws(() => mapping.range(0, PAGE), { code: 'ERR_OUT_OF_RANGE' });
  t.throws(() => MemoryMapping.anonymous(4 * MiB, { pages: 2 * MiB }), {
    code: 'ERR_UFFD_EXHAUSTED',
    message: /nr_hugepages/,
  });
});

test('more bytes at once than a buffer can have are refused', async t => {
  const mapping = mapped(t, MemoryMapping.anonymous(5 * GiB));
  const most = buffer.MAX_LENGTH;
  if (most >= mapping.length) return t.log('skipped: here a buffer can have as many bytes as memory');

  await t.throwsAsync(mapping.read(0, most + 1), {
    code: 'ERR_OUT_OF_RANGE',
    message: /`length`.*4294967297/,
  });
});

test('mappings of more than 4 GiB are named by offset', async t => {
  const mapping = mapped(t, MemoryMapping.anonymous(6 * GiB));

  await mapping.write(5 * GiB, Buffer.from([1, 2]));

  t.deepEqual([...(await mapping.read(5 * GiB - 1, 3))], [0, 1, 2]);
  t.deepEqual(mapping.residency(5 * GiB - PAGE, 3 * PAGE).at(1), 'present');
});

inEveryWay('reads that wait leave the event loop and other file work alone', async t => {
  const made = registered(t, 8);
  if (!made) return;
  const { uffd, mapping } = made;
  const waiting = Array.from({ length: 8 }, (_, page) => mapping.read(page * PAGE, 1));

  const path = join(folder(t), 'other');
  const { readFile, writeFile } = await import('node:fs/promises');
  await writeFile(path, 'done');
  t.is(await readFile(path, 'utf8'), 'done');
  uffd.zero(mapping.range());

  t.deepEqual(
    (await Promise.all(waiting)).map(bytes => bytes[0]),
    Array.from({ length: 8 }, () => 0),
  );
});

inEveryWay('what was written since it was protected is found once', async t => {
  const uffd = make(t, { require: ['wp-async'] });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(16 * PAGE, { pages: 'small' }));
  uffd.register(mapping.range(), { modes: ['write-protect'] });
  uffd.writeProtect(mapping.range());
  for (const page of [1, 2, 9]) await mapping.write(page * PAGE, Buffer.from([1]));
  const offsets = (found: ReturnType<MemoryMapping['writtenPages']>): number[][] =>
    found.ranges.map(({ offset, length }) => [offset / PAGE, length / PAGE]);

  const limited = mapping.writtenPages({ maxPages: 2 });
  t.deepEqual(offsets(limited), [[1, 2]]);
  t.deepEqual(offsets(mapping.writtenPages({ offset: limited.next })), [[9, 1]]);
  t.deepEqual(offsets(mapping.writtenPages({ protect: true })), [
    [1, 2],
    [9, 1],
  ]);
  t.deepEqual(mapping.writtenPages(), { ranges: [], next: mapping.length });

  const other = mapped(t, MemoryMapping.anonymous(PAGE));
  t.throws(() => other.writtenPages(), { code: 'ERR_UFFD_NOT_REGISTERED' });
});

inEveryWay(
  'the hot form of the dirty scan fills one array, says where to go on, and keeps what it has protected',
  async t => {
    const uffd = make(t, { require: ['wp-async'] });
    if (!uffd) return;
    const mapping = mapped(t, MemoryMapping.anonymous(16 * PAGE, { pages: 'small' }));
    uffd.register(mapping.range(0, 12 * PAGE), { modes: ['write-protect'] });
    uffd.writeProtect(mapping.range(0, 12 * PAGE));
    for (const page of [1, 2, 5, 9]) await mapping.write(page * PAGE, Buffer.from([1]));
    const into = new Float64Array(5);
    const scan = (first: number, pages: number, protect: boolean): number =>
      mapping.tryWrittenPages(into, first * PAGE, pages * PAGE, protect);
    const pages = (count: number): number[] => Array.from(into.subarray(0, count), number => number / PAGE);

    t.is(scan(0, 12, false), 2);
    t.deepEqual(pages(5), [9, 1, 2, 5, 1], 'full: goes on with the next');
    t.is(scan(9, 3, false), 1);
    t.deepEqual(pages(5), [12, 9, 1, 0, 0]);
    t.is(scan(3, 13, true), -1, 'EPERM: the end is not tracked');
    t.deepEqual(pages(5).slice(1), [5, 1, 9, 1], 'what was protected before that is not lost');
    t.is(scan(0, 12, true), 1);
    t.deepEqual(pages(5), [12, 1, 2, 0, 0]);
    t.is(scan(0, 12, true), 0);

    t.throws(() => mapping.tryWrittenPages(new Float64Array(2)), { code: 'ERR_INVALID_ARG_TYPE' });
    t.throws(() => mapping.tryWrittenPages(new Uint8Array(64) as unknown as Float64Array), {
      code: 'ERR_INVALID_ARG_TYPE',
    });
    t.throws(() => mapping.tryWrittenPages(into, 1), { code: 'ERR_OUT_OF_RANGE' });
  },
);

inEveryWay('populating makes pages present, closing is final', async t => {
  const mapping = mapped(t, MemoryMapping.anonymous(2 * PAGE));
  await mapping.populate(PAGE, PAGE, { write: true });
  t.deepEqual(mapping.residency(), ['absent', 'present']);

  mapping.close();
  mapping.close();

  t.true(mapping.closed);
  t.throws(() => mapping.range(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  await t.throwsAsync(mapping.read(0, 1), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

inEveryWay('a mapping that is registered is unregistered when it is closed', t => {
  const made = registered(t, 1);
  if (!made) return;
  made.mapping.close();
  // The addresses may be anybody's by now; nothing of the mapping is registered there.
  t.false(made.uffd.isDead());
  t.is(capabilities().pageSize, PAGE);
  made.uffd.close();
});
