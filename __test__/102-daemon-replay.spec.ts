// `replay` through a daemon, which has neither the recording's file nor the image's: what an earlier run wanted is there before it is asked for.

import { on, once } from 'node:events';
import { existsSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { createConnection, createServer } from 'node:net';
import { createInterface } from 'node:readline';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  bufferSource,
  callbackSource,
  fileSource,
  KiB,
  MemoryMapping,
  Pager,
  PagerClient,
  type PageSource,
  sendFds,
  type ServeOptions,
  type Session,
  Trace,
} from 'userfaultfd';

import { fdOf, handedOver } from './helpers/adopting.js';
import { daemon, killed, openIn, promised, remotely, startPeer, until } from './helpers/daemon.js';
import { mapped, pageOf } from './helpers/faults.js';
import { Serve } from './helpers/serve.js';
import { canRun, folder, image, IMAGE_SIZE, nextRejection, PAGE } from './helpers/serving.js';

const window = 4 * KiB;

/** The recording of a run that touches these pages of an image; made by this process. */
async function recording(t: ExecutionContext, source: PageSource, pages: number[]): Promise<string> {
  const record = join(folder(t), 'run.trace');
  const mapping = mapped(t, MemoryMapping.anonymous(IMAGE_SIZE));
  const pager = Pager.create();
  const session = await pager.serve(mapping, { source, record, window });
  for (const page of pages) await mapping.read(page * PAGE, 1);
  await session.close({ rest: 'zero' });
  await pager.close();
  return record;
}

interface Answer {
  id: number;
  error?: { message: string; data?: { code: string } };
}

/** Something that answers a client as a daemon would; what it is asked is told without the greeting. */
async function fake(
  t: ExecutionContext,
  path: string,
  answer: (method: string, params: { offset?: number }) => object,
): Promise<{ client: PagerClient; say: (message: object) => void; asked: () => string[] }> {
  const methods: string[] = [];
  let say: (message: object) => void = () => {};
  const server = createServer(socket => {
    say = message => void socket.write(`${JSON.stringify(message)}\n`);
    createInterface({ input: socket }).on('line', line => {
      const { id, method, params } = JSON.parse(line) as { id: number; method: string; params: object };
      methods.push(method);
      const welcome = { protocol: 1, pid: 1, sessions: [], servers: [], ends: [], recordings: [] };
      say({
        jsonrpc: '2.0',
        id,
        result: { ...(method === 'hello' ? welcome : {}), ...answer(method, params) },
      });
    });
  }).listen(path);
  await once(server, 'listening');
  t.teardown(() => server.close());
  const client = await PagerClient.connect(path);
  t.teardown(() => client.disconnect());
  return { client, say: message => say(message), asked: () => methods.slice(1) };
}

/** Descriptors of what is replayed, in a daemon and its holder. */
const plans = ({ daemonPid, holderPid = 0 }: PagerClient): number =>
  [daemonPid, holderPid].flatMap(pid => openIn(pid)).filter(name => name.includes('uffd-replay')).length;

