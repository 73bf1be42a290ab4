// `record` through a daemon, which opens no file: what faults wanted comes to the file all the same, whoever dies meanwhile.

import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
} from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  callbackSource,
  fileSource,
  KiB,
  MemoryMapping,
  PagerClient,
  serveFirecracker,
  type Session,
  Trace,
} from 'userfaultfd';

import type { Peer } from '../examples/support/peer.js';
import { handedOver } from './helpers/adopting.js';
import { daemon, isAlive, killed, openIn, remotely, startPeer, until } from './helpers/daemon.js';
import { mapped, pageOf } from './helpers/faults.js';
import { Serve } from './helpers/serve.js';
import { canRun, folder, image, IMAGE_SIZE, nextRejection, PAGE } from './helpers/serving.js';

/** Page by page, so that a recording has what was touched and no more. */
const window = 4 * KiB;

const touched = (trace: Trace): number[] => [...trace].map(({ offset }) => offset / PAGE);

async function touch(peer: Peer, ...pages: number[]): Promise<void> {
  for (const page of pages) await peer.ask('read', page * PAGE, 8);
}

const threadsOf = (pid: number): string[] =>
  readdirSync(`/proc/${pid}/task`).map(task => readFileSync(`/proc/${pid}/task/${task}/comm`, 'utf8').trim());

