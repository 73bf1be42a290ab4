// Programs that serve by a daemon, and are ended and started again: `userfaultfd serve --pager`, and others.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { callbackSource, fileSource, PagerClient, serveFirecracker, type Session } from 'userfaultfd';

import type { Peer } from '../examples/support/peer.js';

import { daemon, isAlive, remotely, startPeer, until } from './helpers/daemon.js';
import { MAIN, Serve } from './helpers/serve.js';
import { canRun, folder, image, IMAGE_SIZE, nextRejection, PAGE } from './helpers/serving.js';

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

interface Served {
  serve: Serve;
  args: string[];
  socket: string;
  memory: string;
  bytes: Buffer;
  peer: Peer;
  /** What it said when it listened. */
  pager: string;
  daemonPid: number;
}

/** `serve --pager`, and a process that it serves. */
async function served(t: ExecutionContext, pager: string, ...more: string[]): Promise<Served> {
  const { path: memory, bytes } = image(t);
  const socket = join(folder(t), 'vm.sock');
  const args = ['--socket', socket, '--memory', memory, '--pager', pager, ...more];
  const serve = new Serve(t, args);
  const listening = await serve.next('listening');
  const peer = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();
  await serve.next('session');
  const { pager: path, daemon: daemonPid } = listening as unknown as { pager: string; daemon: number };
  return { serve, args, socket, memory, bytes, peer, pager: path, daemonPid };
}

test('serve --pager PATH: killed, nobody notices; started again, it goes on with the same processes', async t => {
  if (!canRun(t)) return;
  const { socketPath } = await daemon(t);
  const { serve, args, socket, bytes, peer } = await served(t, socketPath);

  serve.child.kill('SIGKILL');
  await serve.ended;
  t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
  const between = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await between.ready();
  const again = new Serve(t, args);
  t.like(await again.next('listening'), { socket, pager: socketPath });
  const found = [await again.next('session'), await again.next('session')];

  const pids = found.map(line => (line['peer'] as { pid: number }).pid);
  t.deepEqual(new Set<number | undefined>(pids), new Set([peer.pid, between.pid]));
  const later = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await later.ready();
  t.is((await later.ask('hash')).sha256, sha256(bytes));
  t.is((await between.ask('hash')).sha256, sha256(bytes));
  again.child.kill('SIGINT');
  t.like(await again.next('end'), { reason: 'closed' });
  await again.next('closed');
  t.deepEqual(await again.ended, [0, null]);
  t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault', 'no zeros');
  t.false(existsSync(socket));
});

test('serve --pager PATH: SIGTERM ends the program and nothing else', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { serve, socket, bytes, peer } = await served(t, client.socketPath);

  serve.child.kill('SIGTERM');

  t.like(await serve.next('left'), { signal: 'SIGTERM', sessions: 1 });
  t.deepEqual(await serve.ended, [0, null]);
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  const later = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await later.ready();
  t.is((await later.ask('hash')).sha256, sha256(bytes));
  t.true(isAlive(client.daemonPid));
});

test('serve --pager PATH --on-failure hold: SIGUSR2 lets a process go on that a daemon holds', async t => {
  if (!canRun(t)) return;
  const { socketPath } = await daemon(t);
  const { serve, memory, bytes, peer } = await served(t, socketPath, '--on-failure', 'hold');
  truncateSync(memory, 0);
  peer.send('hash');
  t.like(await serve.next('held'), { reason: 'source-failed', code: 'ERR_UFFD_SOURCE' });

  writeFileSync(memory, bytes);
  serve.child.kill('SIGUSR2');

  await serve.next('resumed');
  t.is((await peer.answer<'hash'>()).sha256, sha256(bytes));
});

test('serve --pager PATH --on-failure kill: SIGINT kills the process that a daemon serves', async t => {
  if (!canRun(t)) return;
  const { socketPath } = await daemon(t);
  const { serve, peer } = await served(t, socketPath, '--on-failure', 'kill');

  serve.child.kill('SIGINT');

  t.is((await peer.ended).signal, 'SIGKILL');
  t.deepEqual(await serve.ended, [0, null]);
});

