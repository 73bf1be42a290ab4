// What monitoring hears of sessions by node:diagnostics_channel, without having been handed a pager or a server.

import { subscribe, unsubscribe } from 'node:diagnostics_channel';

import test, { type ExecutionContext } from 'ava';
import { fileSource, MemoryMapping } from 'userfaultfd';

import { mapped, PAGE } from './helpers/faults.js';
import { canRun, image, nextRejection, serving } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

/** Everything that is told on a channel until the test ends. */
function heard(t: ExecutionContext, name: string): Record<string, unknown>[] {
  const messages: Record<string, unknown>[] = [];
  const listen = (message: unknown): void => void messages.push(message as Record<string, unknown>);
  subscribe(name, listen);
  t.teardown(() => unsubscribe(name, listen));
  return messages;
}

test.serial('the start and the end of a session are told, with its last counters', async t => {
  if (!canRun(t)) return;
  const starts = heard(t, 'userfaultfd:session:start');
  const ends = heard(t, 'userfaultfd:session:end');
  const { path } = image(t, 4 * PAGE);
  const mapping = mapped(t, MemoryMapping.anonymous(4 * PAGE));
  const pager = pagerOf(t);

  const session = await pager.serve(mapping, { source: fileSource(path) });
  t.deepEqual(starts, [{ session }]);
  await mapping.read(0, PAGE);
  const end = await session.close({ rest: 'populate' });

  t.deepEqual(ends, [{ session, end, stats: session.stats() }]);
  t.is(session.stats().pagesInstalled, 4);
});

test.serial('processes of a server are told, and those that are turned away', async t => {
  if (!canRun(t)) return;
  const starts = heard(t, 'userfaultfd:session:start');
  const ends = heard(t, 'userfaultfd:session:end');
  const rejections = heard(t, 'userfaultfd:peer:rejected');
  const { server, connect, start } = await serving(t);

  const { session } = await connect();
  start('--region', `${4 * PAGE}`, '--fd', 'null');
  const rejection = await nextRejection(server);
  const end = await session.close();

  t.deepEqual(starts, [{ session }]);
  t.deepEqual(rejections, [{ socketPath: server.socketPath, rejection }]);
  t.deepEqual(ends, [{ session, end, stats: session.stats() }]);
});
