// Sources that are native, alone and over one another, for memory of this process and for servers.

import { execFileSync } from 'node:child_process';
import { openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  bufferSource,
  callbackSource,
  fileSource,
  layeredSource,
  MemoryMapping,
  overlaySource,
  Pager,
  type PageSource,
  zeroSource,
} from 'userfaultfd';

import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { canRun, counted, folder, image, IMAGE_SIZE, serving } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

const PAGES = 32;
const SIZE = PAGES * PAGE;

/** What memory of this process reads that is served from a source, and how many pages of it were zeros of the source. */
async function read(
  t: ExecutionContext,
  source: PageSource,
): Promise<{ bytes: Buffer; zero: number } | undefined> {
  if (!canRun(t)) return undefined;
  const mapping = mapped(t, MemoryMapping.anonymous(SIZE));
  const pager = pagerOf(t);
  const session = await pager.serve(mapping, { source });
  const bytes = await mapping.read(0, SIZE);
  await session.close({ rest: 'populate' });
  return { bytes, zero: session.stats().pagesZero };
}

test('bytes of this process are copied when the source is made', async t => {
  const bytes = Buffer.alloc(SIZE, 3);
  const source = bufferSource(bytes);
  bytes.fill(9);

  const got = await read(t, source);

  if (got) t.true(got.bytes.equals(Buffer.alloc(SIZE, 3)));
});

test('pages that are zero in the source are zero pages, and counted as such', async t => {
  const bytes = Buffer.alloc(SIZE);
  bytes.fill(1, 8 * PAGE, 9 * PAGE);

  const zeros = await read(t, zeroSource(SIZE));
  const mixed = await read(t, bufferSource(bytes));

  if (!zeros || !mixed) return;
  t.true(zeros.bytes.equals(Buffer.alloc(SIZE)));
  t.is(zeros.zero, PAGES);
  t.true(mixed.bytes.equals(bytes));
  t.true(mixed.zero > 0 && mixed.zero < PAGES, `${mixed.zero} zero pages`);
});

test('a file is read past the page cache all the same', async t => {
  const { path, bytes } = image(t, SIZE);

  const got = await read(t, fileSource(path, { direct: true }));

  if (got) t.true(got.bytes.equals(bytes));
});

test('diffs lie over a base, the later ones on top, and their holes show what is below', async t => {
  const base = image(t, SIZE);
  const paths = ['low', 'high'].map(name => join(folder(t), name));
  const [low, high] = paths as [string, string];
  for (const path of paths) execFileSync('truncate', ['-s', `${SIZE}`, path]);
  for (const [path, page, byte] of [
    [low, 3, 0x11],
    [low, 4, 0x11],
    [high, 4, 0x22],
  ] as const) {
    writeSync(openSync(path, 'r+'), pageOf(byte), 0, PAGE, page * PAGE);
  }

  const got = await read(t, layeredSource(fileSource(base.path), [low, high]));

  if (!got) return;
  const expected = Buffer.from(base.bytes);
  expected.fill(0x11, 3 * PAGE, 4 * PAGE);
  expected.fill(0x22, 4 * PAGE, 5 * PAGE);
  t.true(got.bytes.equals(expected));
});

test('a few bytes lie over a shared image, each clone its own', async t => {
  const { path, bytes } = image(t, SIZE);
  const shared = fileSource(path);
  for (const name of ['first clone', 'second']) {
    const got = await read(
      t,
      overlaySource(shared, [
        { offset: PAGE - 3, data: Buffer.from(name) },
        { offset: SIZE - 1, data: new Uint8Array([7]) },
      ]),
    );
    if (!got) return;
    const expected = Buffer.from(bytes);
    expected.write(name, PAGE - 3);
    expected[SIZE - 1] = 7;
    t.true(got.bytes.equals(expected), name);
  }
});

test('a callback serves under overlays, too', async t => {
  const source = callbackSource((_, length) => new Uint8Array(length).fill(5), { size: SIZE });

  const got = await read(t, overlaySource(source, [{ offset: 10, data: new Uint8Array([1, 2]) }]));

  t.deepEqual(got && [...got.bytes.subarray(9, 13)], got && [5, 1, 2, 5]);
});

test('one socket serves sources: one for all, or one for each process', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, IMAGE_SIZE);
  const shared = fileSource(path);
  const mine = overlaySource(shared, [{ offset: 16, data: Buffer.from('identity') }]);
  const one = await serving(t, { memory: mine });
  const asked = await serving(t, {
    memory: ({ regions }) => ({ memory: regions.length > 0 ? mine : shared }),
  });

  for (const { connect } of [one, asked]) {
    const { peer, session } = await connect();
    const { hex } = await peer.ask('read', 0, 32);
    const expected = Buffer.from(bytes.subarray(0, 32));
    expected.write('identity', 16);
    t.is(hex, expected.toString('hex'));
    t.true((await counted(session, 1)).pagesInstalled > 0);
  }
});

test('sources that cannot be are refused by name', async t => {
  type Loose = never;
  const source = zeroSource(SIZE);
  const file = join(folder(t), 'short');
  writeFileSync(file, 'x');
  const [TYPE, VALUE, RANGE] = ['ERR_INVALID_ARG_TYPE', 'ERR_INVALID_ARG_VALUE', 'ERR_OUT_OF_RANGE'];
  const rows: [() => unknown, string, RegExp][] = [
    [() => fileSource('x', { directly: true } as Loose), VALUE, /`directly`/],
    [() => fileSource('x', { direct: 1 as Loose }), TYPE, /`options.direct`/],
    [() => bufferSource([1] as Loose), TYPE, /`bytes`/],
    [() => zeroSource(0), RANGE, /`size`/],
    [() => layeredSource('x' as Loose, []), TYPE, /`base`/],
    [() => layeredSource(source, 'x' as Loose), TYPE, /`diffs`/],
    [() => layeredSource(source, [5 as Loose]), TYPE, /`diffs\[0\]`/],
    [() => overlaySource({} as Loose, []), TYPE, /`base`/],
    [() => overlaySource(source, {} as Loose), TYPE, /`overlays`/],
    [() => overlaySource(source, [{ offset: -1, data: pageOf(1) }]), RANGE, /`overlays\[0\].offset`/],
    [() => overlaySource(source, [{ offset: 0, data: Buffer.alloc(0) }]), RANGE, /`overlays\[0\].data/],
    [() => overlaySource(source, [{ offset: 0, bytes: 1 } as Loose]), VALUE, /`bytes`/],
  ];
  for (const [act, code, message] of rows) t.throws(act, { code, message }, String(act));

  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(SIZE));
  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const beyond = overlaySource(source, [{ offset: SIZE - 1, data: new Uint8Array(2) }]);
  for (const wrong of [beyond, layeredSource(source, [file])]) {
    await t.throwsAsync(pager.serve(mapping, { source: wrong }), { code: 'ERR_UFFD_SOURCE' });
  }
  await t.throwsAsync(pager.serve(mapping, { source: zeroSource(PAGE) }), {
    code: 'ERR_UFFD_REGION',
  });
});
