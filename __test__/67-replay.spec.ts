// `replay`: what an earlier run wanted is there before anybody asks.

import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  bufferSource,
  callbackSource,
  fileSource,
  KiB,
  type MemoryMapping,
  type PageSource,
  restoreFirecracker,
  type ServeOptions,
  Trace,
} from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { PAGE, pageOf } from './helpers/faults.js';
import { nextRejection, canRun, folder, image, serving } from './helpers/serving.js';
import { prepared } from './helpers/restoring.js';
import { pagerOf, type Served, servedPages } from './helpers/pagers.js';

const PAGES = 256;
const bytes = Buffer.alloc(PAGES * PAGE);
for (let page = 0; page < PAGES; page += 1) bytes.fill((page % 250) + 1, page * PAGE, (page + 1) * PAGE);

const served = async (t: ExecutionContext, options: Partial<ServeOptions> = {}): Promise<Served> =>
  servedPages(t, PAGES, { source: bufferSource(bytes), window: 4 * KiB, ...options });

/** The recording of a run that touches these pages, one after the other. */
async function recording(t: ExecutionContext, pages: number[], source?: PageSource): Promise<string> {
  const record = join(folder(t), 'run.trace');
  const { mapping, session } = await served(t, source ? { record, source } : { record });
  for (const page of pages) await mapping.read(page * PAGE, 1);
  await session.close({ rest: 'zero' });
  return record;
}

const present = (mapping: MemoryMapping): number[] =>
  mapping.residency().flatMap((state, page) => (state === 'present' ? [page] : []));

test('what an earlier run wanted is there, without a fault, and nothing else', async t => {
  if (!canRun(t)) return;
  const replay = await recording(t, [200, 3, 4, 77]);
  for (const given of [replay, await Trace.read(replay)]) {
    const { mapping, session } = await served(t, { replay: given });

    await session.replayed();

    t.is(session.mode, 'replay');
    t.deepEqual(present(mapping), [3, 4, 77, 200]);
    t.like(session.stats(), {
      faults: 0,
      pagesPrefetched: 4,
      replay: { pages: 4, installed: 4, late: 0, missed: 0, done: true, heldBack: 0 },
    });
    await mapping.read(10 * PAGE, 1);
    t.is(session.stats().replay?.missed, 1);
    t.is(session.stats().replay?.waste, undefined);
    t.true(bytes.equals(await mapping.read(0, PAGES * PAGE)));
  }
});

test('a source in JavaScript is replayed as well, with several requests on the way', async t => {
  if (!canRun(t)) return;
  let most = 0;
  let open = 0;
  const far = (): PageSource =>
    callbackSource(
      async (offset, length) => {
        most = Math.max(most, (open += 1));
        await new Promise(resolve => {
          setTimeout(resolve, 5);
        });
        open -= 1;
        return bytes.subarray(offset, offset + length);
      },
      { size: bytes.length, chunk: 4 * KiB },
    );
  const wanted = Array.from({ length: PAGES / 4 }, (_, nth) => nth * 4);
  const replay = await recording(t, wanted);

  const { mapping, session } = await served(t, { source: far(), replay });
  await session.replayed();

  t.deepEqual(present(mapping), wanted);
  t.true(most > 1, `${most} on the way at one time`);
  t.is(session.stats().faults, 0);
});

test('a share of the pages is held back where waste is to be estimated', async t => {
  if (!canRun(t)) return;
  const all = Array.from({ length: PAGES }, (_, page) => page);
  const replay = await recording(t, all);
  // One page in 64 of 256, by chance: of ten sessions together, some.
  let heldBack = 0;
  for (let round = 0; round < 10; round += 1) {
    const { mapping, session } = await served(t, { replay, estimateWaste: true });
    await session.replayed();
    const before = session.stats().replay;
    t.is(present(mapping).length, PAGES - (before?.heldBack ?? 0));
    t.is(before?.waste, before?.heldBack === 0 ? undefined : 1, 'nobody has wanted anything');
    heldBack += before?.heldBack ?? 0;
    await mapping.read(0, PAGES * PAGE);
    const after = session.stats().replay;
    t.like(after, { late: 0, missed: 0, heldBackFaults: before?.heldBack ?? 0 });
    t.is(after?.waste, after?.heldBack === 0 ? undefined : 0, 'all of it was wanted');
    await session.close({ rest: 'zero' });
  }
  t.true(heldBack > 5 && heldBack < 200, `${heldBack} of ${10 * PAGES}`);
});

