// session.detach(): memory that is all there goes on without a pager.

import test from 'ava';
import { bufferSource, MemoryMapping, Pager, restoreFirecracker } from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { lasting, prepared } from './helpers/restoring.js';
import { canRun, image, serving } from './helpers/serving.js';

const PAGES = 32;

test('a session of which pages are missing is not detached, and says how many', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();
  const session = await pager.serve(mapping, { source: bufferSource(pageOf(7, PAGES)) });
  await session.populate({ ranges: [mapping.range(0, 5 * PAGE)] });

  const error = await t.throwsAsync(session.detach(), { code: 'ERR_UFFD_PAGES_MISSING' });

  t.is(error?.message, `${PAGES - 5} pages (${(PAGES - 5) * PAGE} bytes) are missing`);
  t.deepEqual(await mapping.read((PAGES - 1) * PAGE, PAGE), pageOf(7), 'it goes on');
});

test('what is missing is brought first where that is wanted', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();
  const session = await pager.serve(mapping, { source: bufferSource(pageOf(7, PAGES)) });

  const end = await session.detach({ populate: true });

  t.is(end.reason, 'detached');
  t.is(end.error, undefined);
  t.is(end, await session.closed);
  t.is(pager.sessions.length, 0);
  t.deepEqual(await mapping.read(0, PAGES * PAGE), pageOf(7, PAGES));
  await mapping.discard(0, PAGE);
  t.deepEqual(await mapping.read(0, PAGE), pageOf(0), 'the kernel gives zeros for what was given back');
  await t.throwsAsync(session.detach(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('bringing what is missing can be given up, and the session goes on', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();
  const session = await pager.serve(mapping, { source: bufferSource(pageOf(7, PAGES)) });
  const reason = new Error('no longer wanted');

  t.is(await t.throwsAsync(session.detach({ signal: AbortSignal.abort(reason) })), reason);

  t.deepEqual(await mapping.read(0, PAGE), pageOf(7));
  await t.throwsAsync(session.detach({ populated: true } as never), { code: 'ERR_INVALID_ARG_VALUE' });
  await t.throwsAsync(session.detach({ populate: 1 as never }), { code: 'ERR_INVALID_ARG_TYPE' });
  await t.throwsAsync(session.detach(), { code: 'ERR_UFFD_PAGES_MISSING' });
});

test('another process goes on without a pager: what it has, what it gives back, and what it writes', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, PAGES * PAGE);
  const { peer, uffd, pidfd, regions } = await handedOver(t, `--region ${PAGES * PAGE}`);
  const pager = Pager.create();
  const session = await pager.adopt(uffd, { source: bufferSource(bytes), regions, pidfd });
  await peer.ask('discard', 3 * PAGE, 2 * PAGE);

  t.is((await session.detach({ populate: true })).reason, 'detached');
  await pager.close();

  t.is((await peer.ask('compare', path)).different, 0);
  await peer.ask('discard', 8 * PAGE, PAGE);
  t.is((await peer.ask('zeros')).nonzero, 0);
  await peer.ask('write', 8 * PAGE, '0708');
  t.is((await peer.ask('read', 8 * PAGE, 2)).hex, '0708');
});

test('a session with faults behind it is detached when the rest was brought', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t);
  const { peer, session } = await connect();
  await peer.ask('read', 0, 8);

  await session.detach({ populate: true });

  const { faults, faultsInstalled } = session.stats();
  t.is(faults, faultsInstalled);
  t.is((await peer.ask('compare', memory)).different, 0);
});

test('a VM that was filled and detached leaves nothing in this process', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const before = lasting();

  const vm = await restoreFirecracker({ ...options, mode: 'fill' });
  t.is((await vm.session.detach()).reason, 'detached');
  t.is((await vm.close()).reason, 'detached');

  t.deepEqual(lasting(), before);
  t.is((await firecracker.peer.ask('compare', options.memory as string)).different, 0);
});
