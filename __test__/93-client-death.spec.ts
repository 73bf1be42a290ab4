/** Whatever becomes of Node, the daemon serves on; and what the daemon itself may do. */

import { execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';
import { type AdoptOptions, callbackSource, fileSource, MiB, PagerClient, type Session } from 'userfaultfd';

import { allowedCpus } from '../examples/support/machine.js';
import type { Peer } from '../examples/support/peer.js';

import { handedOver } from './helpers/adopting.js';
import { daemon, EXECUTABLE, isAlive, startPeer, until } from './helpers/daemon.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE } from './helpers/serving.js';

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

/** A Node of its own that has a daemon serve, both on one CPU where that is said; the daemon is ended with the test. */
async function elsewhere(
  t: ExecutionContext,
  cpu?: number,
): Promise<{ node: ReturnType<typeof spawn>; socketPath: string; vmSocket: string; bytes: Buffer }> {
  const directory = folder(t);
  const [socketPath, vmSocket] = [`${directory}/pager.sock`, `${directory}/vm.sock`];
  const { path, bytes } = image(t);
  const program = fileURLToPath(new URL('fixtures/client.js', import.meta.url));
  const words = [process.execPath, '--max-old-space-size=64', program, socketPath, vmSocket, path];
  const [command = '', ...args] = cpu === undefined ? words : ['taskset', '-c', `${cpu}`, ...words];
  const node = spawn(command, args, { stdio: ['pipe', 'pipe', 'ignore'] });
  t.teardown(async () => {
    const last = await PagerClient.connect(socketPath);
    const { daemonPid, holderPid = 0 } = last;
    await last.shutdown();
    node.kill('SIGKILL');
    await until(() => !isAlive(daemonPid) && !isAlive(holderPid), 'the daemon has ended');
  });
  if (node.stdout === null) throw new Error('a pipe is missing');
  await once(createInterface({ input: node.stdout }), 'line');
  return { node, socketPath, vmSocket, bytes };
}

for (const [what, end] of [
  ['is killed', (node: ReturnType<typeof spawn>) => node.kill('SIGKILL')],
  ['runs out of heap', (node: ReturnType<typeof spawn>) => node.stdin?.write('fill the heap\n')],
] as const) {
  test(`a Node that ${what} is noticed by nobody who is served, and another finds the sessions`, async t => {
    if (!canRun(t)) return;
    const { node, socketPath, vmSocket, bytes } = await elsewhere(t);
    const peer = startPeer(t, ['--socket', vmSocket, '--region', `${IMAGE_SIZE}`]);
    await peer.ready();
    peer.send('touch', 'order=random', 'seed=1');

    const ended = once(node, 'exit');
    end(node);
    await ended;

    t.is((await peer.answer<'touch'>()).pages, IMAGE_SIZE / PAGE);
    const later = startPeer(t, ['--socket', vmSocket, '--region', `${IMAGE_SIZE}`]);
    await later.ready();
    t.is((await later.ask('hash')).sha256, sha256(bytes), 'who comes afterwards is served as well');
    const client = await PagerClient.connect(socketPath);
    t.teardown(() => client.disconnect());
    t.deepEqual(
      client.sessions.map(session => session.peer.pid).toSorted((a, b) => a - b),
      [peer.pid, later.pid].toSorted((a, b) => a - b),
    );
    await client.sessions[0]?.close({ rest: 'populate' });
    t.is((await peer.ask('hash')).sha256, sha256(bytes));
  });
}

test('a Node that is stopped, or killed, delays no fault', async t => {
  if (!canRun(t)) return;
  // Where the kernel puts daemon and peer makes more of a difference than anything that is looked for here.
  const [cpu = 0] = allowedCpus();
  const p99 = async ({ vmSocket, bytes }: Awaited<ReturnType<typeof elsewhere>>): Promise<number> => {
    const where = ['--socket', vmSocket, '--region', `${IMAGE_SIZE}`, '--cpu', `${cpu}`];
    const peer = startPeer(t, where);
    await peer.ready();
    const { p99_ns: found } = await peer.ask('touch', 'order=random', 'seed=1');
    t.is((await peer.ask('hash')).sha256, sha256(bytes));
    peer.kill();
    await peer.ended;
    return found / 1e3;
  };
  const [undisturbed, other] = [await elsewhere(t, cpu), await elsewhere(t, cpu)];
  const compare = async (how: string): Promise<void> => {
    const [before, during]: [number[], number[]] = [[], []];
    const delayed = (): boolean => Math.min(...during) > 1.2 * Math.min(...before);
    // Whatever else runs on this machine is in both; what is lasting shows in the best of each.
    while (before.length < 2 || (before.length < 30 && delayed())) {
      before.push(await p99(undisturbed));
      during.push(await p99(other));
    }
    const [best, worst] = [before, during].map(those => Math.min(...those).toFixed(1));
    t.log(`p99 of faults: ${best} us, with Node ${how} ${worst} us`);
    t.false(delayed(), how);
  };
  other.node.kill('SIGSTOP');
  await compare('stopped');
  const ended = once(other.node, 'exit');
  other.node.kill('SIGKILL');
  await ended;
  await compare('killed');
});

test('what only a dead client could bring is the policy’s at once, and what is there stays', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const second = await PagerClient.connect(client.socketPath);
  const { bytes } = image(t, MiB);
  const source = callbackSource((offset, length) => bytes.subarray(offset, offset + length), { size: MiB });
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${MiB}`);
  await second.adopt(uffd, { source, regions, pidfd, window: 4096 });
  t.is((await peer.ask('read', 0, 8)).hex, bytes.subarray(0, 8).toString('hex'));
  await until(() => client.sessions.length === 1, 'the session is told here, too');
  const [session] = client.sessions;

  second.disconnect();
  peer.send('read', MiB - PAGE, 8);

  t.is((await peer.ended).signal, 'SIGBUS');
  t.regex((await session?.closed)?.reason ?? '', /source-failed|peer-exited/);
});

test('a daemon can open no file, run no program, and make no socket', t => {
  const tried = (level: string): Record<string, number> & { confined: Record<string, unknown> } =>
    JSON.parse(execFileSync(EXECUTABLE, ['--try-confinement', level], { encoding: 'utf8' })) as never;
  const [EPERM, EACCES] = [1, 13];

  const free = tried('off');
  t.is(free['read'], 0);
  t.is(free['run'], 0);

  const calls = tried('calls');
  t.deepEqual(calls.confined, { privileges: true, files: 'off', calls: true });
  t.deepEqual([calls['read'], calls['connect'], calls['listen'], calls['run']], [0, EPERM, EPERM, EPERM]);

  const all = tried('all');
  t.log(`Landlock is ${String(all.confined['files'])}`);
  if (!String(all.confined['files']).includes('enforced') || String(all.confined['files']).startsWith('not'))
    return;
  t.deepEqual([all['read'], all['write'], all['fdinfo']], [EACCES, EACCES, 0]);
  t.true([EPERM, EACCES].includes(all['memory'] ?? 0), 'memory of other processes');
});

test('a confined daemon joins huge pages, and says why it does not fill by them', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t, 8 * MiB);
  const served = async (options: Partial<AdoptOptions>): Promise<{ peer: Peer; session: Session }> => {
    const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${8 * MiB}`);
    const session = await client.adopt(uffd, { source: fileSource(path), regions, pidfd, ...options });
    await session.populate();
    t.is((await peer.ask('hash')).sha256, sha256(bytes));
    return { peer, session };
  };

  const { session: joined } = await served({ collapse: true });
  t.is(joined.fallback, undefined);
  await until(() => joined.stats().pagesJoined > 0, 'pages are joined');

  const { session: filled } = await served({ mode: 'huge-fill' });
  t.is(filled.mode, 'fill');
  t.is(filled.fallback?.code, 'ERR_UFFD_UNSUPPORTED');
});
