// Minor faults: what a session brings to a memfd is there for everybody who maps it, and is brought once.

import { closeSync, fstatSync, openSync, readSync, truncateSync, writeSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  bufferSource,
  callbackSource,
  fileSource,
  KiB,
  MemoryMapping,
  MiB,
  type Pager,
  type ServeOptions,
  type Session,
  type SessionMode,
  zeroSource,
} from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { make, mapped, PAGE, pageOf } from './helpers/faults.js';
import { canRun, counted, folder, image, reserveHugePages } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

const PAGES = 64;
const SIZE = PAGES * PAGE;
const BOTH: SessionMode[] = ['missing', 'minor'];
const ALL: SessionMode[] = [...BOTH, 'write-protect'];
/** Bits of features: remove events and minor faults of shared memory; what write-protecting that needs. */
const [MINOR, WRITE_PROTECT] = [0x408, 0x1001];

/** A memfd being served, and another mapping of it that nobody serves. */
async function served(
  t: ExecutionContext,
  options: Partial<ServeOptions> & Pick<ServeOptions, 'source'>,
  prepare: (mapping: MemoryMapping) => Promise<void> = async () => {},
): Promise<{ mapping: MemoryMapping; other: MemoryMapping; pager: Pager; session: Session } | undefined> {
  if (!canRun(t)) return undefined;
  const mapping = mapped(t, MemoryMapping.memfd(SIZE));
  const other = mapped(t, MemoryMapping.file(mapping.fd as number, { access: 'shared' }));
  await prepare(other);
  const pager = pagerOf(t);
  const session = await pager.serve(mapping, { modes: BOTH, ...options });
  return { mapping, other, pager, session };
}

test('what one fault brings, and the window around it, is there for every mapping of the memfd', async t => {
  const { path, bytes } = image(t, SIZE);
  const made = await served(t, { source: fileSource(path), window: 16 * KiB });
  if (!made) return;
  const { mapping, other, session } = made;
  const { address } = mapping;

  t.true((await mapping.read(9 * PAGE, PAGE)).equals(bytes.subarray(9 * PAGE, 10 * PAGE)));

  // Windows are aligned in addresses.
  const first = 9 - ((Number(address / BigInt(PAGE)) + 9) % 4);
  const window = bytes.subarray(first * PAGE, (first + 4) * PAGE);
  t.true((await other.read(first * PAGE, 4 * PAGE)).equals(window));
  t.true((await other.read((first + 4) * PAGE, PAGE)).equals(pageOf(0)), 'no more than that');
  const stats = await counted(session, 4);
  t.deepEqual(
    [stats.faults, stats.faultsInstalled, stats.pagesInstalled, stats.windows],
    [1, 1, 4, 1],
    JSON.stringify(stats),
  );
});

test('minor faults count like others, and bring a window as well', async t => {
  const { path, bytes } = image(t, SIZE);
  // All there, and wrong.
  const made = await served(
    t,
    { source: fileSource(path), modes: ['minor'], window: 64 * KiB },
    async other => other.write(0, pageOf(0xee, PAGES)),
  );
  if (!made) return;
  const { mapping, other, session } = made;

  t.true((await mapping.read(0, SIZE)).equals(bytes));

  t.true((await other.read(0, SIZE)).equals(bytes));
  const stats = await counted(session, PAGES);
  t.is(stats.pagesInstalled, PAGES);
  t.true(stats.faultsInstalled <= stats.windows && stats.windows <= 5, JSON.stringify(stats));
  t.is((await session.close()).reason, 'closed');
});

