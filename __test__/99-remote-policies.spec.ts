// What becomes of memory that cannot be served, where a daemon serves it: the same as in this process, and a take-over changes nothing.

import { spawn } from 'node:child_process';
import { chownSync, copyFileSync, truncateSync } from 'node:fs';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

import test, { type ExecutionContext } from 'ava';
import {
  callbackSource,
  type FailurePolicy,
  fileSource,
  MiB,
  type Pager,
  PagerClient,
  serveFirecracker,
  type Session,
  type SessionFailure,
  type SessionHold,
} from 'userfaultfd';

import type { Peer } from '../examples/support/peer.js';

import { handedOver } from './helpers/adopting.js';
import { daemon, EXECUTABLE, isAlive, killed, remotely, startPeer, until } from './helpers/daemon.js';
import { canRun, folder, image, IMAGE_SIZE, nextRejection, PAGE } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

type Remote = Awaited<ReturnType<typeof remotely>>;

/** A process that a daemon serves from a file, which is gone, and a copy of that. */
async function spoiled(
  t: ExecutionContext,
  options: NonNullable<Parameters<typeof remotely>[2]>,
): Promise<Remote & { peer: Peer; session: Session; copy: string }> {
  const remote = await remotely(t, await daemon(t), { window: PAGE, ...options });
  const copy = join(folder(t), 'copy');
  copyFileSync(remote.memory, copy);
  const { peer, session } = await remote.connect();
  await peer.ask('touch', 'limit=64');
  truncateSync(remote.memory, 0);
  return { ...remote, peer, session, copy };
}

async function heldIn(session: Session): Promise<SessionHold> {
  await until(() => session.held !== undefined, 'it is held');
  return session.held as SessionHold;
}

test("a daemon's 'hold': who waits goes on from another source, as nothing had happened", async t => {
  if (!canRun(t)) return;
  const { peer, session, copy, server } = await spoiled(t, { onFailure: 'hold' });
  const told = once(server, 'held');
  peer.send('compare', copy);
  const hold = await heldIn(session);
  t.deepEqual(await told, [session, hold]);
  t.is(hold.reason, 'source-failed');
  t.is(hold.error?.code, 'ERR_UFFD_SOURCE');

  await session.resume({ source: fileSource(copy) });

  t.is((await peer.answer<'compare'>()).different, 0);
  t.is(session.held, undefined);
  t.is(session.stats().pagesPoisoned, 0);
});

test('what a daemon holds is held by the next, and goes on from there', async t => {
  if (!canRun(t)) return;
  const { client, peer, session, copy, server } = await spoiled(t, { onFailure: 'hold' });
  let told = 0;
  server.on('held', () => (told += 1));
  peer.send('compare', copy);
  const hold = await heldIn(session);

  await killed(client);
  await killed(client);

  t.is(session.held, hold);
  const other = await PagerClient.connect(client.socketPath);
  t.like(other.sessions[0]?.held, { reason: 'source-failed', error: { code: 'ERR_UFFD_SOURCE' } });
  await session.resume({ source: fileSource(copy) });
  t.is((await peer.answer<'compare'>()).different, 0);
  t.is(told, 1, 'it was told once');
  await until(() => other.sessions[0]?.held === undefined, 'who looks on hears that it goes on');
  other.disconnect();
});

test('what is held without a daemon being there to hear of it is told to who connects again', async t => {
  if (!canRun(t)) return;
  const { client, peer, session } = await spoiled(t, { onFailure: 'hold', holdTimeout: 60_000 });
  const third = await PagerClient.connect(client.socketPath);
  peer.send('read', IMAGE_SIZE - PAGE, 8);
  const { until: moment } = await heldIn(session);

  await killed(client);

  await until(() => third.sessions[0]?.held !== undefined, 'it is told here, too');
  const again = third.sessions[0]?.held?.until;
  t.true(Math.abs((again?.getTime() ?? 0) - (moment?.getTime() ?? 0)) < 1_000, 'the time it has goes on');
  third.disconnect();
  await session.close({ rest: 'poison' });
  t.is((await peer.ended).signal, 'SIGBUS');
});

test("a daemon's hold that lasts too long ends in poison, whichever daemon there is then", async t => {
  if (!canRun(t)) return;
  const { client, peer, session } = await spoiled(t, { onFailure: 'hold', holdTimeout: 300 });
  peer.send('probe', IMAGE_SIZE - PAGE);
  await heldIn(session);

  await killed(client);

  t.is((await peer.answer<'probe'>()).result, 'efault');
  t.is((await session.closed).reason, 'source-failed');
});

