// `record` and Trace: what faults wanted, in a file, and what can be done with it.

import { mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  bufferSource,
  fileSource,
  KiB,
  MemoryMapping,
  overlaySource,
  Pager,
  type PageSource,
  restoreFirecracker,
  Trace,
} from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { prepared } from './helpers/restoring.js';
import { canRun, folder, image, serving } from './helpers/serving.js';
import { pagerOf, type Served, servedPages } from './helpers/pagers.js';

const PAGES = 64;

/** A session of a mapping of this process, recorded page by page. */
const recorded = async (
  t: ExecutionContext,
  record: string,
  source: PageSource = bufferSource(pageOf(7, PAGES)),
): Promise<Served | undefined> =>
  canRun(t) ? servedPages(t, PAGES, { source, record, window: 4 * KiB }) : undefined;

/** Records a run that touches these pages, one after the other. */
async function run(t: ExecutionContext, pages: number[], source?: PageSource): Promise<string | undefined> {
  const record = join(folder(t), 'run.trace');
  const made = await recorded(t, record, source);
  if (!made) return undefined;
  for (const page of pages) await made.mapping.read(page * PAGE, 1);
  await made.session.close({ rest: 'zero' });
  return record;
}

const pagesOf = (trace: Trace): number[] =>
  trace
    .ranges()
    .flatMap(({ offset, length }) => Array.from({ length: length / PAGE }, (_, nth) => offset / PAGE + nth));

test('the faults of a session are in its recording when it is over, in their order', async t => {
  const before = Date.now();
  const path = await run(t, [5, 60, 6, 5]);
  if (path === undefined) return;

  const trace = await Trace.read(path);

  t.like(trace, { pageSize: PAGE, imageSize: PAGES * PAGE, length: 3, dropped: 0, end: 'complete' });
  t.regex(trace.identity, /^[0-9a-f]{64}$/);
  t.true(before - 1 <= trace.startedAt.getTime() && trace.startedAt.getTime() <= Date.now());
  const faults = [...trace];
  t.deepEqual(
    faults.map(fault => fault.offset / PAGE),
    [5, 60, 6],
  );
  for (const fault of faults) {
    t.like(fault, { kind: 'missing', write: false, brought: { offset: fault.offset, length: PAGE } });
    t.true(fault.latency > 0 && fault.latency < 10_000 && fault.time >= 0);
  }
  t.deepEqual(pagesOf(trace), [5, 60, 6]);
});

