/** Another executable takes the daemon's place, or does not: nobody who is served notices, and whoever asked for it is told. */

import { createHash } from 'node:crypto';
import { chmodSync, copyFileSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { type PagerClient, type UffdError } from 'userfaultfd';

import {
  daemon,
  daemonsOf,
  EXECUTABLE,
  isAlive,
  killed,
  remotely,
  servingSince,
  until,
} from './helpers/daemon.js';
import { canRun, folder } from './helpers/serving.js';

const [ENOENT, ENOEXEC, EACCES] = [2, 8, 13];

/** A file, executable unless it is said otherwise. */
function file(t: ExecutionContext, text: string, mode = 0o755): string {
  const path = join(folder(t), 'another-pagerd');
  writeFileSync(path, text);
  chmodSync(path, mode);
  return path;
}

/** What a process was started as. */
const startedAs = (pid: number): string | undefined =>
  readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0')[0];

async function refused(t: ExecutionContext, client: PagerClient, path: string): Promise<UffdError> {
  const error = await t.throwsAsync<UffdError>(async () => client.upgrade(path));
  t.true(error.message.includes(path), error.message);
  t.truthy(error.hint);
  return error;
}

test('an executable that cannot be started, or is no daemon, is refused while the daemon goes on', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client, { onFailure: 'hold' });
  const { peer } = await connect();
  const { daemonPid } = client;
  const since = await servingSince(client);
  const cases: [string, number | undefined][] = [
    ['/nonexist', ENOENT],
    ['/tmp', EACCES],
    [file(t, 'x', 0o644), EACCES],
    [file(t, 'neither a program nor a script'), ENOEXEC],
    [file(t, '#!/nonexist\n'), ENOENT],
    [join(process.cwd(), 'no-such-name'), ENOENT],
    ['/bin/true', undefined],
    ['/bin/false', undefined],
    [file(t, '#!/bin/sh\nexec cat\n'), undefined],
  ];

  for (const [path, errno] of cases) {
    const error = await refused(t, client, path);
    t.is(error.errno, errno, path);
    t.is(error.code, errno === undefined ? 'ERR_UFFD_PROTOCOL' : 'ERR_UFFD_SYSTEM');
    t.is(error.syscall, errno === undefined ? undefined : 'execve');
  }
  t.regex((await refused(t, client, '/nonexist')).message, /\/nonexist .* execve: ENOENT/);
  await t.throwsAsync(async () => client.upgrade('no-such-name'), { message: new RegExp(process.cwd()) });

  t.is(client.daemonPid, daemonPid);
  t.is(await servingSince(client), since);
  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
  await until(() => daemonsOf(client.holderPid ?? 0).length === 2, 'nothing of them is left');
});

test('one that says nothing is refused in time, and the daemon goes on meanwhile', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer } = await connect();
  const { daemonPid } = client;
  const silent = file(t, '#!/bin/sh\nexec sleep 1000\n');

  const upgraded = t.throwsAsync(async () => client.upgrade(silent), {
    code: 'ERR_UFFD_PROTOCOL',
    message: /5 s/,
  });

  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
  await upgraded;
  t.is(client.daemonPid, daemonPid);
  await until(() => daemonsOf(client.holderPid ?? 0).length === 2, 'it was ended');
});

for (const how of ['with', 'without'] as const) {
  test(`one that is ready and then does not come to serve is told, and its place is the one’s before it (${how} take-over)`, async t => {
    if (!canRun(t)) return;
    const client = await daemon(t, { takeover: how === 'with' });
    const { connect, bytes } = await remotely(t, client);
    const { peer, session } = await connect();
    await peer.ask('read', 0, 8);
    const first = file(t, '');
    copyFileSync(EXECUTABLE, first);
    await client.upgrade(first);
    t.is(startedAs(client.daemonPid), first);
    const { daemonPid } = client;
    // What it is handed has no place there.
    const broken = file(t, `#!/bin/sh\nulimit -n 8; exec "${EXECUTABLE}" "$@"\n`);

    const error = await refused(t, client, broken);

    t.is(error.code, 'ERR_UFFD_PROTOCOL');
    t.regex(error.message, /before it served \(status 1\)/);
    t.not(client.daemonPid, daemonPid);
    t.is(startedAs(client.daemonPid), first);
    t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
    await client.upgrade();
    t.is(startedAs(client.daemonPid), EXECUTABLE);
    await peer.exit();
    t.is((await session.closed).reason, 'peer-exited');
  });
}

test('upgrades that are asked for at once all come out, each with its own end', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer } = await connect();
  const { daemonPid } = client;

  const all = await Promise.allSettled([
    client.upgrade(),
    client.upgrade('/bin/true'),
    client.upgrade(),
    client.upgrade('/nonexist'),
  ]);

  const codes = all.map(one => (one.status === 'rejected' ? (one.reason as UffdError).code : one.status));
  t.deepEqual(codes, ['fulfilled', 'ERR_UFFD_PROTOCOL', 'fulfilled', 'ERR_UFFD_SYSTEM']);
  t.not(client.daemonPid, daemonPid);
  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
});

test('an upgrade whose daemon dies while its executable is looked at takes place in the next', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer } = await connect();
  const held = join(folder(t), 'held');
  writeFileSync(held, '');
  const path = file(t, `#!/bin/sh\nwhile [ -e "${held}" ]; do sleep 0.01; done; exec "${EXECUTABLE}" "$@"\n`);
  const { daemonPid, holderPid = 0 } = client;

  const upgraded = client.upgrade(path);
  await until(() => daemonsOf(holderPid).some(pid => startedAs(pid) === '/bin/sh'), 'it is looked at');
  process.kill(daemonPid, 'SIGKILL');
  await until(() => client.daemonPid !== daemonPid, 'another is there');
  rmSync(held);
  await upgraded;

  // Until it is ready, the one that waits is of the same.
  t.is(startedAs(client.daemonPid), EXECUTABLE);
  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
});

test('an executable that is not there any more when the daemon dies leaves its place to the holder’s own', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer } = await connect();
  const path = file(t, '');
  copyFileSync(EXECUTABLE, path);
  await client.upgrade(path);
  const { holderPid = 0 } = client;
  await until(() => {
    const all = daemonsOf(holderPid);
    return all.length === 2 && all.every(pid => startedAs(pid) === path);
  }, 'the next waits');
  rmSync(path);

  await killed(client);
  t.is(startedAs(client.daemonPid), path, 'that one was there already');
  await killed(client);

  t.is(startedAs(client.daemonPid), '/proc/self/exe');
  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
  t.true(isAlive(holderPid));
});