for (const [policy, signal] of [
  ['poison', 'SIGBUS'],
  ['kill', 'SIGKILL'],
] as const) {
  test(`a daemon applies a policy, and asks a function for it: ${policy}`, async t => {
    if (!canRun(t)) return;
    const asked: SessionFailure[] = [];
    const onFailure = async (failure: SessionFailure): Promise<FailurePolicy> => {
      asked.push(failure);
      return Promise.resolve(policy);
    };
    for (const how of [policy, onFailure]) {
      const { peer, session } = await spoiled(t, { onFailure: how });
      peer.send('touch');
      t.is((await peer.ended).signal, signal);
      const end = await session.closed;
      t.is(end.reason, 'source-failed');
      t.is(end.error?.code, 'ERR_UFFD_SOURCE');
      if (how === onFailure) t.is(asked[0]?.session, session);
    }
    t.is(asked.length, 1);
    t.like(asked[0], { reason: 'source-failed', error: { code: 'ERR_UFFD_SOURCE' } });
    t.false(asked[0]?.signal.aborted);
  });
}

for (const [what, onFailure, warning] of [
  [
    'throws',
    () => {
      throw new Error('no idea');
    },
    /no idea/,
  ],
  ['never answers', async () => new Promise<FailurePolicy>(() => {}), undefined],
] as const) {
  test.serial(`a function that a daemon asks and that ${what}: what is missing is poisoned`, async t => {
    if (!canRun(t)) return;
    const warnings: string[] = [];
    const listen = ({ message }: Error): void => void warnings.push(message);
    process.on('warning', listen);
    t.teardown(() => process.off('warning', listen));
    const { peer, session } = await spoiled(t, { onFailure, decisionTimeout: 100 });

    t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault');

    t.is((await session.closed).error?.code, 'ERR_UFFD_SOURCE');
    t.is(
      warnings.some(message => warning?.test(message)),
      warning !== undefined,
    );
  });
}

test('an answer that a function gives after the daemon was replaced counts, and it is asked once', async t => {
  if (!canRun(t)) return;
  let asked = 0;
  let answer: ((policy: FailurePolicy) => void) | undefined;
  const { client, peer, session, copy } = await spoiled(t, {
    decisionTimeout: 60_000,
    onFailure: async () => {
      asked += 1;
      return new Promise(resolve => {
        answer = resolve;
      });
    },
  });
  peer.send('compare', copy);
  await until(() => answer !== undefined, 'the function is asked');

  await killed(client);
  answer?.('hold');

  await heldIn(session);
  t.is(asked, 1);
  await session.resume({ source: fileSource(copy) });
  t.is((await peer.answer<'compare'>()).different, 0);
});

/** A daemon that runs as somebody else, who may not signal this test's processes. */
async function byNobody(t: ExecutionContext): Promise<PagerClient> {
  const NOBODY = 65_534;
  const home = folder(t);
  const [executable, socket] = [join(home, 'pagerd'), join(home, 'pager.sock')];
  copyFileSync(EXECUTABLE, executable);
  chownSync(home, NOBODY, NOBODY);
  const holder = spawn(executable, ['--socket', socket, '--allow-uid', '0'], {
    uid: NOBODY,
    gid: NOBODY,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  t.teardown(async () => {
    holder.kill('SIGTERM');
    await until(() => !isAlive(holder.pid ?? 0), 'the holder has ended');
  });
  await once(createInterface({ input: holder.stdout }), 'line');
  const client = await PagerClient.connect(socket);
  t.teardown(() => client.disconnect());
  return client;
}

test("a daemon that may not kill says so before it serves, down to the kernel's word", async t => {
  if (!canRun(t)) return;
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can become another user');
    t.pass();
    return;
  }
  const { server, socketPath } = await remotely(t, await byNobody(t), {
    peer: { uid: 0 },
    onFailure: 'kill',
  });
  const rejected = nextRejection(server);
  const peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);

  const { error } = await rejected;

  t.is(error.code, 'ERR_UFFD_NOT_PERMITTED');
  t.like(error.cause, { code: 'EPERM', errno: 1 });
  await peer.ready();
  t.is((await peer.ask('probe', 0)).result, 'efault');
});