test('a page that was brought is everybody’s to write to, and is never brought again', async t => {
  let asked = 0;
  const source = callbackSource(
    (_, length) => {
      asked += 1;
      return new Uint8Array(length).fill(7);
    },
    { size: SIZE, chunk: SIZE },
  );
  const made = await served(t, { source, window: 64 * KiB });
  if (!made) return;
  const { mapping, other, session } = made;
  await mapping.read(0, SIZE);
  const brought = asked;

  await other.write(3 * PAGE, Buffer.from('by the other'));
  await mapping.write(4 * PAGE, Buffer.from('by this one'));
  await mapping.discard(5 * PAGE, PAGE);

  t.is((await mapping.read(3 * PAGE, 12)).toString(), 'by the other');
  t.is((await other.read(4 * PAGE, 11)).toString(), 'by this one');
  t.true((await mapping.read(5 * PAGE, PAGE)).equals(pageOf(0)), 'discarded');
  await other.write(5 * PAGE, Buffer.from('anew'));
  await mapping.discard(6 * PAGE, PAGE);
  await other.write(6 * PAGE, Buffer.from('since'));
  t.is((await mapping.read(6 * PAGE, 5)).toString(), 'since', 'a minor fault that needs no source');
  t.is(asked, brought);
  t.true((await session.close({ rest: 'populate' })).reason === 'closed');
});

test('closing can populate: then all of the memfd is right', async t => {
  const { path, bytes } = image(t, SIZE);
  const made = await served(t, { source: fileSource(path) });
  if (!made) return;
  await made.mapping.read(40 * PAGE, 1);

  await made.session.close({ rest: 'populate' });

  t.true((await made.other.read(0, SIZE)).equals(bytes));
});

test('writes are tracked together with minor faults', async t => {
  const { path, bytes } = image(t, SIZE);
  const made = await served(t, { source: fileSource(path), modes: ALL });
  if (!made) return;
  const { mapping, other, session } = made;
  await mapping.read(0, SIZE / 2);
  t.deepEqual((await session.takeDirty()).ranges, []);

  await mapping.write(2 * PAGE, Buffer.from('there'));
  await mapping.write(50 * PAGE, Buffer.from('brought for this'));
  // No fault of the mapping that is served: nobody is told of it.
  await other.write(3 * PAGE, Buffer.from('unseen'));

  const dirty = async (): Promise<unknown[]> =>
    (await session.takeDirty()).ranges.map(range => [(range.sourceOffset ?? 0) / PAGE, range.length / PAGE]);
  t.deepEqual(await dirty(), [
    [2, 1],
    [50, 1],
  ]);
  t.deepEqual(await dirty(), []);
  const expected = Buffer.from(bytes);
  expected.write('there', 2 * PAGE);
  expected.write('brought for this', 50 * PAGE);
  expected.write('unseen', 3 * PAGE);
  t.true((await mapping.read(0, SIZE)).equals(expected));
});

for (const [what, onFailure] of [
  ['poisoned', 'poison'],
  ['the end of the process', 'kill'],
] as const) {
  test(`what cannot be had of another process is ${what}, also where the memfd has something`, async t => {
    if (!canRun(t)) return;
    const { path } = image(t, SIZE);
    const features = MINOR.toString(16);
    const { peer, uffd, memfd, pidfd, regions } = await handedOver(
      t,
      `--region ${SIZE} --memfd --fd memfd --modes missing,minor --features ${features}`,
    );
    writeSync(memfd as number, pageOf(0xee), 0, PAGE, 20 * PAGE);
    const source = fileSource(path);
    const adopted = { regions, memfd: memfd as number, pidfd, source, onFailure, modes: BOTH };
    const session = await pagerOf(t).adopt(uffd, adopted);
    truncateSync(path, 0);

    if (onFailure === 'kill') {
      peer.send('probe', 20 * PAGE);
      t.is((await peer.ended).signal, 'SIGKILL');
    } else {
      t.is((await peer.ask('probe', 20 * PAGE)).result, 'efault');
      t.is((await peer.ask('probe', 21 * PAGE)).result, 'efault');
    }
    const { reason, error } = await session.closed;
    t.deepEqual([reason, error?.code], ['source-failed', 'ERR_UFFD_SOURCE']);
  });
}

