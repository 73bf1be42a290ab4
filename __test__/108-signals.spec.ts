/** What signals that end a program leave to the processes it serves. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  cpSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';
import { GiB, MiB } from 'userfaultfd';

import { Peer } from '../examples/support/peer.js';
import { handedOver } from './helpers/adopting.js';
import { canRun, folder, image, PAGE } from './helpers/serving.js';

const FIXTURE = fileURLToPath(new URL('fixtures/signalled.js', import.meta.url));
const ENTRY = import.meta.resolve('userfaultfd');
const SIZE = 2 * MiB;
/** Milliseconds. */
const LIMIT = 20_000;

interface Program {
  child: ChildProcess;
  next: () => Promise<string>;
  /** Its status, and the signal that has ended it. */
  ended: Promise<unknown[]>;
}

function start(
  t: ExecutionContext,
  args: readonly string[],
  { fd = 'ignore', by = [] }: { fd?: number | 'ignore'; by?: readonly string[] } = {},
): Program {
  // Without an answer, a process waits for ever.
  t.timeout(LIMIT);
  const [command = '', ...rest] = [...by, process.execPath, FIXTURE, ...args];
  const child = spawn(command, rest, {
    stdio: ['pipe', 'pipe', 'inherit', fd],
    timeout: LIMIT,
    killSignal: 'SIGKILL',
  });
  t.teardown(() => child.kill('SIGKILL'));
  if (!child.stdout) throw new Error('it has no output');
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  return {
    child,
    next: async () => String((await lines.next()).value),
    ended: once(child, 'exit'),
  };
}

function peerAt(t: ExecutionContext, socketPath: string, size: number = SIZE): Peer {
  const peer = new Peer(['--socket', socketPath, '--region', `${size}`]);
  t.teardown(() => peer.kill());
  return peer;
}

/** A program with a server, and a process that it serves. */
async function serving(
  t: ExecutionContext,
  how: string,
  size = SIZE,
  by: readonly string[] = [],
): Promise<Program & { peer: Peer }> {
  const path = join(folder(t), 'image');
  writeFileSync(path, Buffer.alloc(PAGE, 7));
  truncateSync(path, size);
  const socketPath = join(folder(t), 's');
  const program = start(t, [how, ENTRY, path, socketPath], { by });
  t.is(await program.next(), 'listens');
  const peer = peerAt(t, socketPath, size);
  await peer.ready();
  t.is(await program.next(), 'serves');
  t.is((await peer.ask('read', 0, 8)).hex, '0707070707070707');
  return { ...program, peer };
}

for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGUSR2', 'SIGALRM'] as const) {
  test(`a program that ${signal} ends leaves no zeros and no hang`, async t => {
    if (!canRun(t)) return;
    const { child, ended, peer } = await serving(t, 'server');

    child.kill(signal);

    t.deepEqual(await ended, [null, signal]);
    t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
    t.is((await peer.ask('read', 0, 8)).hex, '0707070707070707');
  });
}

test('the first process of a container ends by SIGTERM, too, after its policy, and not by what it never hears of', async t => {
  if (!canRun(t)) return;
  const by = ['unshare', '--pid', '--fork', '--kill-child'];
  if (spawnSync('unshare', [...by.slice(1), 'true']).status !== 0)
    return t.log('skipped: there can be no namespace of processes here');
  const { child, ended, peer } = await serving(t, 'server', SIZE, by);
  const first = Number(readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'utf8'));

  process.kill(first, 'SIGUSR2');
  t.is((await peer.ask('read', 0, 8)).hex, '0707070707070707');
  t.is((await peer.ask('read', 3 * PAGE, 8)).hex, '0000000000000000', 'it is served, a hole of the image');
  process.kill(first, 'SIGTERM');

  t.deepEqual(await ended, [128 + constants.signals.SIGTERM, null]);
  t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
});

for (const [how, what] of [
  ['blocked', 'has a blocked event loop'],
  ['worker', 'serves in a worker only'],
  ['raises', 'raises it again, as `signal-exit` does'],
  ['closes', 'has closed another server'],
] as const) {
  test(`a signal leaves no zeros and no hang where the program ${what}`, async t => {
    if (!canRun(t)) return;
    const { child, next, ended, peer } = await serving(t, how);
    if (how === 'blocked') {
      child.stdin?.write('now');
      t.is(await next(), 'blocked');
    }

    child.kill('SIGTERM');

    t.deepEqual(await ended, [null, 'SIGTERM']);
    t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
  });
}

