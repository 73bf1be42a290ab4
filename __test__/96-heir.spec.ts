/** Who waits for a daemon's death: its heir, with what only its table has, and the daemon that is to come. */

import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { createConnection } from 'node:net';

import test, { type ExecutionContext } from 'ava';
import { capabilities, fileSource, type PagerClient, type Session } from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { daemon, isAlive, killed, openIn, remotely, startPeer, until } from './helpers/daemon.js';
import { canRun, image, IMAGE_SIZE, PAGE } from './helpers/serving.js';

/** Fork and remove events. */
const FOLLOWING = 'a';
const SIZE = 64 * PAGE;

/** The children of a process that have this name. */
function childrenOf(pid: number, name: string): number[] {
  const children = readdirSync(`/proc/${pid}/task`).flatMap(task => {
    try {
      return readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').split(' ').filter(Boolean);
    } catch {
      return [];
    }
  });
  return children.map(Number).filter(child => {
    try {
      return readFileSync(`/proc/${child}/comm`, 'utf8') === `${name}\n` && isAlive(child);
    } catch {
      return false;
    }
  });
}

const heirOf = (daemonPid: number): number | undefined => childrenOf(daemonPid, 'uffd-heir')[0];

async function heir(pid: number, other?: number): Promise<number> {
  let found: number | undefined;
  await until(() => (found = heirOf(pid)) !== undefined && found !== other, 'the daemon has an heir');
  return found ?? 0;
}

/** Whether a thread waits for one descriptor only, as who sends does where there is no room. */
function sends(pid: number): boolean {
  const [, , waitedFor] = readFileSync(`/proc/${pid}/task/${pid}/syscall`, 'utf8').split(' ');
  return waitedFor === '0x1';
}

/** Stops the holder, and fills what leads there: from now on the daemon can hand nothing over. */
async function mute(t: ExecutionContext, client: PagerClient): Promise<() => void> {
  const holder = client.holderPid ?? 0;
  const resume = (): void => {
    if (isAlive(holder)) process.kill(holder, 'SIGCONT');
  };
  process.kill(holder, 'SIGSTOP');
  t.teardown(resume);
  const socket = createConnection(client.socketPath);
  socket.on('error', () => {}).resume();
  await once(socket, 'connect');
  const say = (id: number, method: string, params: object): boolean =>
    socket.write(`${JSON.stringify({ jsonrpc: '2.0', id, method, params })}\n`);
  say(0, 'hello', { protocol: 1, version: '0.0.0', client: 'talkative', sessions: [] });
  for (let source = 1; source <= 2000; source += 1) {
    say(source, 'source.open', { source, description: { kind: 'zero', size: PAGE } });
  }
  await until(() => sends(client.daemonPid), 'nothing more goes to the holder');
  t.teardown(() => socket.destroy());
  return resume;
}

/** Kills the daemon while it can tell the holder nothing; another takes over. */
async function killedMute(client: PagerClient, resume: () => void): Promise<void> {
  const before = client.daemonPid;
  process.kill(before, 'SIGKILL');
  resume();
  await until(() => client.daemonPid !== before, 'another daemon is there');
}

for (const first of ['the first', 'a second'] as const) {
  test(`a child whose fork the daemon had read when it was killed is served by the next, with ${first} heir`, async t => {
    if (!canRun(t)) return;
    if (!capabilities().ptrace) {
      t.log('skipped: event-fork needs CAP_SYS_PTRACE');
      t.pass();
      return;
    }
    const client = await daemon(t);
    const { path, bytes } = image(t, SIZE);
    const handed = await handedOver(t, `--region ${SIZE} --features ${FOLLOWING}`);
    const { uffd, pidfd, regions, peer } = handed;
    const session = await client.adopt(uffd, { source: fileSource(path), regions, pidfd, window: PAGE });
    await peer.ask('read', 0, 8);
    if (first === 'a second') {
      const one = await heir(client.daemonPid);
      process.kill(one, 'SIGKILL');
      await heir(client.daemonPid, one);
    }
    const heard = once(client, 'session') as Promise<[Session]>;
    const resume = await mute(t, client);
    // Its message is read, and the daemon waits for the holder to take what it has to say of it.
    await peer.ask('fork');

    await killedMute(client, resume);

    const [child] = await heard;
    t.is(child.parent, session.id);
    peer.send('child', 'read', 9 * PAGE, 16);
    const read = (await peer.answer<'read'>()).hex;
    t.is(read, bytes.subarray(9 * PAGE, 9 * PAGE + 16).toString('hex'), 'no zeros');
    t.is(
      (await peer.ask('read', 10 * PAGE, 8)).hex,
      bytes.subarray(10 * PAGE, 10 * PAGE + 8).toString('hex'),
    );
  });
}

test('a connection that the daemon had accepted when it was killed is served by the next', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { server, socketPath, bytes } = await remotely(t, client);
  const before = openIn(client.daemonPid).length;
  const resume = await mute(t, client);
  const peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();
  // The client that says so much is one more.
  await until(() => openIn(client.daemonPid).length >= before + 2, 'its connection is accepted');

  await killedMute(client, resume);

  await server.accept({ timeout: 10_000 });
  t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
});

test('an heir ends with its daemon, however that ends, and one that does nothing is not waited for', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const one = await heir(client.daemonPid);
  await client.upgrade();
  await until(() => !isAlive(one), 'it ends with a daemon that is replaced');
  const two = await heir(client.daemonPid);
  process.kill(two, 'SIGSTOP');
  const { daemonPid } = client;
  process.kill(daemonPid, 'SIGKILL');
  await until(() => client.daemonPid !== daemonPid, 'another daemon is there');
  t.false(isAlive(two));
  const three = await heir(client.daemonPid);

  await client.close();

  await until(() => !isAlive(three), 'it ends with a daemon that ends in order');
});

test('the next daemon waits beside the one that serves; killed, it is started when it is needed; nothing is left of any', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer } = await connect();
  const { holderPid = 0 } = client;
  const spare = async (): Promise<number> => {
    const those = (): number[] =>
      childrenOf(holderPid, 'uffd-daemon').filter(pid => pid !== client.daemonPid);
    await until(() => those().length === 1, 'one waits');
    return those()[0] ?? 0;
  };
  const first = await spare();

  await killed(client);

  t.is(client.daemonPid, first, 'it was there already');
  const second = await spare();
  process.kill(second, 'SIGKILL');
  await until(() => !isAlive(second), 'it is dead');
  await killed(client);
  t.not(client.daemonPid, second);
  t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
  const last = await spare();
  await client.close();
  await until(() => !isAlive(last), 'it ends with the holder');
});
