import test from 'ava';
import { MiB } from 'userfaultfd';

import { canRun, counted, PAGE, serving } from './helpers/serving.js';

const BLOCKED_MS = 3000;

test('with the event loop blocked for 3 s another process finishes its 256 MiB meanwhile', async t => {
  if (!canRun(t)) return;
  const size = 256 * MiB;
  const { connect } = await serving(t, { size });
  const { peer, session } = await connect();
  peer.send('touch', 'order=random', 'seed=9');

  const until = performance.now() + BLOCKED_MS;
  while (performance.now() < until);
  // Read before anything else can run on this thread.
  const installed = session.stats().pagesInstalled;

  t.is(installed, size / PAGE);
  const touch = await peer.answer<'touch'>();
  t.true(touch.total_ns / 1e6 < BLOCKED_MS, `${touch.total_ns / 1e6} ms`);
});

test('a session that starts while the event loop is blocked is served', async t => {
  if (!canRun(t)) return;
  const { start, server, bytes } = await serving(t, { size: 16 * MiB });
  const peer = start('--region', `${16 * MiB}`);
  peer.send('touch');
  peer.send('read', '4096', '16');

  const until = performance.now() + 1000;
  while (performance.now() < until);

  const session = await server.accept({ timeout: 0 });
  t.is((await counted(session, (16 * MiB) / PAGE)).pagesInstalled, (16 * MiB) / PAGE);
  await peer.ready();
  await peer.answer<'touch'>();
  t.is((await peer.answer<'read'>()).hex, bytes.subarray(4096, 4112).toString('hex'));
});