/** Memory of a peer that a daemon serves and records. */
async function adopted(
  t: ExecutionContext,
  client: PagerClient,
  options: { record: string },
): Promise<{ peer: Peer; session: Session; path: string }> {
  const { path } = image(t);
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${IMAGE_SIZE}`);
  const session = await client.adopt(uffd, { source: fileSource(path), regions, pidfd, window, ...options });
  return { peer, session, path };
}

test('what a session of a daemon wanted is in the file when its end is told', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const inside = folder(t);
  const record = join(inside, 'run.trace');
  const { peer, session, path } = await adopted(t, client, { record });
  await touch(peer, 40, 3, 1700);
  await until(() => session.stats().recording?.faults === 3, 'the faults are counted');
  t.like(session.stats().recording, { state: 'recording', path: record, dropped: 0, full: false });
  t.deepEqual(readdirSync(inside), [], 'a file of that name is whole');

  await session.close({ rest: 'populate' });

  const trace = await Trace.read(record);
  t.deepEqual(touched(trace), [40, 3, 1700]);
  t.like(trace, { end: 'complete', dropped: 0, pageSize: PAGE, imageSize: IMAGE_SIZE });
  t.true([...trace].every(({ latency, kind }) => latency > 0 && kind === 'missing'));
  await trace.check(fileSource(path));
  t.like(session.stats().recording, { state: 'written', faults: 3, dropped: 0, full: false });
  t.deepEqual(readdirSync(inside), ['run.trace']);
  await until(
    () => !openIn(client.daemonPid).some(name => name.includes('uffd-recording')),
    'it is let go of',
  );
  t.false(openIn(client.holderPid ?? 0).some(name => name.includes('uffd-recording')));
});

test('stopRecording() of a session of a daemon: the file is whole, and the session goes on', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const record = join(folder(t), 'run.trace');
  const { peer, session } = await adopted(t, client, { record });
  await touch(peer, 7);

  await session.stopRecording();

  t.like(session.stats().recording, { state: 'written', faults: 1 });
  t.deepEqual(touched(await Trace.read(record)), [7]);
  await touch(peer, 8);
  await session.stopRecording();
  await session.close({ rest: 'populate' });
  t.is((await Trace.read(record)).length, 1);
  await t.throwsAsync(session.stopRecording(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  const { path } = image(t);
  const plain = await remotely(t, client, { memory: path });
  const { session: other } = await plain.connect();
  await t.throwsAsync(other.stopRecording(), { code: 'ERR_UFFD_UNSUPPORTED' });
  t.is(other.stats().recording, undefined);
});

test('a recording can be ended by another client than the one that has asked for it: each has the file then', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const record = join(folder(t), 'run.trace');
  const { peer, session } = await adopted(t, client, { record });
  await touch(peer, 7, 70);
  const other = await PagerClient.connect(client.socketPath);
  t.teardown(() => other.disconnect());
  const [found] = other.sessions;

  await found?.stopRecording();

  t.deepEqual(touched(await Trace.read(record)), [7, 70]);
  t.like(found?.stats().recording, { state: 'written', faults: 2 });
  await until(() => session.stats().recording?.state === 'written', 'it is told to who has asked for it');
  t.deepEqual(touched(await Trace.read(record)), [7, 70]);
  t.deepEqual(await client.recordings(), []);
  await session.close({ rest: 'populate' });
  t.like(session.stats().recording, { state: 'written', faults: 2 });
});

test('sessions of a server in a daemon are recorded, also those that a function has chosen an image for', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const inside = folder(t);
  const [all, chosen] = [join(inside, 'all.trace'), join(inside, 'chosen.trace')];
  const one = await remotely(t, client, { record: all, window });
  const first = await one.connect();
  await touch(first.peer, 5, 900);
  first.peer.kill();
  t.is((await first.session.closed).reason, 'peer-exited');
  t.deepEqual(touched(await Trace.read(all)), [5, 900]);

  const { memory } = one;
  const asked = await remotely(t, client, {
    memory: () => ({ memory, record: chosen }),
    record: all,
    window,
  });
  const second = await asked.connect();
  await touch(second.peer, 9);
  await asked.server.close({ rest: 'zero' });
  t.deepEqual(touched(await Trace.read(chosen)), [9]);
  t.is((await second.session.closed).reason, 'closed');

  const wrong = await remotely(t, client, { memory: () => ({ memory, record: join(inside, 'no/folder') }) });
  const rejected = nextRejection(wrong.server);
  void wrong.connect().catch(() => {});
  t.is((await rejected).error.code, 'ERR_UFFD_TRACE');
});

test('memory of this process that a daemon serves is recorded, from a source in JavaScript', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const record = join(folder(t), 'own.trace');
  const bytes = pageOf(5, 64);
  const source = callbackSource(async (offset, length) => bytes.subarray(offset, offset + length), {
    size: bytes.length,
    chunk: 4 * KiB,
  });
  const mapping = mapped(t, MemoryMapping.anonymous(bytes.length));
  const session = await client.serve(mapping, { source, record, window });
  for (const page of [60, 2]) await mapping.read(page * PAGE, 1);

  await session.close({ rest: 'zero' });

  t.deepEqual(touched(await Trace.read(record)), [60, 2]);
});

test('a file that cannot be made is refused before a daemon serves, and told when it is lost later', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const inside = folder(t);
  const before = openIn(client.daemonPid).length;
  const { path } = image(t);
  const { uffd, regions, pidfd, peer } = await handedOver(t, `--region ${IMAGE_SIZE}`);
  const options = { source: fileSource(path), regions, pidfd, window };
  const refused = client.adopt(uffd, { ...options, record: join(inside, 'no/such') });
  t.like(await t.throwsAsync(refused), { code: 'ERR_UFFD_TRACE', syscall: 'open' });
  t.deepEqual(client.sessions, []);
  await t.throwsAsync(remotely(t, client, { record: join(inside, 'no/such') }), { code: 'ERR_UFFD_TRACE' });

  const record = join(inside, 'taken');
  const session = await client.adopt(uffd, { ...options, record });
  await touch(peer, 1);
  mkdirSync(join(record, 'by'), { recursive: true });
  const warned = new Promise<Error>(resolve => {
    process.once('warning', resolve);
  });
  await session.close({ rest: 'populate' });
  t.like(session.stats().recording, { state: 'failed', error: { code: 'ERR_UFFD_TRACE' } });
  t.like(await warned, { code: 'ERR_UFFD_TRACE' });

  // The daemon has it still, for whoever can write it.
  const [left] = await client.recordings();
  t.like(left, { session: session.id, path: record, state: 'whole', attended: true });
  rmdirSync(join(record, 'by'));
  rmdirSync(record);
  await left?.write();
  t.deepEqual(touched(await Trace.read(record)), [1]);
  t.deepEqual(await client.recordings(), []);
  await left?.write();
  options.source.close();
  await until(() => openIn(client.daemonPid).length === before, 'nothing is left of it');
});

test('a disk that hangs holds up no end: that the recording is not there is told after 5 seconds', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const inside = folder(t);
  const record = join(inside, 'run.trace');
  const { session } = await adopted(t, client, { record });
  // Each of these holds a thread that reads or writes files, until somebody writes to it.
  const pipes = Array.from({ length: 16 }, (_, nth) => join(inside, `pipe-${nth}`));
  execFileSync('mkfifo', pipes);
  const reading = pipes.map(async path => t.throwsAsync(Trace.read(path), { code: 'ERR_UFFD_TRACE' }));
  process.once('warning', () => {});

  await session.close({ rest: 'populate' });

  t.like(session.stats().recording, { state: 'failed', error: { code: 'ERR_UFFD_TIMEOUT' } });
  for (const path of pipes) closeSync(openSync(path, 'w'));
  await Promise.all(reading);
  await until(() => existsSync(record), 'it comes late');
  const [left] = await client.recordings();
  await left?.write();
  t.like(await Trace.read(record), { length: 0, end: 'complete' });
});

test('a recording whose program is dead is kept by the daemon until another asks for it', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { socketPath, daemonPid } = client;
  client.disconnect();
  t.teardown(async () => (await PagerClient.connect(socketPath)).shutdown());
  const record = join(folder(t), 'vm.trace');
  const { path: memory } = image(t);
  const socket = join(folder(t), 'vm.sock');
  const args = ['--socket', socket, '--memory', memory, '--pager', socketPath, '--record', record];
  const serve = new Serve(t, args);
  await serve.next('listening');
  const peers = [0, 1].map(() => startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]));
  for (const peer of peers) {
    await peer.ready();
    await serve.next('session');
    await touch(peer, 30, 1700);
  }
  serve.child.kill('SIGKILL');
  await serve.ended;

  // Who is there when a session ends writes what nobody else will.
  const [first, second] = peers as [Peer, Peer];
  const other = await PagerClient.connect(socketPath);
  const another = await PagerClient.connect(socketPath);
  const [ending] = other.sessions.filter(({ peer }) => peer.pid === first.pid);
  await first.exit();
  await ending?.closed;
  t.is((await Trace.read(record)).length, 2);
  t.like(ending?.stats().recording, { state: 'written', faults: 2, error: undefined });
  await until(() => another.sessions.length === 1, 'each has written it, or seen that it is');
  rmSync(record);
  other.disconnect();
  another.disconnect();

  await second.exit();
  const recorders = (): string[] => threadsOf(daemonPid).filter(name => name === 'uffd-record');
  await until(() => recorders().length === 0, 'it has come to its end');
  const third = await PagerClient.connect(socketPath);
  t.teardown(() => third.disconnect());
  t.like(await third.recordings(), [{ path: record, state: 'whole', attended: false }]);
  t.false(existsSync(record), 'nobody has asked for it');

  // The program is started again, on the same socket.
  const again = new Serve(t, args);
  await again.next('listening');
  await until(() => existsSync(record), 'it is written');
  // With the windows that are the default.
  t.is((await Trace.read(record)).length, 2);
});

test('a daemon that dies leaves what it has recorded: the file ends there, says so, and the session goes on', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const record = join(folder(t), 'run.trace');
  const { connect, server } = await remotely(t, client, { record, window });
  const { peer, session } = await connect();
  await touch(peer, 1, 2, 3);
  // Blocks are written when they are a second old.
  const written = (): number => session.stats().recording?.bytes ?? 0;
  const head = 64;
  await until(() => written() > head, 'they are written');

  await killed(client);
  await until(() => session.stats().recording?.state === 'torn', 'it is told');

  const { recording } = session.stats();
  t.like(recording, { path: record, faults: 3, error: { code: 'ERR_UFFD_TRACE' } });
  t.like(await Trace.read(record), { end: 'torn', length: 3 });
  await touch(peer, 4);
  await t.throwsAsync(session.stopRecording(), { code: 'ERR_UFFD_TRACE', message: /daemon/ });
  t.deepEqual(await client.recordings(), []);
  // Who comes later is recorded as before, to the same file.
  const later = await connect();
  await touch(later.peer, 8);
  await later.session.close({ rest: 'zero' });
  t.deepEqual(touched(await Trace.read(record)), [8]);
  const warned = new Promise<Error>(resolve => {
    process.once('warning', resolve);
  });
  await server.close({ rest: 'zero' });
  t.like(await warned, { code: 'ERR_UFFD_TRACE' });
  t.is(session.stats().recording?.state, 'torn');
});

test('a recording that is over when its daemon dies is not lost', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const inside = folder(t);
  const record = join(inside, 'run.trace');
  const { peer, session } = await adopted(t, client, { record });
  await touch(peer, 6, 5);
  mkdirSync(join(record, 'by'), { recursive: true });
  process.once('warning', () => {});
  await session.close({ rest: 'populate' });

  await killed(client);

  rmdirSync(join(record, 'by'));
  rmdirSync(record);
  const [left] = await client.recordings();
  t.like(left, { session: session.id, state: 'whole', path: record });
  await left?.write();
  t.like(await Trace.read(record), { length: 2, end: 'complete' });
});

const STOPS: Record<string, (client: PagerClient) => Promise<void>> = {
  'shutdown()': async client => client.shutdown({ rest: 'zero' }),
  'the end of its service': async ({ holderPid = 0 }) => {
    process.kill(holderPid, 'SIGTERM');
    await until(() => !isAlive(holderPid), 'the daemon has ended');
  },
};

for (const [what, stop] of Object.entries(STOPS)) {
  test(`${what} waits for the files of the recordings that it ends`, async t => {
    if (!canRun(t)) return;
    const client = await daemon(t, { reconnectTimeout: 500 });
    const record = join(folder(t), 'run.trace');
    const { connect } = await remotely(t, client, { record, window });
    const { peer, session } = await connect();
    await touch(peer, 6, 5);

    await stop(client);

    t.deepEqual(touched(await Trace.read(record)), [6, 5]);
    await session.closed;
    t.like(session.stats().recording, { state: 'written', faults: 2 });
  });
}

test('a recording ends with as many faults as there are: none at all', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const inside = folder(t);
  const record = join(inside, 'run.trace');
  const { session } = await adopted(t, client, { record });
  await session.close({ rest: 'populate' });
  t.like(await Trace.read(record), { length: 0, end: 'complete' });
  chmodSync(inside, 0o700);
  await t.throwsAsync(
    serveFirecracker({ pager: client, socketPath: join(inside, 's'), memory: record, cpu: 0 }),
    {
      code: 'ERR_UFFD_UNSUPPORTED',
    },
  );
});