test('serve --pager spawn: an end in order ends the daemon, and no other end does', async t => {
  if (!canRun(t)) return;
  const first = await served(t, 'spawn');
  first.serve.child.kill('SIGTERM');
  await first.serve.next('closed');
  t.deepEqual(await first.serve.ended, [0, null]);
  t.is((await first.peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault', 'no zeros');
  t.false(isAlive(first.daemonPid));

  const second = await served(t, 'spawn');
  second.serve.child.kill('SIGKILL');
  await second.serve.ended;
  t.is((await second.peer.ask('hash')).sha256, sha256(second.bytes));
  const client = await PagerClient.connect(second.pager);
  t.is(client.daemonPid, second.daemonPid);
  await client.shutdown();
  await until(() => !isAlive(second.daemonPid), 'the daemon has ended');
});

test('serve --pager: a daemon that is not there, or goes away, is named, with status 1', async t => {
  if (!canRun(t)) return;
  const nowhere = join(folder(t), 'pager.sock');
  const { path } = image(t);
  const args = ['serve', '--socket', join(folder(t), 'vm.sock'), '--memory', path, '--pager', nowhere];
  const { status, stderr } = spawnSync(process.execPath, [MAIN, ...args], { encoding: 'utf8' });
  t.is(status, 1);
  t.regex(stderr, /^ERR_UFFD_SOCKET: .*pager\.sock/);

  const client = await daemon(t);
  const { serve } = await served(t, client.socketPath);
  await client.shutdown();
  t.deepEqual(await serve.ended, [1, null]);
});

/** A client that begins, and is gone as if its program had died. */
async function gone(
  t: ExecutionContext,
  begin: (client: PagerClient) => Promise<void>,
): Promise<PagerClient> {
  const first = await daemon(t);
  const second = await PagerClient.connect(first.socketPath);
  await begin(second);
  second.disconnect();
  return first;
}

/** The client of a program that was started after that. */
async function restarted(t: ExecutionContext, { socketPath }: PagerClient): Promise<PagerClient> {
  const client = await PagerClient.connect(socketPath);
  t.teardown(() => client.disconnect());
  return client;
}

test('servers of a program that has died are listed, with their sessions, and closed by another', async t => {
  if (!canRun(t)) return;
  let remote: Awaited<ReturnType<typeof remotely>> | undefined;
  let peer: Peer | undefined;
  const first = await gone(t, async second => {
    remote = await remotely(t, second);
    ({ peer } = await remote.connect());
  });
  const client = await restarted(t, first);

  await until(() => client.sessions.length === 1, 'the session is found');
  const [server] = await client.servers();

  t.like(server, { socketPath: remote?.socketPath, image: remote?.memory, attended: false });
  t.deepEqual(server?.sessions, client.sessions);
  await server?.close();
  t.deepEqual(await client.servers(), []);
  t.deepEqual(client.sessions, []);
  t.false(existsSync(remote?.socketPath ?? ''));
  t.is((await peer?.ask('probe', IMAGE_SIZE - PAGE))?.result, 'efault', 'no zeros');
  const [ended] = await client.ends();
  t.like(ended, { reason: 'closed', peer: { pid: peer?.pid } });
  await t.throwsAsync(async () => server?.drain(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('a server is attended by one program at a time, and drains for another', async t => {
  if (!canRun(t)) return;
  const first = await daemon(t);
  const { memory, socketPath, connect } = await remotely(t, first);
  const { peer, session } = await connect();
  const client = await restarted(t, first);

  const [server] = await client.servers();
  t.true(server?.attended);
  await t.throwsAsync(async () => serveFirecracker({ pager: client, socketPath, memory }), {
    code: 'ERR_UFFD_SOCKET',
  });

  const drained = server?.drain();
  peer.kill();
  await drained;
  t.is((await session.closed).reason, 'peer-exited');
});

test('a program that is started again answers for the processes of the one before it', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  const socketPath = join(folder(t), 'vm.sock');
  let peer: Peer | undefined;
  const first = await gone(t, async second => {
    const source = callbackSource((offset, length) => bytes.subarray(offset, offset + length), {
      size: IMAGE_SIZE,
    });
    const server = await serveFirecracker({
      pager: second,
      socketPath,
      memory: () => ({ memory: source, window: PAGE }),
      onFailure: 'hold',
    });
    peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
    await server.accept({ timeout: 10_000 });
    await peer.ready();
    await peer.ask('read', 0, 8);
  });
  peer?.send('hash');
  await until(() => first.sessions[0]?.held !== undefined, 'it is held: nobody brings its bytes');

  const client = await restarted(t, first);
  const held: Session[] = [];
  const server = await serveFirecracker({ pager: client, socketPath, memory: path });
  server.on('held', session => held.push(session));
  const session = await server.accept({ timeout: 10_000 });

  t.is(session.peer.pid, peer?.pid ?? 0);
  t.deepEqual(client.sessions, []);
  t.is(session.held?.reason, 'source-failed');
  t.deepEqual(held, [session]);
  await session.resume({ source: fileSource(path) });
  t.is((await peer?.answer<'hash'>())?.sha256, sha256(bytes));
  await until(() => first.sessions[0]?.held === undefined, 'who looks on hears that it goes on');
  const later = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await later.ready();
  t.is((await later.ask('hash')).sha256, sha256(bytes));
  await server.close({ rest: 'zero' });
});

test('a server that was taken on goes on in the next daemon, and with its program', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  let socketPath = '';
  let peer: Peer | undefined;
  const first = await gone(t, async second => {
    const remote = await remotely(t, second);
    ({ socketPath } = remote);
    ({ peer } = await remote.connect());
  });
  const client = await restarted(t, first);
  const server = await serveFirecracker({ pager: client, socketPath, memory: path });
  const session = await server.accept({ timeout: 10_000 });
  const before = client.daemonPid;

  process.kill(before, 'SIGKILL');
  await until(() => client.daemonPid !== before, 'another daemon is there');

  const later = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await later.ready();
  t.is((await later.ask('hash')).sha256, sha256(bytes), 'from the image that was said last');
  t.is((await server.accept({ timeout: 10_000 })).peer.pid, later.pid ?? 0);
  await server.close();
  t.is((await session.closed).reason, 'closed');
  t.is((await peer?.ask('probe', IMAGE_SIZE - PAGE))?.result, 'efault');
});

test('an image of a function is asked of nobody while its program is gone: who comes is turned away', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  const socketPath = join(folder(t), 'vm.sock');
  const first = await gone(t, async second => {
    await serveFirecracker({ pager: second, socketPath, memory: () => path });
  });
  const turnedAway = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await turnedAway.ready();
  t.is((await turnedAway.ask('probe', 0)).result, 'efault');

  const client = await restarted(t, first);
  const server = await serveFirecracker({ pager: client, socketPath, memory: () => path });
  const peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();

  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  const rejected = nextRejection(server);
  const small = startPeer(t, ['--socket', socketPath, '--region', `${2 * IMAGE_SIZE - 3 * PAGE}`]);
  t.is((await rejected).error.code, 'ERR_UFFD_REGION');
  small.kill();
  await server.close();
});
