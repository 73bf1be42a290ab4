/** The pager in a process of its own: serving, protocol, who may. */

import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, existsSync, statSync } from 'node:fs';
import { createConnection, createServer } from 'node:net';
import { createInterface } from 'node:readline';

import test from 'ava';
import {
  bufferSource,
  callbackSource,
  fileSource,
  layeredSource,
  MemoryMapping,
  MiB,
  overlaySource,
  Pager,
  PagerClient,
  serveFirecracker,
  zeroSource,
} from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { daemon, isAlive, openIn, remotely, startPeer, until } from './helpers/daemon.js';
import { program } from './helpers/programs.js';
import { canRun, counted, folder, image, IMAGE_SIZE, nextRejection, PAGE } from './helpers/serving.js';

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

test('a daemon serves Firecracker: every page equals the image, counters and the end are told here', async t => {
  if (!canRun(t)) return;
  const { connect, bytes, server, socketPath } = await remotely(t, await daemon(t));
  const { peer, session } = await connect();

  await peer.ask('touch', 'order=random', 'seed=1');

  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  t.is(session.peer.pid, peer.pid);
  t.is((await counted(session, IMAGE_SIZE / PAGE)).pagesInstalled, IMAGE_SIZE / PAGE);
  await peer.exit();
  const end = await session.closed;
  t.is(end.reason, 'peer-exited');
  t.is(session.stats().pagesInstalled, IMAGE_SIZE / PAGE);
  t.true(session.stats().latencies.install.count > 0);
  await server.close();
  t.false(existsSync(socketPath), 'the socket is removed');
});

test('memory of another process is adopted, populated, detached in a daemon', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t, 2 * MiB);
  const handed = await handedOver(t, `--region ${2 * MiB}`);
  const { uffd, pidfd, regions, peer } = handed;

  const session = await client.adopt(uffd, { source: fileSource(path), regions, pidfd });
  t.true(uffd.closed);
  t.deepEqual(client.sessions, [session]);
  t.is((await peer.ask('read', PAGE, 16)).hex, bytes.subarray(PAGE, PAGE + 16).toString('hex'));
  await session.populate();
  const end = await session.detach();

  t.is(end.reason, 'detached');
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
});

test("what a daemon refuses to adopt is the caller's as before", async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { uffd, regions } = await handedOver(t, `--region ${2 * MiB}`);

  const refused = await t.throwsAsync(async () => client.adopt(uffd, { source: zeroSource(MiB), regions }));

  t.is((refused as NodeJS.ErrnoException).code, 'ERR_UFFD_REGION');
  t.false(uffd.closed);
  uffd.zero({ address: regions[0]?.address ?? 0n, length: 2 * MiB });
});

test('memory of this process is served by a daemon', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t, 2 * MiB);
  const mapping = MemoryMapping.anonymous(2 * MiB);
  const session = await client.serve(mapping, { source: fileSource(path) });

  t.deepEqual(await mapping.read(5 * PAGE, 64), bytes.subarray(5 * PAGE, 5 * PAGE + 64));
  await mapping.discard(8 * PAGE, PAGE);
  t.deepEqual(await mapping.read(8 * PAGE, 4), Buffer.alloc(4));

  t.is((await session.close({ rest: 'populate' })).reason, 'closed');
  t.is(sha256(await mapping.read(16 * PAGE, PAGE)), sha256(bytes.subarray(16 * PAGE, 17 * PAGE)));
  mapping.close();
});

test('writes are tracked in a daemon', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const mapping = MemoryMapping.anonymous(MiB);
  const session = await client.serve(mapping, {
    source: zeroSource(MiB),
    modes: ['missing', 'write-protect'],
  });
  await mapping.write(3 * PAGE, Buffer.from('written'));

  const { ranges } = await session.takeDirty();

  t.deepEqual(ranges, [
    { address: mapping.address + BigInt(3 * PAGE), length: PAGE, sourceOffset: 3 * PAGE },
  ]);
  await session.close({ rest: 'zero' });
  mapping.close();
});