for (const how of ['listens', 'listens once']) {
  test(`a program that ${how} to a signal decides itself`, async t => {
    if (!canRun(t)) return;
    const { child, next, ended, peer } = await serving(t, how);

    child.kill('SIGTERM');

    t.is(await next(), 'mine');
    t.is((await peer.ask('probe', 9 * PAGE)).result, 'ok');
    if (how === 'listens') return;
    child.kill('SIGTERM');
    t.deepEqual(await ended, [null, 'SIGTERM']);
    t.is((await peer.ask('probe', 10 * PAGE)).result, 'efault');
  });
}

test('signals that come while memory is being poisoned do not end the program before it is', async t => {
  if (!canRun(t)) return;
  const size = 2 * GiB;
  const { child, ended, peer } = await serving(t, 'server', size);

  // Until it is over.
  while (child.kill('SIGTERM')) await setTimeout(2);

  t.deepEqual(await ended, [null, 'SIGTERM']);
  t.is((await peer.ask('probe', size - PAGE)).result, 'efault');
});

test('two copies of the package in one program each leave no zeros and no hang', async t => {
  if (!canRun(t)) return;
  const root = fileURLToPath(new URL('../../', import.meta.url));
  const copy = folder(t);
  for (const name of readdirSync(root)) {
    if (/^(?:dist|package\.json|native\.cjs|.*\.node)$/.test(name)) {
      cpSync(join(root, name), join(copy, name), { recursive: true });
    }
  }
  symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
  const sockets = ['1', '2'].map(name => join(copy, name));
  const { path } = image(t, SIZE);
  const [first = '', second = ''] = sockets;
  const { child, next, ended } = start(t, ['two', ENTRY, path, first, second, join(copy, 'dist/index.js')]);
  t.is(await next(), 'listens');
  const peers = sockets.map(socket => peerAt(t, socket));
  for (const peer of peers) await peer.ready();
  t.is(await next(), 'serves');
  t.is(await next(), 'serves');

  child.kill('SIGTERM');

  t.deepEqual(await ended, [null, 'SIGTERM']);
  for (const peer of peers) t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
});

for (const how of ['pager', 'handler', 'adopted']) {
  test(`memory whose userfaultfd was adopted is poisoned when a signal comes (${how})`, async t => {
    if (!canRun(t)) return;
    const { peer, uffd, regions } = await handedOver(t, `--region ${SIZE}`);
    const { path } = image(t, SIZE);
    const [region] = regions;
    const fd = uffd.releaseFd();
    const { child, next, ended } = start(t, [how, ENTRY, path, `${region?.address}`, `${region?.length}`], {
      fd,
    });
    closeSync(fd);
    t.is(await next(), 'listens');
    const waits = peer.ask('probe', 9 * PAGE);
    if (how === 'pager') t.is((await waits).result, 'ok');
    else await untilSomebodyWaits(child.pid);

    child.kill('SIGTERM');

    t.deepEqual(await ended, [null, 'SIGTERM']);
    const probe = how === 'pager' ? peer.ask('probe', SIZE - PAGE) : waits;
    t.is((await probe).result, 'efault');
  });
}

async function untilSomebodyWaits(pid: number | undefined): Promise<void> {
  for (;;) {
    const infos = readdirSync(`/proc/${pid}/fdinfo`).map(fd =>
      readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8'),
    );
    if (infos.some(info => /^total:\t[1-9]/m.test(info))) return;
    await setTimeout(1);
  }
}

test('a program that serves nobody any more has signals as it had before', async t => {
  if (!canRun(t)) return;
  const caught = (): bigint =>
    BigInt(`0x${/^SigCgt:\t(\w+)/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1]}`);
  const { SIGHUP } = constants.signals;
  const isCaught = (): boolean => (caught() & (1n << BigInt(SIGHUP - 1))) !== 0n;
  const before = caught();
  const { serveFirecracker } = await import('userfaultfd');
  const { path } = image(t, SIZE);
  const counts = (): number[] => ['SIGTERM', 'SIGHUP'].map(signal => process.listenerCount(signal));
  const listeners = counts();

  const server = await serveFirecracker({ socketPath: join(folder(t), 's'), memory: path });
  t.true(isCaught());
  t.deepEqual(counts(), listeners);
  await server.close();

  t.is(caught(), before);
});