test('what an earlier run wanted is there by a daemon, without a fault, and nothing else', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t);
  const source = fileSource(path);
  const replay = await recording(t, source, [1700, 3, 4, 77]);
  for (const given of [replay, await Trace.read(replay)]) {
    const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${IMAGE_SIZE}`);
    const session = await client.adopt(uffd, { source, regions, pidfd, window, replay: given });

    await session.replayed();

    t.is(session.mode, 'replay');
    t.is((await peer.ask('resident')).pages, 4);
    await until(() => session.stats().replay?.done === true, 'it is told');
    t.like(session.stats(), {
      faults: 0,
      pagesPrefetched: 4,
      replay: { pages: 4, installed: 4, late: 0, missed: 0, done: true, heldBack: 0 },
    });
    const { hex } = await peer.ask('read', 10 * PAGE, 16);
    t.is(hex, bytes.subarray(10 * PAGE, 10 * PAGE + 16).toString('hex'));
    await until(() => session.stats().replay?.missed === 1, 'it is told that one was missed');
    t.is((await peer.ask('compare', path)).different, 0);
    await session.close({ rest: 'zero' });
  }
  await until(() => plans(client) === 0, 'what was replayed is let go of');
});

test('a fault that comes before its replay by a daemon is late, and nobody waits for the rest', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { bytes, path } = image(t);
  const replay = await recording(t, fileSource(path), [100, 200, 300]);
  const gate = promised<undefined>();
  const asked = promised<undefined>();
  const source = callbackSource(
    async (offset, length) => {
      // None of these is looked at to tell the image from others.
      if ([100, 200, 300].includes(offset / PAGE)) {
        asked.resolve(undefined);
        await gate.promise;
      }
      return bytes.subarray(offset, offset + length);
    },
    { size: bytes.length, chunk: window },
  );
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${IMAGE_SIZE}`);
  const session = await client.adopt(uffd, { source, regions, pidfd, window, replay });
  await asked.promise;
  peer.send('read', 300 * PAGE, 8);
  await until(() => session.stats().faults > 0, 'it waits for what is on its way already');
  gate.resolve(undefined);
  t.is((await peer.answer<'read'>()).hex, bytes.subarray(300 * PAGE, 300 * PAGE + 8).toString('hex'));
  t.is(
    (await peer.ask('read', 900 * PAGE, 8)).hex,
    bytes.subarray(900 * PAGE, 900 * PAGE + 8).toString('hex'),
  );
  await session.replayed();
  t.is((await peer.ask('compare', path)).different, 0);
  await session.close({ rest: 'zero' });
  const { installed = 0, late = 0, missed = 0, pages = 0 } = session.stats().replay ?? {};
  t.deepEqual([late, installed + late], [1, pages]);
  t.true(missed >= 1, `${missed}`);
});

test('a recording of another image, a damaged one, or none is refused, and a daemon has nothing of it', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path } = image(t);
  const other = image(t);
  const replay = await recording(t, fileSource(path), [1, 2]);
  const wrong = await recording(t, fileSource(other.path), [1, 2]);
  const short = await recording(t, fileSource(path), [1]);
  truncateSync(short, 40);
  const { uffd, regions, pidfd, peer } = await handedOver(t, `--region ${IMAGE_SIZE}`);
  const source = fileSource(path);
  const before = openIn(client.daemonPid).length;
  const refused = async (options: Partial<ServeOptions>, code: string): Promise<void> => {
    const adopting = client.adopt(uffd, { source, regions, pidfd, ...options });
    await t.throwsAsync(adopting, { code }, JSON.stringify(options));
  };
  await refused({ replay: wrong }, 'ERR_UFFD_TRACE_IMAGE');
  await refused({ replay: await Trace.read(wrong) }, 'ERR_UFFD_TRACE_IMAGE');
  await refused({ replay: short }, 'ERR_UFFD_TRACE');
  await refused({ replay: `${replay}.gone` }, 'ERR_UFFD_TRACE');
  t.deepEqual(client.sessions, []);
  await t.throwsAsync(remotely(t, client, { replay }), { code: 'ERR_UFFD_TRACE_IMAGE' });
  t.deepEqual(await client.servers(), []);

  const chosen = await remotely(t, client, { memory: () => ({ memory: other.path, replay }) });
  const rejected = nextRejection(chosen.server);
  const turnedAway = startPeer(t, ['--socket', chosen.socketPath, '--region', `${IMAGE_SIZE}`]);
  t.is((await rejected).error.code, 'ERR_UFFD_TRACE_IMAGE');
  turnedAway.kill();
  await chosen.server.close();

  // The same memory is served all the same.
  const session = await client.adopt(uffd, { source, regions, pidfd, replay });
  await session.replayed();
  t.is((await peer.ask('compare', path)).different, 0);
  await session.close({ rest: 'zero' });
  source.close();
  await until(() => openIn(client.daemonPid).length <= before, 'nothing is left of it');
});