test("a function that says 'kill' of a process which the daemon may not kill: it is poisoned", async t => {
  if (!canRun(t)) return;
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can become another user');
    t.pass();
    return;
  }
  const client = await byNobody(t);
  const { uffd, regions, pidfd } = await handedOver(t, `--region ${MiB}`);
  const { path } = image(t);
  await t.throwsAsync(
    async () => client.adopt(uffd, { source: fileSource(path), onFailure: 'kill', regions, pidfd }),
    { code: 'ERR_UFFD_PEER_NOT_ALLOWED' },
    'a process that is not the client itself is not a stranger’s to name',
  );

  const { connect, memory } = await remotely(t, client, {
    window: PAGE,
    peer: { uid: 0 },
    onFailure: () => 'kill',
  });
  const { peer, session } = await connect();
  await peer.ask('touch', 'limit=64');
  truncateSync(memory, 0);

  peer.send('touch');

  t.is((await peer.ended).signal, 'SIGBUS');
  t.is((await session.closed).reason, 'source-failed');
});

for (const where of ['this process', 'a daemon'] as const) {
  const pagerIn = async (t: ExecutionContext): Promise<Pager | PagerClient> => {
    if (where === 'a daemon') return daemon(t);
    const pager = pagerOf(t);
    return pager;
  };

  test(`a session of ${where} says that it is held as soon as hold() has resolved`, async t => {
    if (!canRun(t)) return;
    const pager = await pagerIn(t);
    const { path } = image(t, MiB);
    const { uffd, regions, pidfd, peer } = await handedOver(t, `--region ${MiB}`);
    const session = await pager.adopt(uffd, { source: fileSource(path), regions, pidfd });

    for (let n = 0; n < 50; n += 1) {
      await session.hold();
      t.is(session.held?.reason, 'asked');
      if (n % 2 === 0) await session.hold();
      await session.resume();
      t.is(session.held, undefined);
    }

    t.is((await peer.ask('read', 0, 8)).hex.length, 16);
    await session.close({ rest: 'zero' });
    await t.throwsAsync(session.hold(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  });

  test(`a source that takes longer than a server of ${where} allows is stalled`, async t => {
    if (!canRun(t)) return;
    const pager = await pagerIn(t);
    const never = callbackSource(async () => new Promise<never>(() => {}), { size: MiB, timeout: 60_000 });
    t.teardown(() => never.close());
    for (const own of [false, true]) {
      const socketPath = join(folder(t), 'vm.sock');
      const server = await serveFirecracker({
        pager,
        socketPath,
        ...(own
          ? { memory: () => ({ memory: never, sourceTimeout: 50 }) }
          : { memory: never, sourceTimeout: 50 }),
      });
      const peer = startPeer(t, ['--socket', socketPath, '--region', `${MiB}`]);
      const session = await server.accept({ timeout: 10_000 });
      await peer.ready();
      const started = performance.now();
      t.is((await peer.ask('probe', 0)).result, 'efault');
      t.true(performance.now() - started < 10_000);
      const end = await session.closed;
      t.is(end.reason, 'stalled');
      t.regex(end.error?.message ?? '', /within 50 ms/);
      await server.close();
    }
  });

  test(`an error of ${where} leads by its causes to what was thrown, or what the kernel has said`, async t => {
    if (!canRun(t)) return;
    const pager = await pagerIn(t);
    const missing = await t.throwsAsync(async () =>
      serveFirecracker({ pager, socketPath: join(folder(t), 'vm.sock'), memory: '/nonexistent/image' }),
    );
    t.like(missing, { code: 'ERR_UFFD_SOURCE', cause: { code: 'ENOENT', syscall: 'open' } });

    const nowhere = await t.throwsAsync(async () =>
      serveFirecracker({ pager, socketPath: '/nonexistent/vm.sock', memory: image(t).path }),
    );
    t.like(nowhere, { code: 'ERR_UFFD_SOCKET', cause: { code: 'ENOENT', errno: 2, syscall: 'stat' } });
    t.true(nowhere.cause instanceof Error);

    const source = callbackSource(
      () => {
        throw new Error('the store is down', { cause: new Error('no route') });
      },
      { size: MiB, retries: 0 },
    );
    const { uffd, regions, pidfd, peer } = await handedOver(t, `--region ${MiB}`);
    const session = await pager.adopt(uffd, { source, regions, pidfd });
    t.is((await peer.ask('probe', 0)).result, 'efault');
    const { error } = await session.closed;
    t.like(error, {
      code: 'ERR_UFFD_SOURCE',
      cause: { message: 'the store is down', cause: { message: 'no route' } },
    });
  });
}
