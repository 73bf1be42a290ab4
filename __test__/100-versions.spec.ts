// Who may use a daemon, and which versions of it and of this package go together: they work, or say why not.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, closeSync, statSync } from 'node:fs';
import { createConnection, createServer, type Socket } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

import test, { type ExecutionContext } from 'ava';
import { MiB, PagerClient, sendFds, serveFirecracker, zeroSource } from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { daemon, EXECUTABLE, isAlive, until } from './helpers/daemon.js';
import { program } from './helpers/programs.js';
import { canRun, folder, image, PAGE } from './helpers/serving.js';

test('another user is let in by --allow-uid, and no other', async t => {
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can become another user');
    t.pass();
    return;
  }
  const directory = folder(t);
  chmodSync(directory, 0o755);
  const socketPath = join(directory, 'pager.sock');
  const args = ['--socket', socketPath, '--allow-uid', '65534', '--allow-uid', '65532'];
  const holder = spawn(EXECUTABLE, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  t.teardown(async () => {
    holder.kill('SIGTERM');
    await until(() => !isAlive(holder.pid ?? 0), 'the holder has ended');
  });
  await once(createInterface({ input: holder.stdout }), 'line');
  const stranger = async (uid: string): Promise<string> =>
    (await program(t, 'stranger', socketPath, uid)).said;

  t.is(statSync(socketPath).mode & 0o777, 0o666);
  t.is(await stranger('65534'), 'connected');
  t.is(await stranger('65532'), 'connected');
  t.is(await stranger('0'), 'connected', 'its own user always may');
  t.regex(await stranger('65533'), /^ERR_UFFD_PEER_NOT_ALLOWED .*uid 65533/);
});

/** Speaks the protocol as the first client did: none of what came later. */
class FirstClient {
  readonly #socket: Socket;
  readonly #lines: AsyncIterator<string>;
  #last = 0;

  constructor(socket: Socket) {
    this.#socket = socket;
    this.#lines = createInterface({ input: socket })[Symbol.asyncIterator]();
  }

