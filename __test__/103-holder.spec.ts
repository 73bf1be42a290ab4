/** What the holder may do, and what goes on although it may not do more. */

import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, readFileSync } from 'node:fs';

import test from 'ava';

import { daemon, daemonsOf, EXECUTABLE, isAlive, killed, remotely, until } from './helpers/daemon.js';
import { canRun, folder } from './helpers/serving.js';

const [EPERM, EACCES] = [1, 13];

/** What a confined holder came to with each attempt. */
function tried(level: string): Record<string, unknown> {
  const text = execFileSync(EXECUTABLE, ['--try-confinement', level], { encoding: 'utf8' });
  return (JSON.parse(text) as { holder: Record<string, unknown> }).holder;
}

test('a holder can change no file but its socket, and reach nobody but its daemon and who started it', t => {
  const free = tried('off');
  t.deepEqual(free['confined'], { privileges: false, files: 'off', calls: false });
  t.deepEqual([free['read'], free['run'], free['tell'], free['thread']], [0, 0, 0, 0]);

  const calls = tried('calls');
  t.deepEqual(calls['confined'], { privileges: true, files: 'off', calls: true });
  const refused = [
    'connect',
    'listen',
    'namespace',
    'trace',
    'readMemory',
    'userfaultfd',
    'ring',
    'bpf',
    'mount',
  ];
  for (const what of refused) {
    t.is(calls[what], EPERM, what);
    t.log(`${what} without confinement: ${free[what] === 0 ? 'done' : `errno ${String(free[what])}`}`);
  }
  t.deepEqual([calls['read'], calls['run'], calls['tell'], calls['thread']], [0, 0, 0, 0]);

  const all = tried('all');
  const { files } = all['confined'] as { files: string };
  t.log(`Landlock is ${files}`);
  if (!files.startsWith('enforced') && !files.startsWith('partly')) return;
  t.deepEqual([all['write'], all['append'], all['make']], [EACCES, EACCES, EACCES]);
  t.deepEqual([all['read'], all['run'], all['tell'], all['thread'], all['removeSocket']], [0, 0, 0, 0, 0]);
});

test('a holder that runs is confined, and so is everything that it starts', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const status = (pid: number, name: string): string | undefined =>
    new RegExp(`^${name}:\\s*(\\d+)$`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
  const { holderPid = 0, daemonPid } = client;

  for (const pid of [holderPid, daemonPid]) {
    t.is(status(pid, 'NoNewPrivs'), '1');
    t.is(status(pid, 'Seccomp'), '2');
  }
  const [holders, daemons] = [holderPid, daemonPid].map(pid => Number(status(pid, 'Seccomp_filters') ?? 0));
  t.deepEqual([holders, daemons], [2, 3], 'the daemon has those of its holder');

  const free = await daemon(t, { confine: 'off' });
  t.is(status(free.holderPid ?? 0, 'Seccomp'), '0');
});

test('a confined holder replaces a daemon, starts another executable, and removes its socket', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer } = await connect();
  const other = `${folder(t)}/another-pagerd`;
  copyFileSync(EXECUTABLE, other);

  await killed(client);
  const before = client.daemonPid;
  await client.upgrade(other);

  t.not(client.daemonPid, before);
  const { holderPid = 0, socketPath } = client;
  const started = (pid: number): string | undefined =>
    readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0')[0];
  t.is(started(client.daemonPid), other);
  await until(() => {
    const all = daemonsOf(holderPid);
    return all.length === 2 && all.every(pid => started(pid) === other);
  }, 'the next daemon waits, too');
  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
  t.true(existsSync(socketPath));
  await client.close();
  await until(() => !isAlive(holderPid), 'the holder ends');
  t.false(existsSync(socketPath));
});

test('a confined holder applies failure policies itself', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t, { takeover: false });
  const { connect } = await remotely(t, client, { onFailure: 'kill' });
  const { peer } = await connect();

  process.kill(client.daemonPid, 'SIGKILL');

  t.is((await peer.ended).signal, 'SIGKILL');
});