test('memory of another process is brought to its memfd, wherever its regions lie in it', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, MiB);
  const features = (MINOR | WRITE_PROTECT).toString(16);
  const { peer, uffd, memfd, pidfd, regions } = await handedOver(
    t,
    // In the memfd one behind the other: not where they are in the image, nor where their addresses are.
    `--region 128K:512K --region 64K:0 --reverse --memfd --fd memfd --modes missing,minor,write-protect --features ${features}`,
  );
  const here = mapped(t, MemoryMapping.file(memfd as number, { access: 'shared' }));
  const source = fileSource(path);
  const session = await pagerOf(t).adopt(uffd, {
    regions,
    memfd: memfd as number,
    pidfd,
    source,
    modes: ALL,
  });
  t.true(uffd.closed);
  t.is(session.peer.pid, peer.pid);

  t.is((await peer.ask('compare', path)).different, 0);

  const expected = Buffer.concat([bytes.subarray(512 * KiB, 640 * KiB), bytes.subarray(0, 64 * KiB)]);
  t.true((await here.read(0, 192 * KiB)).equals(expected));
  await here.write(128 * KiB, Buffer.from('from here'));
  t.is((await peer.ask('read', 0, 9)).hex, Buffer.from('from here').toString('hex'));
  await peer.ask('write', 516 * KiB, Buffer.from('from there').toString('hex'));
  t.is((await here.read(4 * KiB, 10)).toString(), 'from there');
  const { ranges } = await session.takeDirty();
  t.deepEqual(
    ranges.map(({ sourceOffset, length }) => [sourceOffset, length]),
    [[516 * KiB, PAGE]],
  );
  await peer.ask('discard', 520 * KiB, PAGE);
  t.true((await here.read(8 * KiB, PAGE)).equals(pageOf(0)));
  t.is((await peer.ask('zeros')).nonzero, 0);
  await peer.exit();
  t.is((await session.closed).reason, 'peer-exited');
  t.is(fstatSync(memfd as number).size, 192 * KiB, 'the descriptor is still the caller’s');
});

test('a memfd that is not what the process has mapped ends the session, and nothing reads zero', async t => {
  if (!canRun(t)) return;
  const { path } = image(t, SIZE);
  const features = MINOR.toString(16);
  const { peer, uffd, pidfd, regions } = await handedOver(
    t,
    `--region ${SIZE} --memfd --modes missing,minor --features ${features}`,
  );
  const wrong = mapped(t, MemoryMapping.memfd(SIZE));
  const session = await pagerOf(t).adopt(uffd, {
    regions: regions.map(region => ({ ...region, memfdOffset: 0 })),
    memfd: wrong.fd as number,
    pidfd,
    source: fileSource(path),
    modes: BOTH,
  });

  t.is((await peer.ask('probe', 5 * PAGE)).result, 'efault');

  const { reason, error } = await session.closed;
  t.is(reason, 'protocol');
  t.regex(error?.message ?? '', /mapped something else/);
  t.is((await peer.ask('probe', 50 * PAGE)).result, 'efault');
});

test('memory that no memfd can be brought to is refused by name, and is not registered', async t => {
  if (!canRun(t)) return;
  const pager = pagerOf(t);
  const source = zeroSource(2 * MiB);
  const file = join(folder(t), 'file');
  closeSync(openSync(file, 'w'));
  truncateSync(file, PAGE);
  const rows: [MemoryMapping, RegExp][] = [
    [MemoryMapping.anonymous(PAGE), /minor faults of memory without a memfd: they need a shared mapping/],
    [MemoryMapping.anonymous(PAGE, { shared: true }), /memory without a memfd/],
    [MemoryMapping.memfd(PAGE, { shared: false }), /a private mapping/],
    [MemoryMapping.file(file), /memory without a memfd/],
  ];
  if (reserveHugePages(t, 1)) rows.push([MemoryMapping.memfd(2 * MiB, { pages: 2 * MiB }), /huge pages/]);
  for (const [mapping, message] of rows) {
    mapped(t, mapping);
    await t.throwsAsync(pager.serve(mapping, { source, modes: BOTH }), {
      code: 'ERR_UFFD_UNSUPPORTED',
      message,
    });
    t.true((await mapping.read(0, PAGE)).equals(pageOf(0)), 'nobody serves it');
    mapping.close();
  }

  const holes = mapped(t, MemoryMapping.memfd(SIZE));
  await holes.write(0, pageOf(1, PAGES - 1));
  await t.throwsAsync(pager.serve(holes, { source, modes: ['minor'] }), {
    code: 'ERR_UFFD_PROTOCOL',
    message: /holes.*the kernel would fill with zeros/,
  });
});

