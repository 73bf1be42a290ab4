/** What a holder that was killed leaves behind. */

import { once } from 'node:events';
import { existsSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { dirname, join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { PagerClient } from 'userfaultfd';

import { daemon, isAlive, until } from './helpers/daemon.js';
import { canRun, folder } from './helpers/serving.js';

/** A daemon whose holder was killed. */
async function alone(t: ExecutionContext, socketPath?: string): Promise<PagerClient> {
  const client = await daemon(t, socketPath === undefined ? {} : { socketPath });
  const { daemonPid, holderPid = 0 } = client;
  t.teardown(() => isAlive(daemonPid) && process.kill(daemonPid, 'SIGKILL'));
  process.kill(holderPid, 'SIGKILL');
  await until(() => client.holderPid === undefined && !isAlive(holderPid), 'its end is told');
  return client;
}

for (const where of ['a directory of its own', 'a place that was named'] as const) {
  test(`a daemon whose holder was killed is reached in ${where}, and nothing of that is left when its client closes it`, async t => {
    if (!canRun(t)) return;
    const named = where === 'a place that was named' ? join(folder(t), 'pager.sock') : undefined;
    const client = await alone(t, named);
    const { daemonPid, socketPath } = client;

    const other = await PagerClient.connect(socketPath);
    t.is(other.daemonPid, daemonPid);
    other.disconnect();
    t.true(existsSync(socketPath));
    await client.close();

    await until(() => !isAlive(daemonPid), 'the daemon has ended');
    t.false(existsSync(socketPath));
    t.is(existsSync(dirname(socketPath)), named !== undefined);
  });
}

test('the socket of somebody who listens in the same place by now is left to them', async t => {
  if (!canRun(t)) return;
  const client = await alone(t, join(folder(t), 'pager.sock'));
  rmSync(client.socketPath);
  const another = createServer().listen(client.socketPath);
  t.teardown(() => another.close());
  await once(another, 'listening');

  await client.close();

  t.true(existsSync(client.socketPath));
});
