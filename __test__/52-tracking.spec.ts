// Writes that a session tracks: what was written to is told exactly, the memory stays right, the counters add up.

import test, { type ExecutionContext } from 'ava';
import {
  callbackSource,
  type DirtyPages,
  fileSource,
  KiB,
  MemoryMapping,
  Pager,
  type ServeOptions,
  type Session,
  type SessionMode,
  type SessionStats,
  zeroSource,
} from 'userfaultfd';

import { mapped, PAGE, pageOf, registered } from './helpers/faults.js';
import { canRun, image, IMAGE_SIZE, serving } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

const PAGES = 64;
const SIZE = PAGES * PAGE;
const BOTH: SessionMode[] = ['missing', 'write-protect'];

const KINDS = {
  'private memory': () => MemoryMapping.anonymous(SIZE),
  'transparent huge pages': () => MemoryMapping.anonymous(SIZE, { pages: 'transparent' }),
  'shared memory': () => MemoryMapping.memfd(SIZE),
};

async function served(
  t: ExecutionContext,
  mapping: MemoryMapping,
  options: ServeOptions,
): Promise<Session | undefined> {
  mapped(t, mapping);
  if (!canRun(t)) return undefined;
  const pager = pagerOf(t);
  return pager.serve(mapping, options);
}

/** First page and number of pages of each range. */
const pagesOf = ({ ranges }: DirtyPages): [number, number][] =>
  ranges.map(({ sourceOffset, length }) => [(sourceOffset ?? -PAGE) / PAGE, length / PAGE]);

/** Every fault that was read has ended, once. */
function addUp(t: ExecutionContext, stats: SessionStats): void {
  const ended =
    stats.faultsInstalled +
    stats.faultsZeroed +
    stats.faultsPoisoned +
    stats.faultsUnprotected +
    stats.alreadyPresent +
    stats.joined +
    stats.unanswered;
  t.is(stats.faults, ended, JSON.stringify(stats));
}

for (const [kind, make] of Object.entries(KINDS)) {
  test(`what was written to is told once, the rest stays the source's (${kind})`, async t => {
    const { path, bytes } = image(t, SIZE);
    const mapping = make();
    const session = await served(t, mapping, { source: fileSource(path), modes: BOTH });
    if (!session) return;

    t.deepEqual(pagesOf(await session.takeDirty()), [], 'nothing was written to');
    await mapping.read(0, SIZE / 2);
    t.deepEqual(pagesOf(await session.takeDirty()), [], 'reading writes nothing');

    // Of pages that are there, and of pages that are not.
    await mapping.write(3 * PAGE + 5, Buffer.from('there'));
    await mapping.write(40 * PAGE, pageOf(7, 2));
    const dirty = await session.takeDirty();
    t.deepEqual(pagesOf(dirty), [
      [3, 1],
      [40, 2],
    ]);
    t.is(dirty.ranges[0]?.address, mapping.address + BigInt(3 * PAGE));
    t.false(dirty.more);
    t.deepEqual(pagesOf(await session.takeDirty()), []);

    await mapping.write(3 * PAGE, Buffer.from('again'));
    t.deepEqual(pagesOf(await session.takeDirty()), [[3, 1]], 'it was protected again');

    const expected = Buffer.from(bytes);
    expected.write('there', 3 * PAGE + 5);
    expected.write('again', 3 * PAGE);
    expected.fill(7, 40 * PAGE, 42 * PAGE);
    t.true((await mapping.read(0, SIZE)).equals(expected));
    await session.close({ rest: 'populate' });
    t.true(session.stats().faultsUnprotected > 0);
    addUp(t, session.stats());
  });
}

test('memory that is all there is tracked without being asked for', async t => {
  let asked = 0;
  const source = callbackSource(
    () => {
      asked += 1;
      throw new Error('not wanted');
    },
    { size: SIZE },
  );
  const mapping = MemoryMapping.anonymous(SIZE);
  await mapping.write(0, pageOf(1, PAGES / 2));
  const session = await served(t, mapping, { source, modes: ['write-protect'] });
  if (!session) return;

  // A page with bytes, and one that was never touched.
  await mapping.write(PAGE, pageOf(2));
  await mapping.write(SIZE - PAGE, pageOf(3));

  t.deepEqual(pagesOf(await session.takeDirty()), [
    [1, 1],
    [PAGES - 1, 1],
  ]);
  const got = await mapping.read(0, SIZE);
  const expected = Buffer.concat([pageOf(1), pageOf(2), pageOf(1, PAGES / 2 - 2), Buffer.alloc(SIZE / 2)]);
  expected.fill(3, SIZE - PAGE);
  t.true(got.equals(expected));
  t.is(asked, 0);
  await session.close();
  t.true((await mapping.read(0, SIZE)).equals(expected), 'it is ordinary memory again');
});