test('wrong memfds, and options that do not go together, are named', async t => {
  const pager = pagerOf(t);
  const uffd = make(t, { require: ['minor-shmem'] });
  if (!uffd) return;
  type Loose = never;
  const [TYPE, VALUE, RANGE] = ['ERR_INVALID_ARG_TYPE', 'ERR_INVALID_ARG_VALUE', 'ERR_OUT_OF_RANGE'];
  const mapping = mapped(t, MemoryMapping.memfd(SIZE));
  const memfd = mapping.fd as number;
  const region = { address: mapping.address, length: SIZE, sourceOffset: 0 };
  const inMemfd = { ...region, memfdOffset: 0 };
  const minor = { source: bufferSource(Buffer.alloc(SIZE, 1)), modes: BOTH };
  const { source } = minor;
  const rows: [object, string, RegExp][] = [
    [{ ...minor, regions: [inMemfd] }, VALUE, /Expected `options.memfd`: with the mode 'minor'/],
    [{ source, regions: [region], memfd }, VALUE, /`options.modes` to have 'minor' with `options.memfd`/],
    [
      { ...minor, regions: [inMemfd, region], memfd },
      VALUE,
      /`options.regions\[1\].memfdOffset` to be given/,
    ],
    [{ source, regions: [inMemfd] }, VALUE, /`options.regions\[0\].memfdOffset` not to be given/],
    [
      { ...minor, regions: [{ ...region, memfdOffset: -1 }], memfd },
      RANGE,
      /`options.regions\[0\].memfdOffset`/,
    ],
    [{ ...minor, regions: [inMemfd], memfd: 'fd' }, TYPE, /`options.memfd`/],
    [{ ...minor, modes: ['major'], regions: [inMemfd], memfd }, VALUE, /`options.modes\[0\]`/],
    [{ ...minor, regions: [inMemfd], memfd: 99_999 }, 'ERR_UFFD_SYSTEM', /fcntl/],
  ];
  for (const [options, code, message] of rows) {
    await t.throwsAsync(pager.adopt(uffd, options as Loose), { code, message }, String(message));
    t.false(uffd.closed);
    t.notThrows(() => uffd.register(mapping.range(), { modes: ['missing', 'minor'] }), 'it is as it was');
  }
  await t.throwsAsync(pager.serve(mapping, { ...minor, memfd } as Loose), {
    code: VALUE,
    message: /`memfd`/,
  });

  const path = join(folder(t), 'file');
  closeSync(openSync(path, 'w'));
  truncateSync(path, SIZE);
  const [disk, readOnly] = [openSync(path, 'r+'), openSync(`/proc/self/fd/${memfd}`, 'r')];
  t.teardown(() => [disk, readOnly].forEach(fd => closeSync(fd)));
  // What only the native side can see, while a thread waits: it is never answered by that.
  uffd.register(mapping.range(), { modes: ['missing', 'minor'] });
  const waiting = mapping.read(PAGE, PAGE);
  t.true(await uffd.wait({ timeout: 10_000 }));
  const refused: [object, string, RegExp][] = [
    [{ memfd: disk }, 'ERR_UFFD_PROTOCOL', /it is none, nor a file of tmpfs/],
    [{ memfd: readOnly }, 'ERR_UFFD_PROTOCOL', /open for reading only/],
    [{ memfd, regions: [{ ...region, memfdOffset: PAGE }] }, 'ERR_UFFD_REGION', /offset 0x1000 in its memfd/],
    [{ memfd, regions: [{ ...region, memfdOffset: 1 }] }, 'ERR_UFFD_REGION', /unaligned/],
  ];
  for (const [options, code, message] of refused) {
    const given = { ...minor, regions: [inMemfd], ...options };
    await t.throwsAsync(pager.adopt(uffd, given as Loose), { code, message }, String(message));
    t.false(uffd.closed);
  }
  await pager.adopt(uffd, { ...minor, regions: [inMemfd], memfd });
  t.true((await waiting).equals(pageOf(1)));
  const byte = Buffer.alloc(1, 7);
  readSync(disk, byte, 0, 1, 0);
  t.is(byte[0], 0, 'nothing was written');
});