test('each process of a server in a daemon finds what an earlier one wanted, also after the daemon was replaced', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const record = join(folder(t), 'vm.trace');
  const first = await remotely(t, client, { record, window });
  const earlier = await first.connect();
  for (const page of [5, 900, 17]) await earlier.peer.ask('read', page * PAGE, 8);
  await earlier.session.close({ rest: 'zero' });
  await first.server.close();
  const { memory } = first;

  const all = await remotely(t, client, { memory, replay: record });
  const replayed = async ({ session, peer }: Awaited<ReturnType<typeof all.connect>>): Promise<void> => {
    await session.replayed();
    t.is(session.mode, 'replay');
    t.is((await peer.ask('resident')).pages, 3);
    t.is((await peer.ask('compare', memory)).different, 0);
  };
  const before = await all.connect();
  await replayed(before);
  await killed(client);
  await replayed(await all.connect());
  await before.session.replayed();
  t.like(before.session.stats().replay, { pages: 3, installed: 3, done: true });
  await killed(client);
  await replayed(await all.connect());

  const chosen = await remotely(t, client, { memory: () => ({ memory, replay: record, mode: 'replay' }) });
  await replayed(await chosen.connect());
  await all.server.close({ rest: 'zero' });
  await chosen.server.close({ rest: 'zero' });
  await until(() => plans(client) === 0, 'what was replayed is let go of');
});