test('every kind of source is served by a daemon', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t, MiB);
  const { path: top, bytes: topBytes } = image(t, MiB);
  const laid = Buffer.from(bytes);
  laid.write('laid over', 100);
  const asked = callbackSource((offset, length) => bytes.subarray(offset, offset + length), { size: MiB });
  for (const [source, expected] of [
    [fileSource(path), bytes],
    [bufferSource(bytes), bytes],
    [zeroSource(MiB), Buffer.alloc(MiB)],
    [layeredSource(fileSource(path), [top]), topBytes],
    [overlaySource(fileSource(path), [{ offset: 100, data: Buffer.from('laid over') }]), laid],
    [asked, bytes],
  ] as const) {
    const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${MiB}`);
    const session = await client.adopt(uffd, { source, regions, pidfd });
    t.is((await peer.ask('hash')).sha256, sha256(expected));
    await session.close({ rest: 'zero' });
  }
});

test('a function says which image a process gets from a daemon, or that it gets none', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t, IMAGE_SIZE);
  const socketPath = `${folder(t)}/vm.sock`;
  let refuse = false;
  const server = await serveFirecracker({
    pager: client,
    socketPath,
    memory: () => {
      if (refuse) throw new Error('not you');
      return { memory: path, window: 4096 };
    },
  });
  const peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await server.accept({ timeout: 10_000 });
  t.is((await peer.ready(), await peer.ask('read', 0, 16)).hex, bytes.subarray(0, 16).toString('hex'));

  refuse = true;
  const rejected = nextRejection(server);
  startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);

  const { error } = await rejected;
  t.is(error.code, 'ERR_UFFD_SOURCE');
  t.regex(error.message, /not you/);
  t.regex(String(error.cause), /not you/);
});

test('a source that cannot be opened is named, and nothing is left behind', async t => {
  const client = await daemon(t);

  const thrown = await t.throwsAsync(async () =>
    serveFirecracker({ pager: client, socketPath: `${folder(t)}/vm.sock`, memory: '/nonexistent/image' }),
  );

  t.is((thrown as NodeJS.ErrnoException).code, 'ERR_UFFD_SOURCE');
  t.regex(thrown.message, /nonexistent/);
});

test('a pager of this process is as good as none for a server', async t => {
  if (!canRun(t)) return;
  const pager = Pager.create();
  const { path, bytes } = image(t, IMAGE_SIZE);
  const socketPath = `${folder(t)}/vm.sock`;
  const server = await serveFirecracker({ pager, socketPath, memory: path });
  const peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();

  t.is((await peer.ask('read', 0, 8)).hex, bytes.subarray(0, 8).toString('hex'));
  await server.close();
  await pager.close();
});

test('another client finds the sessions, may end them, and leaves the daemon as it was', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer, session } = await connect();

  const second = await PagerClient.connect(client.socketPath);
  const [found] = second.sessions;

  t.is(found?.id, session.id);
  t.is(found?.peer.pid, peer.pid);
  await found?.close({ rest: 'populate' });
  t.is((await session.closed).reason, 'closed');
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  await second.close();
  t.true(isAlive(client.daemonPid));
});

test('a daemon that was spawned ends with its client: both processes, the socket, the directory', async t => {
  const client = await daemon(t);
  const { socketPath, daemonPid, holderPid = 0 } = client;
  t.is(statSync(socketPath).mode & 0o777, 0o600);
  t.true(isAlive(daemonPid) && isAlive(holderPid));

  await client.close();

  t.false(isAlive(daemonPid) || isAlive(holderPid));
  t.false(existsSync(socketPath));
  await t.throwsAsync(async () => PagerClient.connect(socketPath), { code: 'ERR_UFFD_SOCKET' });
});

test('a client that disconnects leaves its sessions to the daemon', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const second = await PagerClient.connect(client.socketPath);
  const { path, bytes } = image(t, 2 * MiB);
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${2 * MiB}`);
  await second.adopt(uffd, { source: fileSource(path), regions, pidfd });

  second.disconnect();

  await until(() => client.sessions.length === 1, 'the first client hears of the session');
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
});

test('sessions and clients leave nothing open in a daemon', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const round = async (): Promise<void> => {
    const second = await PagerClient.connect(client.socketPath);
    const { connect, server } = await remotely(t, second);
    const { peer, session } = await connect();
    await peer.ask('touch', 'order=random', 'seed=1', 'limit=50');
    peer.kill();
    await session.closed;
    await server.close();
    await second.close();
  };
  await round();
  await until(() => !openIn(client.daemonPid).some(path => path.includes('image')), 'the image is closed');
  const before = openIn(client.daemonPid).toSorted();

  for (let n = 0; n < 5; n += 1) await round();

  await until(() => openIn(client.daemonPid).length === before.length, 'nothing more is open than before');
  t.deepEqual(openIn(client.daemonPid).toSorted(), before);
});

/** Speaks to a daemon by hand. */
async function talk(path: string, ...lines: string[]): Promise<string[]> {
  const socket = createConnection(path);
  await once(socket, 'connect');
  const said: string[] = [];
  const reader = createInterface({ input: socket }).on('line', line => said.push(line));
  for (const line of lines) socket.write(`${line}\n`);
  await until(() => said.length >= lines.length || socket.closed, 'everything is answered');
  reader.close();
  socket.destroy();
  return said;
}