test('a recording of another image, a damaged one, or none is refused before the session starts', async t => {
  if (!canRun(t)) return;
  const replay = await recording(t, [1, 2]);
  const other = await recording(t, [1, 2], bufferSource(pageOf(9, PAGES)));
  const short = await recording(t, [1]);
  truncateSync(short, 40);
  const refused = async (options: Partial<ServeOptions>, code: string): Promise<void> => {
    await t.throwsAsync(served(t, options), { code });
  };

  await refused({ replay: other }, 'ERR_UFFD_TRACE_IMAGE');
  await refused({ replay: await Trace.read(other) }, 'ERR_UFFD_TRACE_IMAGE');
  await refused({ replay, source: bufferSource(Buffer.concat([bytes, pageOf(1)])) }, 'ERR_UFFD_TRACE_IMAGE');
  await refused({ replay: short }, 'ERR_UFFD_TRACE');
  await refused({ replay: `${replay}.gone` }, 'ERR_UFFD_TRACE');
  const { path } = image(t, PAGES * PAGE);
  writeFileSync(path, bytes);
  const copied = await served(t, { replay, source: fileSource(path) });
  await copied.session.replayed();
  t.deepEqual(present(copied.mapping), [1, 2], 'a copy is the same image');
});

test('modes and recordings that do not go together are refused by name', async t => {
  if (!canRun(t)) return;
  const replay = await recording(t, [1]);
  const [TYPE, VALUE] = ['ERR_INVALID_ARG_TYPE', 'ERR_INVALID_ARG_VALUE'];
  for (const [options, code] of [
    [{ mode: 'replay' }, VALUE],
    [{ mode: 'fill', replay }, VALUE],
    [{ mode: 'windows', replay }, VALUE],
    [{ estimateWaste: true }, VALUE],
    [{ estimateWaste: 1, replay }, TYPE],
    [{ replay: 7 }, TYPE],
  ] as const) {
    await t.throwsAsync(served(t, options as never), { code }, JSON.stringify(options));
  }
  const { session } = await served(t, { mode: 'replay', replay });
  await session.replayed();
  const plain = await served(t);
  await t.throwsAsync(plain.session.replayed(), { code: 'ERR_UFFD_UNSUPPORTED' });
  t.is(plain.session.stats().replay, undefined);
  await plain.session.close({ rest: 'zero' });
  await t.throwsAsync(plain.session.replayed(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('another process finds what an earlier one wanted, whichever image it gets', async t => {
  if (!canRun(t)) return;
  const record = join(folder(t), 'vm.trace');
  const first = await serving(t, { record, window: 4 * KiB });
  const earlier = await first.connect();
  for (const page of [5, 900, 17]) await earlier.peer.ask('read', page * PAGE, 8);
  await earlier.session.close({ rest: 'zero' });

  const all = await serving(t, { memory: first.memory, replay: record });
  const one = await all.connect();
  await one.session.replayed();
  t.is((await one.peer.ask('resident')).pages, 3);
  t.is((await one.peer.ask('compare', first.memory)).different, 0);

  const chosen = await serving(t, {
    memory: ({ peer }) =>
      peer.pid === one.session.peer.pid ? first.memory : { memory: first.memory, replay: record },
  });
  const other = await chosen.connect();
  await other.session.replayed();
  t.is(other.session.stats().replay?.installed, 3);

  const wrong = await serving(t, { memory: () => ({ memory: all.memory, replay: `${record}.gone` }) });
  const rejected = nextRejection(wrong.server);
  wrong.start('--region', `${wrong.bytes.length}`);
  t.is((await rejected).error.code, 'ERR_UFFD_TRACE');
  await t.throwsAsync(serving(t, { replay: record }), { code: 'ERR_UFFD_TRACE_IMAGE' });
});

test('a VM is resumed when its working set is there, and adopted memory is replayed like other', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const record = join(folder(t), 'vm.trace');
  const first = await restoreFirecracker({ ...options, record });
  await firecracker.peer.ask('read', 40 * PAGE, 8);
  await first.close();
  firecracker.exit();

  const again = await prepared(t);
  const vm = await restoreFirecracker({
    ...options,
    apiSocket: again.firecracker.apiSocket,
    resume: false,
    replay: record,
  });
  await vm.session.replayed();
  await vm.resume();
  const { faults } = vm.session.stats();
  await again.firecracker.peer.ask('read', 40 * PAGE, 8);
  t.is(vm.session.stats().faults, faults, 'nobody had to wait');
  await vm.close();

  const replay = await recording(t, [9, 10]);
  const { uffd, regions } = await handedOver(t, `--region ${PAGES * PAGE}`);
  const pager = pagerOf(t);
  const session = await pager.adopt(uffd, { regions, replay, source: bufferSource(bytes) });
  await session.replayed();
  t.is(session.stats().replay?.installed, 2);
  await session.close({ rest: 'zero' });
});