test('an answer is as long as was asked for; the next goes on behind it', async t => {
  const mapping = MemoryMapping.anonymous(SIZE);
  const session = await served(t, mapping, { source: zeroSource(SIZE), modes: BOTH });
  if (!session) return;
  for (const page of [1, 5, 9]) await mapping.write(page * PAGE, pageOf(page));

  const first = await session.takeDirty({ maxRanges: 2 });
  const second = await session.takeDirty({ maxRanges: 2 });

  t.true(first.more);
  t.deepEqual(
    [...pagesOf(first), ...pagesOf(second)].map(([page]) => page),
    [1, 5, 9],
  );
  t.false(second.more);
});

test('what is discarded counts as written to, and reads zero', async t => {
  const { path } = image(t, SIZE);
  const mapping = MemoryMapping.anonymous(SIZE);
  const session = await served(t, mapping, { source: fileSource(path), modes: BOTH });
  if (!session) return;
  await mapping.read(0, SIZE);

  await mapping.discard(8 * PAGE, 4 * PAGE);

  t.deepEqual(pagesOf(await session.takeDirty()), [[8, 4]]);
  t.true((await mapping.read(8 * PAGE, 4 * PAGE)).equals(Buffer.alloc(4 * PAGE)));
});

test('an adopted userfaultfd tracks what it is registered for', async t => {
  const made = registered(t, PAGES, BOTH, { require: ['pagefault-flag-wp'] });
  if (!made) return;
  const { uffd, mapping } = made;
  const pager = pagerOf(t);
  const region = { address: mapping.address, length: SIZE, sourceOffset: 64 * KiB };
  const source = zeroSource(SIZE + 64 * KiB);
  const session = await pager.adopt(uffd, { regions: [region], source, modes: BOTH });

  await mapping.write(2 * PAGE, pageOf(1));

  const [range] = (await session.takeDirty()).ranges;
  t.is(range?.address, mapping.address + BigInt(2 * PAGE));
  t.is(range?.sourceOffset, 64 * KiB + 2 * PAGE);
});

test('what cannot be tracked is refused by name', async t => {
  type Loose = never;
  const mapping = MemoryMapping.anonymous(SIZE);
  const session = await served(t, mapping, { source: zeroSource(SIZE) });
  if (!session) return;
  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const source = zeroSource(SIZE);

  await t.throwsAsync(session.takeDirty(), { code: 'ERR_UFFD_UNSUPPORTED', message: /track/ });
  await t.throwsAsync(session.takeDirty({ maxRanges: 0 }), { message: /`options.maxRanges`/ });
  await t.throwsAsync(session.takeDirty({ most: 1 } as Loose), { message: /`most`/ });
  await t.throwsAsync(pager.serve(mapping, { source, modes: [] }), { message: /`options.modes`/ });
  await t.throwsAsync(pager.serve(mapping, { source, modes: ['major'] as Loose }), {
    message: /`options.modes\[0\]`/,
  });
  await session.close({ rest: 'zero' });
  await t.throwsAsync(session.takeDirty(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });

  const made = registered(t, PAGES, ['missing']);
  if (!made) return;
  const region = { address: made.mapping.address, length: SIZE, sourceOffset: 0 };
  await t.throwsAsync(pager.adopt(made.uffd, { regions: [region], source, modes: BOTH }), {
    code: 'ERR_UFFD_NOT_REGISTERED',
  });
});

test('sessions of Firecracker say that they track nothing', async t => {
  if (!canRun(t)) return;
  const { connect } = await serving(t, { memory: image(t, IMAGE_SIZE).path });
  const { session } = await connect();

  await t.throwsAsync(session.takeDirty(), { code: 'ERR_UFFD_UNSUPPORTED' });
});