const hello = (protocol: number): string =>
  JSON.stringify({
    jsonrpc: '2.0',
    id: 1,
    method: 'hello',
    params: { protocol, client: 'by hand', futile: {} },
  });

test('a protocol that is not spoken is refused with the one that is', async t => {
  const client = await daemon(t);

  const [answer = ''] = await talk(client.socketPath, hello(7));

  const { error } = JSON.parse(answer) as { error: { data: { code: string }; message: string } };
  t.is(error.data.code, 'ERR_UFFD_UNSUPPORTED');
  t.regex(error.message, /protocol 7 is not spoken .* which speaks 1/);
});

test('words of a later version are passed over, unknown methods are refused by name', async t => {
  const client = await daemon(t);

  const [greeting = '', unknown = '', early = ''] = [
    ...(await talk(client.socketPath, hello(1), '{"jsonrpc":"2.0","id":2,"method":"session.fly","later":1}')),
    ...(await talk(client.socketPath, '{"jsonrpc":"2.0","id":3,"method":"session.stats"}')),
  ];

  t.is((JSON.parse(greeting) as { result: { protocol: number } }).result.protocol, 1);
  t.regex(unknown, /-32601.*session\.fly/);
  t.regex(early, /-32600.*hello/);
});

test('lines that are no requests are answered, and hurt nobody', async t => {
  const client = await daemon(t);

  const said = await talk(
    client.socketPath,
    hello(1),
    'GET / HTTP/1.1',
    '[]',
    '{"jsonrpc":"2.0","id":4,"method":"session.adopt","params":{"regions":7}}',
    '{"jsonrpc":"2.0","id":5,"method":"session.stats","params":{"session":99}}',
  );

  t.regex(said[1] ?? '', /-32700/);
  t.regex(said[2] ?? '', /-32600/);
  t.regex(said[3] ?? '', /-32602/);
  t.regex(said[4] ?? '', /ERR_UFFD_USE_AFTER_CLOSE/);
  t.deepEqual(client.sessions, []);
});

test('a line without an end is cut off, and the daemon goes on', async t => {
  const client = await daemon(t);
  const socket = createConnection(client.socketPath);
  await once(socket, 'connect');
  socket.on('error', () => {});
  const closed = new Promise(resolve => {
    socket.once('close', resolve);
  });

  const piece = Buffer.alloc(MiB, 'x');
  for (let n = 0; n < 64 && socket.writable; n += 1) socket.write(piece);

  await closed;
  t.is((await PagerClient.connect(client.socketPath)).closed, false);
});

test('connections beyond the most there may be wait; those that say nothing are closed', async t => {
  const client = await daemon(t);
  const silent = Array.from({ length: 80 }, () => createConnection(client.socketPath));
  for (const socket of silent) socket.on('error', () => {});
  t.teardown(() => silent.forEach(socket => socket.destroy()));

  const late = await PagerClient.connect(client.socketPath);

  t.true(isAlive(client.daemonPid));
  await late.close();
});

test('a daemon that is no daemon is refused by name', async t => {
  const path = `${folder(t)}/other.sock`;
  const server = createServer(socket => socket.end('220 mail.example ESMTP\r\n')).listen(path);
  await once(server, 'listening');
  t.teardown(() => server.close());

  const thrown = await t.throwsAsync(async () => PagerClient.connect(path));

  t.is((thrown as NodeJS.ErrnoException).code, 'ERR_UFFD_PAGER_LOST');
});

test('a daemon that cannot start says why', async t => {
  const socketPath = `${folder(t)}/absent/pager.sock`;

  const thrown = await t.throwsAsync(async () => PagerClient.spawn({ socketPath }));

  t.is((thrown as NodeJS.ErrnoException).code, 'ERR_UFFD_SOCKET');
  t.regex(thrown.message, /did not start: .*directory must exist/);
});

test('another user is refused by a daemon, unless it was told otherwise', async t => {
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can become another user');
    t.pass();
    return;
  }
  const directory = folder(t);
  const client = await daemon(t, { socketPath: `${directory}/pager.sock` });
  const stranger = async (): Promise<string> => (await program(t, 'stranger', client.socketPath)).said;
  chmodSync(directory, 0o755);
  t.regex(await stranger(), /^ERR_UFFD_SOCKET .*EACCES/, 'the socket is private');

  chmodSync(client.socketPath, 0o666);
  t.regex(await stranger(), /^ERR_UFFD_PEER_NOT_ALLOWED .*uid 65534/, 'and whoever gets through is asked');
});