  async ask(method: string, params: object, fds: number[] = []): Promise<Record<string, unknown>> {
    this.#last += 1;
    const line = `${JSON.stringify({ jsonrpc: '2.0', id: this.#last, method, params, fds: fds.length })}\n`;
    if (fds.length === 0) this.#socket.write(line);
    else await sendFds(fdOf(this.#socket), fds, Buffer.from(line));
    for (;;) {
      const { value } = (await this.#lines.next()) as { value: string };
      const { id, result, error } = JSON.parse(value) as {
        id?: number;
        result?: Record<string, unknown>;
        error?: Record<string, unknown>;
      };
      if (id === this.#last) return error ?? result ?? {};
    }
  }
}

/** The descriptor of a socket. */
const fdOf = (socket: Socket): number => (Reflect.get(socket, '_handle') as { fd: number }).fd;

test('a client as it was at first is served by a daemon of today', async t => {
  if (!canRun(t)) return;
  const { socketPath } = await daemon(t);
  const socket = createConnection(socketPath);
  await once(socket, 'connect');
  t.teardown(() => socket.destroy());
  const client = new FirstClient(socket);
  const { uffd, regions, peer } = await handedOver(t, `--region ${MiB}`);

  t.like(await client.ask('hello', { protocol: 1, version: '1', client: 'first' }), {
    protocol: 1,
    takeover: true,
  });
  await client.ask('source.open', { source: 1, description: { kind: 'zero', size: MiB } });
  const { session } = await client.ask(
    'session.adopt',
    {
      uffd: 0,
      source: 1,
      regions: regions.map(region => ({ ...region, address: `0x${region.address.toString(16)}` })),
      pageSize: PAGE,
      sourceTimeout: 30_000,
      missing: true,
      writeProtect: false,
      onFailure: { kind: 'poison' },
      mode: 'windows',
    },
    [uffd.fd],
  );
  closeSync(uffd.releaseFd());

  t.is((await peer.ask('zeros')).nonzero, 0);
  t.is((await peer.ask('read', 5 * PAGE, 4)).hex, '00000000');
  t.deepEqual(await client.ask('session.close', { session, rest: 'zero' }), {});
});

interface Asked {
  id: number;
  method: string;
  params: Record<string, unknown>;
}

/** A daemon of another version, as far as it goes: it answers what it knows. */
async function otherDaemon(
  t: ExecutionContext,
  answers: Record<string, (params: Record<string, unknown>) => object>,
): Promise<{ path: string; asked: string[] }> {
  const path = join(folder(t), 'pager.sock');
  const asked: string[] = [];
  const server = createServer(socket => {
    t.teardown(() => socket.destroy());
    createInterface({ input: socket }).on('line', line => {
      const { id, method, params } = JSON.parse(line) as Asked;
      asked.push(method);
      const unknown = { error: { code: -32_601, message: `there is no method "${method}" in protocol 1` } };
      const answer = answers[method]?.(params) ?? unknown;
      socket.write(`${JSON.stringify({ jsonrpc: '2.0', id, ...answer })}\n`);
    });
  }).listen(path);
  await once(server, 'listening');
  t.teardown(() => server.close());
  return { path, asked };
}

/** What the first daemon said to a hello. */
const FIRST = {
  protocol: 1,
  version: '0.1.0',
  pid: 1,
  holder: 2,
  takeover: true,
  sessions: [],
  servers: [],
  ends: [],
};

test('a daemon as it was at first is used by a client of today, which says what it lacks', async t => {
  const { path, asked } = await otherDaemon(t, {
    hello: () => ({ result: FIRST }),
    'source.open': () => ({ result: {} }),
    'firecracker.serve': () => ({ result: { server: 5, socketPath: '/somewhere' } }),
    'firecracker.close': () => ({
      error: { code: -32_000, message: 'closed', data: { code: 'ERR_UFFD_USE_AFTER_CLOSE' } },
    }),
  });
  const client = await PagerClient.connect(path);
  t.is(client.daemonPid, 1);
  t.deepEqual(client.sessions, []);

  t.deepEqual(await client.servers(), []);
  const server = await serveFirecracker({
    pager: client,
    socketPath: join(folder(t), 'vm.sock'),
    memory: zeroSource(PAGE),
  });
  t.is(server.socketPath, '/somewhere');
  const thrown = await t.throwsAsync(async () => client.ends(), { code: 'ERR_UFFD_PROTOCOL' });
  t.regex(thrown.message, /there is no method "session\.ends"/);
  t.is((thrown as { hint?: string }).hint, 'The daemon is older than this package.');

  t.true(asked.includes('firecracker.serve'));
  await server.close();
  client.disconnect();
});

for (const [what, answer, code, message] of [
  [
    'refuses the protocol',
    {
      error: {
        code: -32_000,
        message: 'protocol 1 is not spoken by userfaultfd-pagerd 9.0.0, which speaks 2',
        data: { code: 'ERR_UFFD_UNSUPPORTED' },
      },
    },
    'ERR_UFFD_UNSUPPORTED',
    /pagerd 9\.0\.0, which speaks 2/,
  ],
  [
    'answers in another',
    { result: { ...FIRST, protocol: 2 } },
    'ERR_UFFD_UNSUPPORTED',
    /speaks protocol 2, and this package 1/,
  ],
  ['answers as no daemon does', { result: { pong: true } }, 'ERR_UFFD_PROTOCOL', /is no userfaultfd-pagerd/],
  [
    'knows no hello',
    { error: { code: -32_601, message: 'no such method' } },
    'ERR_UFFD_PROTOCOL',
    /no such method/,
  ],
] as const) {
  test(`a daemon that ${what} is refused, and it is said why`, async t => {
    const { path } = await otherDaemon(t, { hello: () => answer });

    const thrown = await t.throwsAsync(async () => PagerClient.connect(path), { code });

    t.regex(thrown.message, message);
  });
}

test('what a later daemon tells is passed over where it is not known', async t => {
  const later = {
    ...FIRST,
    weather: 'fair',
    sessions: [],
    servers: [{ id: 9, socketPath: '', owner: 'x', more: 1 }],
  };
  const { path } = await otherDaemon(t, {
    hello: () => ({ result: later }),
    'firecracker.list': () => ({ result: { servers: later.servers, more: true } }),
    'session.ends': () => ({
      result: { ends: [{ kind: 'ended', at: 1000, id: 3, reason: 'closed', mood: 'good' }] },
    }),
  });
  const client = await PagerClient.connect(path);

  t.like((await client.servers())[0], { id: 9, socketPath: '', image: undefined, attended: true });
  t.deepEqual(await client.ends(), [{ id: 3, reason: 'closed', at: new Date(1000) }]);
  client.disconnect();
});

test('an image of today is described so that a daemon as it was at first understands it', async t => {
  let described: Record<string, unknown> | undefined;
  const { path: memory } = image(t);
  const { path } = await otherDaemon(t, {
    hello: () => ({ result: FIRST }),
    'source.open': params => {
      described = params;
      return { result: {} };
    },
    'firecracker.serve': () => ({ result: { server: 5, socketPath: '/somewhere' } }),
  });
  const client = await PagerClient.connect(path);

  await serveFirecracker({ pager: client, socketPath: join(folder(t), 'vm.sock'), memory });

  t.deepEqual(described, { source: 1, description: { kind: 'file', path: memory, fd: 0 } });
  client.disconnect();
});