test('a replay goes on where its daemon was killed, with what is missing then', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t);
  const pages = Array.from({ length: 200 }, (_, nth) => nth * 8);
  const replay = await recording(t, fileSource(path), pages);
  // Some come, the others wait for the gate.
  let left = 6;
  let served = false;
  const gate = promised<undefined>();
  const source = callbackSource(
    async (offset, length) => {
      if (served && (left -= 1) < 0) await gate.promise;
      return bytes.subarray(offset, offset + length);
    },
    { size: bytes.length, chunk: 256 * KiB },
  );
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${IMAGE_SIZE}`);
  const trace = await Trace.read(replay);
  await trace.check(source);
  served = true;
  const session: Session = await client.adopt(uffd, { source, regions, pidfd, window, replay: trace });
  const over = session.replayed();
  await until(() => left < 0 && (session.stats().replay?.installed ?? 0) > 0, 'some of it is there');

  await killed(client);
  gate.resolve(undefined);
  await over;

  await until(() => session.stats().replay?.done === true, 'it is told');
  t.like(session.stats(), { faults: 0, replay: { pages: 200, installed: 200, late: 0, missed: 0 } });
  t.is((await peer.ask('resident')).pages, 200);
  t.is((await peer.ask('compare', path)).different, 0);
});

test('serve --pager --record and --replay: what one program has had recorded, the next one has there', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const record = join(folder(t), 'vm.trace');
  const socket = join(folder(t), 'vm.sock');
  const { path: memory } = image(t);
  const args = ['--socket', socket, '--memory', memory, '--pager', client.socketPath];
  const recorded = new Serve(t, [...args, '--record', record]);
  await recorded.next('listening');
  const first = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await first.ready();
  await first.ask('read', 800 * PAGE, 8);
  recorded.child.kill('SIGINT');
  t.like((await recorded.next('end'))['recording'], { path: record, state: 'written', faults: 1 });
  await recorded.ended;

  const replayed = new Serve(t, [...args, '--replay', record]);
  await replayed.next('listening');
  const second = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await second.ready();
  await replayed.next('session');
  const [brought] = (await Trace.read(record)).ranges();
  await until(() => client.sessions.some(({ peer }) => peer.pid === second.pid), 'it is known');
  const session = client.sessions.find(({ peer }) => peer.pid === second.pid);
  await session?.replayed();
  t.is((await second.ask('resident')).pages, (brought?.length ?? 0) / PAGE);
  replayed.child.kill('SIGINT');
  const { replay } = await replayed.next('end');
  t.like(replay, { done: true, late: 0, missed: 0 });
});

test('what is no plan of a replay, or names no image, is refused, and a daemon has nothing of it', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const socket = createConnection(client.socketPath);
  t.teardown(() => socket.destroy());
  const lines = on(createInterface({ input: socket }), 'line');
  const listening = createServer().listen(join(folder(t), 'vm.sock'));
  await once(listening, 'listening');
  t.teardown(() => listening.close());
  let last = 0;
  const ask = async (method: string, params: object, fds: number[]): Promise<Answer> => {
    last += 1;
    const line = `${JSON.stringify({ jsonrpc: '2.0', id: last, method, params, fds: fds.length })}\n`;
    if (fds.length === 0) socket.write(line);
    else await sendFds(fdOf(socket), fds, Buffer.from(line));
    while (true) {
      const { value } = (await lines.next()) as { value: [string] };
      const answer = JSON.parse(value[0]) as Answer;
      if (answer.id === last) return answer;
    }
  };
  await ask('hello', { protocol: 1, version: '0', client: 'by hand', sessions: [] }, []);
  await ask('source.open', { source: 1, description: { kind: 'zero', size: PAGE } }, []);
  const before = openIn(client.daemonPid).toSorted();
  const garbage = mapped(t, MemoryMapping.memfd(PAGE));
  const serving = { source: 1, socket: 0, handshakeTimeout: 5000, maxSessions: 1, mode: 'windows' };
  const socketFd = fdOf(listening);

  for (const [more, fds, message] of [
    [{ replay: 1 }, [socketFd, garbage.fd ?? -1], /something else/],
    [{ replay: 1 }, [socketFd, socketFd], /memfd/],
    [{ replay: 1 }, [socketFd], /did not come/],
    [{ record: { path: '/run.trace', identity: 'ab' } }, [socketFd], /64 digits/],
    [{ record: { path: '/run.trace', identity: 'zz'.repeat(32) } }, [socketFd], /64 digits/],
  ] as const) {
    const { error } = await ask('firecracker.serve', { ...serving, ...more }, [...fds]);
    t.is(error?.data?.code, 'ERR_UFFD_PROTOCOL', JSON.stringify(more));
    t.regex(error?.message ?? '', message);
  }

  const { error } = await ask('recording.read', { session: 7, offset: 0 }, []);
  t.is(error?.data?.code, 'ERR_UFFD_UNSUPPORTED');
  t.deepEqual(openIn(client.daemonPid).toSorted(), before);
  t.deepEqual(await client.servers(), []);
});

test('nothing is written to where another user would have it, nor what had to make room', async t => {
  const path = join(folder(t), 'fake.sock');
  const mine = join(folder(t), 'mine.trace');
  const foreign = join(folder(t), 'foreign.trace');
  const uid = process.geteuid?.() ?? 0;
  const told = (session: number, of: number, where: string): object => {
    return { session, path: where, owner: 'gone', uid: of, attended: false, size: 3, whole: true };
  };
  const gone = { ...told(3, uid, mine), lost: true };
  const recordings = [told(1, uid + 1, foreign), told(2, uid, mine), gone];
  // In two parts, as one that is longer than an answer.
  const part = (offset: number): object => {
    return { bytes: Buffer.from(offset === 0 ? 'abcd' : 'ef').toString('base64'), size: 6 };
  };
  const { client, say, asked } = await fake(t, path, (method, { offset = 0 }) =>
    method === 'recording.read' ? part(offset) : method === 'recording.list' ? { recordings } : {},
  );

  for (const params of recordings.slice(0, 2)) say({ jsonrpc: '2.0', method: 'recorded', params });
  await until(() => existsSync(mine), 'it is written');
  await until(() => asked().length > 2, 'it is told');

  t.is(readFileSync(mine, 'utf8'), 'abcdef');
  t.deepEqual(asked(), ['recording.read', 'recording.read', 'recording.done']);
  const [one, , lost] = await client.recordings();
  t.is(one?.uid, uid + 1);
  t.is(lost?.state, 'lost');
  await t.throwsAsync(lost?.write() ?? Promise.resolve(), { code: 'ERR_UFFD_TRACE', message: /room/ });
  await t.throwsAsync(one?.write() ?? Promise.resolve(), { code: 'ERR_UFFD_PEER_NOT_ALLOWED' });
  t.false(existsSync(foreign));
  await one?.write(`${mine}.other`);
  t.is(readFileSync(`${mine}.other`, 'utf8'), 'abcdef');
});

test('a daemon that is too old to record says so, and is asked for nothing', async t => {
  if (!canRun(t)) return;
  const path = join(folder(t), 'old.sock');
  const { client, asked } = await fake(t, path, () => ({ recordings: undefined }));
  const { uffd, regions, pidfd } = await handedOver(t, `--region ${IMAGE_SIZE}`);
  const { path: memory } = image(t);
  const trace = join(folder(t), 'a.trace');
  writeFileSync(trace, '');
  for (const options of [{ record: trace }, { replay: trace }]) {
    const old = { code: 'ERR_UFFD_UNSUPPORTED', message: /older/ };
    await t.throwsAsync(
      client.adopt(uffd, { source: bufferSource(pageOf(1)), regions, pidfd, ...options }),
      old,
    );
    await t.throwsAsync(remotely(t, client, { memory, ...options }), old);
  }
  t.deepEqual(asked(), []);
});
