/** Which sessions `accept` gives, and which it keeps nobody from forgetting. */

import { once } from 'node:events';

import test from 'ava';

import { canRun, IMAGE_SIZE, serving } from './helpers/serving.js';

test('a session that has ended before anybody accepted it is not given', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t);
  const peers = [1, 2].map(() => start('--region', `${IMAGE_SIZE}`));
  const [first, second] = peers;
  while (server.sessions.length < 2) await once(server, 'session');
  const dead = server.sessions.find(({ peer }) => peer.pid === first?.pid);
  first?.kill();
  await dead?.closed;

  const session = await server.accept({ timeout: 10_000 });

  t.is(second?.pid, session.peer.pid);
  await t.throwsAsync(server.accept({ timeout: 20 }), { code: 'ERR_UFFD_TIMEOUT' });
});

test('a server that is closed, or closing, gives no sessions that nobody has accepted', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t);
  start('--region', `${IMAGE_SIZE}`);
  await once(server, 'session');

  const closing = server.close();
  await t.throwsAsync(server.accept(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  await closing;

  await t.throwsAsync(server.accept(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  for await (const session of server) t.fail(`it gave session ${session.id}`);
});

test('a server that drains gives who has come before', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t);
  const peer = start('--region', `${IMAGE_SIZE}`);
  await once(server, 'session');

  const draining = server.drain();

  t.is((await server.accept({ timeout: 10_000 })).peer.pid, peer.pid);
  peer.kill();
  await draining;
});
