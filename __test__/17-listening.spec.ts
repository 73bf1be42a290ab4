// How a server ends when its sessions may go on, and one whose socket somebody else has made.

import { spawn } from 'node:child_process';
import { closeSync, existsSync, fstatSync, openSync } from 'node:fs';
import { createServer } from 'node:net';
import { constants } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { once } from 'node:events';

import test, { type ExecutionContext } from 'ava';
import { MiB, serveFirecracker, UffdError } from 'userfaultfd';

import { Peer } from '../examples/support/peer.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE, resources, serving } from './helpers/serving.js';

const ACTIVATED = fileURLToPath(new URL('fixtures/activated.js', import.meta.url));
const NOBODY = 65_534;
const { EAFNOSUPPORT, EBADF, ENOTSOCK } = constants.errno;

test('a server that drains takes nobody new, serves whom it has, and ends with the last of them', async t => {
  if (!canRun(t)) return;
  const before = resources();
  const { connect, server, socketPath, bytes } = await serving(t);
  const one = await connect();
  const two = await connect();

  const drained = server.drain();
  one.peer.kill();
  await one.session.closed;

  t.false(existsSync(socketPath), 'nobody finds it any more');
  t.is(
    (await two.peer.ask('read', 9 * PAGE, 16)).hex,
    bytes.subarray(9 * PAGE, 9 * PAGE + 16).toString('hex'),
  );
  t.false(server.closed);
  two.peer.kill();
  await drained;
  t.true(server.closed);
  t.is((await two.session.closed).reason, 'peer-exited');
  await Promise.all([one.peer.ended, two.peer.ended]);
  t.deepEqual(resources(), before);
  await server.close();
  await server.drain();
  await t.throwsAsync(server.accept(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('a server without sessions has drained at once, and whoever waits for one hears of it', async t => {
  const before = resources();
  const { server } = await serving(t);
  const waiting = server.accept();

  await Promise.all([
    server.drain({ timeout: 10_000 }),
    t.throwsAsync(waiting, { code: 'ERR_UFFD_USE_AFTER_CLOSE' }),
  ]);

  t.deepEqual(resources(), before);
});

test('draining ends with ERR_UFFD_TIMEOUT, or the reason of its signal, and leaves the sessions running', async t => {
  if (!canRun(t)) return;
  const { connect, server, memory } = await serving(t);
  const { peer, session } = await connect();

  const late = await t.throwsAsync(server.drain({ timeout: 20 }), { instanceOf: UffdError });
  t.is(late.code, 'ERR_UFFD_TIMEOUT');
  t.regex(late.message, /1 sessions? did not end within 20 ms/);
  const controller = new AbortController();
  const waiting = server.drain({ signal: controller.signal });
  controller.abort(new Error('no longer wanted'));
  await t.throwsAsync(waiting, { message: 'no longer wanted' });

  t.is((await peer.ask('compare', memory)).different, 0, 'it is still served');
  t.deepEqual(server.sessions, [session]);
  await server.close({ rest: 'populate' });
  t.is((await session.closed).reason, 'closed');
});

test('a process that was asked about when its server drained is still served', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  let decide!: (path: string) => void;
  const decided = new Promise<string>(resolve => {
    decide = resolve;
  });
  let asked!: () => void;
  const asking = new Promise<void>(resolve => {
    asked = resolve;
  });
  const { start, server } = await serving(t, {
    memory: async () => {
      asked();
      return decided;
    },
  });
  const peer = start('--region', `${IMAGE_SIZE}`);
  await asking;

  const drained = server.drain();
  decide(path);

  await peer.ready();
  t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
  peer.kill();
  await drained;
});

for (const [what, options, code, message] of [
  ['a misspelt option', { timeuot: 1 }, 'ERR_INVALID_ARG_VALUE', /`timeuot` in `options`/],
  ['options that are none', null, 'ERR_INVALID_ARG_TYPE', /`options`/],
  ['a negative timeout', { timeout: -1 }, 'ERR_OUT_OF_RANGE', /options\.timeout/],
  ['a timeout that is no number', { timeout: '1' }, 'ERR_INVALID_ARG_TYPE', /options\.timeout/],
  ['a signal that is none', { signal: {} }, 'ERR_INVALID_ARG_TYPE', /options\.signal/],
] as const) {
  test(`drain and accept refuse ${what} by name, and do nothing`, async t => {
    const { server, socketPath } = await serving(t);

    await t.throwsAsync(server.drain(options as never), { code, message });
    await t.throwsAsync(server.accept(options as never), { code, message });

    t.true(existsSync(socketPath));
  });
}

/** A service with an inherited socket: what it says, line by line, and how to end it. */
async function activated(
  t: ExecutionContext,
  uid = '',
): Promise<{
  socketPath: string;
  bytes: Buffer;
  line: () => Promise<object>;
  end: () => void;
  ended: Promise<unknown>;
}> {
  const { path, bytes } = image(t);
  const socketPath = join(folder(t), 's');
  const manager = spawn(process.execPath, [ACTIVATED, 'manager', path, socketPath, uid], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  t.teardown(() => manager.stdin.destroy());
  const lines = createInterface({ input: manager.stdout })[Symbol.asyncIterator]();
  const line = async (): Promise<object> => JSON.parse(String((await lines.next()).value)) as object;
  t.deepEqual(await line(), { listening: true });
  return { socketPath, bytes, line, end: () => manager.stdin.end('end\n'), ended: once(manager, 'exit') };
}

test('a server may inherit a listening socket: it serves who connects, and closes it without removing its path', async t => {
  if (!canRun(t)) return;
  const { socketPath, bytes, line, end, ended } = await activated(t);
  // It may connect before anybody takes its connection: that is what such sockets are for.
  const peer = new Peer(['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  t.teardown(() => peer.kill());
  await peer.ready();

  t.is((await peer.ask('read', 5 * PAGE, 16)).hex, bytes.subarray(5 * PAGE, 5 * PAGE + 16).toString('hex'));
  t.deepEqual(await line(), { socketPath });
  t.deepEqual(await line(), { session: peer.pid });
  end();
  t.deepEqual(await line(), { open: false });
  t.deepEqual(await ended, [0, null]);
  t.true(existsSync(socketPath));
  t.is((await peer.ask('probe', 100 * PAGE)).result, 'efault', 'what was missing is poisoned');
});

test('who connects to an inherited socket is checked as well', async t => {
  if (!canRun(t)) return;
  const { socketPath, line, end, ended } = await activated(t, `${NOBODY}`);
  t.deepEqual(await line(), { socketPath });
  const peer = new Peer(['--socket', socketPath, '--region', `${PAGE}`]);
  t.teardown(() => peer.kill());

  t.deepEqual(await line(), { rejected: 'ERR_UFFD_PEER_NOT_ALLOWED' });
  end();
  await ended;
});

test('a descriptor that is no listening Unix stream socket is refused by name, and stays open', async t => {
  const memory = image(t, MiB).path;
  const tcp = createServer().listen(0, '127.0.0.1');
  await once(tcp, 'listening');
  t.teardown(() => tcp.close());
  const { fd: tcpFd } = Reflect.get(tcp, '_handle') as { fd: number };
  const file = openSync('/dev/null', 'r');
  for (const [fd, errno] of [
    [file, ENOTSOCK],
    [tcpFd, EAFNOSUPPORT],
    [1_000_000_000, EBADF],
  ] as const) {
    const error = await t.throwsAsync(serveFirecracker({ fd, memory }), { instanceOf: UffdError });
    t.is(error.code, 'ERR_UFFD_SOCKET', error.message);
    t.is(error.errno, errno);
    t.regex(error.message, new RegExp(`descriptor ${fd}`));
  }
  fstatSync(file);
  fstatSync(tcpFd);
  closeSync(file);
});

for (const [what, options, code, message] of [
  ['neither a path nor a descriptor', {}, 'ERR_INVALID_ARG_TYPE', /options\.socketPath/],
  [
    'a path and a descriptor',
    { socketPath: '/tmp/s', fd: 3 },
    'ERR_INVALID_ARG_VALUE',
    /options\.socketPath.*options\.fd/,
  ],
  ['a negative descriptor', { fd: -1 }, 'ERR_OUT_OF_RANGE', /options\.fd.*got -1/],
  ['a descriptor that is a string', { fd: '3' }, 'ERR_INVALID_ARG_TYPE', /options\.fd.*got '3'/],
] as const) {
  test(`${what} to listen on is refused by name`, async t => {
    await t.throwsAsync(serveFirecracker({ memory: 'image', ...options } as never), { code, message });
  });
}