test('how far a recording has come is in the counters, and it can be ended before its session', async t => {
  const folderOfIt = folder(t);
  const made = await recorded(t, join(folderOfIt, 'a.trace'));
  if (!made) return;
  const { mapping, session } = made;

  await mapping.read(0, 1);
  t.like(session.stats().recording, { state: 'recording', path: join(folderOfIt, 'a.trace') });
  await session.stopRecording();
  await mapping.read(PAGE, 1);

  t.like(session.stats().recording, { state: 'written', faults: 1, dropped: 0, full: false });
  t.is((await Trace.read(join(folderOfIt, 'a.trace'))).length, 1);
  await session.close({ rest: 'zero' });
  t.is(session.stats().recording?.bytes, readFileSync(join(folderOfIt, 'a.trace')).length);
  t.deepEqual(readdirSync(folderOfIt), ['a.trace']);
  await t.throwsAsync(session.stopRecording(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('several recordings become what any, or what all of them wanted, and are written as one', async t => {
  const one = await run(t, [1, 2, 3]);
  const other = await run(t, [3, 2, 9]);
  if (one === undefined || other === undefined) return;
  const traces = await Promise.all([one, other].map(async path => Trace.read(path)));

  t.deepEqual(pagesOf(await Trace.merge(traces)), [1, 2, 3, 9]);
  const common = await Trace.intersect(traces);
  t.deepEqual(pagesOf(common), [2, 3]);
  await common.write(other);
  t.deepEqual([...(await Trace.read(other))], [...common]);
});

test('recordings of different images, and sources that are another image, are refused', async t => {
  const bytes = Buffer.alloc(PAGES * PAGE, 1);
  const { path: copy } = image(t, PAGES * PAGE);
  writeFileSync(copy, bytes);
  const one = await run(t, [1], bufferSource(bytes));
  const other = await run(t, [1]);
  if (one === undefined || other === undefined) return;
  const [trace, another] = [await Trace.read(one), await Trace.read(other)];

  await trace.check(fileSource(copy));
  await trace.check(overlaySource(fileSource(copy), [{ offset: 0, data: pageOf(9) }]));
  const refused = { code: 'ERR_UFFD_TRACE_IMAGE' };
  await t.throwsAsync(another.check(fileSource(copy)), { ...refused, message: /another image/ });
  await t.throwsAsync(trace.check(bufferSource(bytes.subarray(PAGE))), refused);
  await t.throwsAsync(Trace.merge([trace, another]), { ...refused, message: /recording 1/ });
});

test('a torn recording is read as far as it goes, and what is none is refused', async t => {
  const path = await run(
    t,
    Array.from({ length: PAGES }, (_, page) => page),
  );
  if (path === undefined) return;
  const size = readFileSync(path).length;

  truncateSync(path, size - 3);
  t.like(await Trace.read(path), { end: 'torn', length: PAGES });
  truncateSync(path, size - 30);
  t.like(await Trace.read(path), { end: 'torn', length: 0 });
  truncateSync(path, 20);
  await t.throwsAsync(Trace.read(path), { code: 'ERR_UFFD_TRACE', message: /head/ });
  await t.throwsAsync(Trace.read('/dev/null'), { code: 'ERR_UFFD_TRACE' });
  t.like(await t.throwsAsync(Trace.read(`${path}.gone`)), { code: 'ERR_UFFD_TRACE', syscall: 'open' });
});

test('what cannot be recorded is refused before the session starts, or told when it has ended', async t => {
  const inside = folder(t);
  const refused = recorded(t, join(inside, 'no/such/folder'));
  if (!canRun(t)) return;
  t.like(await t.throwsAsync(refused), { code: 'ERR_UFFD_TRACE', syscall: 'open' });

  await t.throwsAsync(async () => recorded(t, inside), { code: 'ERR_UFFD_TRACE', message: /EISDIR/ });

  const made = await recorded(t, join(inside, 'taken'));
  if (!made) return;
  mkdirSync(join(inside, 'taken', 'by'), { recursive: true });
  const warned = new Promise<Error>(resolve => {
    process.once('warning', resolve);
  });
  await made.mapping.read(0, 1);
  await made.session.close({ rest: 'zero' });
  t.like(made.session.stats().recording, { state: 'failed', error: { code: 'ERR_UFFD_TRACE' } });
  t.like(await warned, { code: 'ERR_UFFD_TRACE' });
  t.deepEqual(readdirSync(inside), ['taken']);

  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const plain = await pager.serve(mapped(t, MemoryMapping.anonymous(PAGE)), {
    source: bufferSource(pageOf(1)),
  });
  await t.throwsAsync(plain.stopRecording(), { code: 'ERR_UFFD_UNSUPPORTED' });
  t.is(plain.stats().recording, undefined);
  await plain.close({ rest: 'zero' });
});

test('the sessions of a server are recorded, also those that a function has chosen an image for', async t => {
  if (!canRun(t)) return;
  const inside = folder(t);
  const [record, chosen] = [join(inside, 'all.trace'), join(inside, 'chosen.trace')];
  const all = await serving(t, { record });
  const { peer, session } = await all.connect();
  await peer.ask('read', 5 * PAGE, 8);
  peer.kill();
  await session.closed;
  t.is((await Trace.read(record)).length, 1);

  const asked = await serving(t, { memory: () => ({ memory: all.memory, record: chosen }), record });
  const other = await asked.connect();
  await other.peer.ask('read', 9 * PAGE, 8);
  await other.peer.ask('read', 500 * PAGE, 8);
  await other.session.close({ rest: 'zero' });
  t.is((await Trace.read(chosen)).length, 2);
  const merged = await Trace.merge([await Trace.read(record), await Trace.read(chosen)]);
  t.is(merged.imageSize, all.bytes.length);
});

test('a VM that is restored, and memory that is adopted, are recorded like others', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const record = join(folder(t), 'vm.trace');
  const vm = await restoreFirecracker({ ...options, record });
  await vm.session.stopRecording();
  t.is([...(await Trace.read(record))][0]?.offset, 0, 'what Firecracker itself has touched');
  await vm.close();
  firecracker.exit();

  const { uffd, regions } = await handedOver(t, `--region ${PAGES * PAGE}`);
  const pager = pagerOf(t);
  const session = await pager.adopt(uffd, { regions, record, source: bufferSource(pageOf(3, PAGES)) });
  await session.close({ rest: 'zero' });
  t.like(await Trace.read(record), { length: 0, end: 'complete', imageSize: PAGES * PAGE });
});

test('wrong options and arguments of recordings are refused by name', async t => {
  const [TYPE, VALUE, RANGE] = ['ERR_INVALID_ARG_TYPE', 'ERR_INVALID_ARG_VALUE', 'ERR_OUT_OF_RANGE'];
  for (const [traces, code] of [
    [[], RANGE],
    ['a.trace', TYPE],
    [['a.trace'], TYPE],
  ] as const) {
    await t.throwsAsync(Trace.merge(traces as never), { code });
    await t.throwsAsync(Trace.intersect(traces as never), { code });
  }
  await t.throwsAsync(Trace.read(7 as never), { code: TYPE });
  if (!canRun(t)) return;
  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  const source = bufferSource(pageOf(1));
  await t.throwsAsync(pager.serve(mapping, { source, record: 5 as never }), { code: TYPE });
  await t.throwsAsync(pager.serve(mapping, { source, record: '' }), { code: VALUE });
});
