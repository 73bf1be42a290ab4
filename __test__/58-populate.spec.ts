// session.populate(): pages that no fault has asked for.

import { setImmediate } from 'node:timers/promises';

import test, { type ExecutionContext } from 'ava';
import { bufferSource, callbackSource, MemoryMapping, type PageSource } from 'userfaultfd';

import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { canRun, serving } from './helpers/serving.js';
import { type Served, servedPages } from './helpers/pagers.js';

const PAGES = 64;

const served = async (
  t: ExecutionContext,
  source: PageSource = bufferSource(pageOf(7, PAGES)),
): Promise<Served | undefined> => (canRun(t) ? servedPages(t, PAGES, { source }) : undefined);

const present = (mapping: MemoryMapping): number =>
  mapping.residency().filter(state => state === 'present').length;

test('ranges of the mapping are there when it resolves, and nothing else', async t => {
  const made = await served(t);
  if (!made) return;
  const { mapping, session } = made;

  await session.populate({ ranges: [mapping.range(40 * PAGE, PAGE), mapping.range(2 * PAGE, 5 * PAGE)] });

  t.is(present(mapping), 6);
  t.is(session.stats().pagesPrefetched, 6);
  await session.populate();
  t.is(present(mapping), PAGES);
  t.is(session.stats().faults, 0);
  t.true(pageOf(7, PAGES).equals(await mapping.read(0, PAGES * PAGE)));
});

test('the memory of another process is populated by its addresses, or as a whole', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t);
  const { peer, session } = await connect();
  const address = session.regions[0]?.address ?? 0n;

  await session.populate({ ranges: [{ address, length: 16 * PAGE }] });
  t.is(session.stats().pagesPrefetched, 16);
  await session.populate();

  t.is((await peer.ask('compare', memory)).different, 0);
  t.is(session.stats().faults, 0, 'nobody had to wait');
});

test('one that is given up ends with its reason, and leaves the session as it was', async t => {
  const made = await served(
    t,
    callbackSource(
      async (_, length) => {
        await setImmediate();
        return Buffer.alloc(length, 7);
      },
      { size: PAGES * PAGE, chunk: PAGE },
    ),
  );
  if (!made) return;
  const { mapping, session } = made;
  const controller = new AbortController();
  const reason = new Error('no longer wanted');

  // A page a second: it cannot be done before it is given up.
  const slow = session.populate({ rate: PAGE, signal: controller.signal });
  await mapping.read(0, PAGE);
  controller.abort(reason);

  t.is(await t.throwsAsync(slow), reason);
  t.is(await t.throwsAsync(session.populate({ signal: controller.signal })), reason);
  await session.populate();
  t.is(present(mapping), PAGES);
});

test('a session that is over, or ends before, says so', async t => {
  const made = await served(t);
  if (!made) return;
  const { session } = made;

  const slow = t.throwsAsync(session.populate({ rate: 1 }), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  await session.close({ rest: 'zero' });

  await slow;
  await t.throwsAsync(session.populate(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('what cannot be populated is refused by name', async t => {
  const made = await served(t);
  if (!made) return;
  const { mapping, session } = made;
  const other = mapped(t, MemoryMapping.anonymous(PAGE));
  const [TYPE, VALUE, RANGE] = ['ERR_INVALID_ARG_TYPE', 'ERR_INVALID_ARG_VALUE', 'ERR_OUT_OF_RANGE'];
  const rows: [object, string][] = [
    [{ range: [] }, VALUE],
    [{ ranges: mapping.range() }, TYPE],
    [{ ranges: [] }, RANGE],
    [{ ranges: [{ mapping, offset: 1, length: PAGE }] }, RANGE],
    [{ ranges: [{ address: 1, length: PAGE }] }, TYPE],
    [{ rate: 0 }, RANGE],
    [{ rate: '1' }, TYPE],
    [{ signal: {} }, TYPE],
    [{ ranges: [other.range()] }, 'ERR_UFFD_REGION'],
  ];
  for (const [options, code] of rows) {
    await t.throwsAsync(session.populate(options as never), { code }, code);
  }
  t.is(present(mapping), 0);
});
