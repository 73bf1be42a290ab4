/** Sources, who is asked for them, and heirs, while one daemon follows another. */

import { createHash } from 'node:crypto';
import { truncateSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import {
  callbackSource,
  fileSource,
  KiB,
  MiB,
  type PagerClient,
  type PageSource,
  serveFirecracker,
} from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { Commanded } from './helpers/commanded.js';
import { daemon, daemonOf, heirOf, isAlive, openIn, remotely, startPeer, until } from './helpers/daemon.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE } from './helpers/serving.js';
import { APART, imageBytes, PAGE as GUEST_PAGE } from './property/image.js';

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

/** Kills the daemon, and waits until another one has been reached. */
async function killed(client: PagerClient): Promise<void> {
  const before = client.daemonPid;
  process.kill(before, 'SIGKILL');
  await until(() => client.daemonPid !== before, 'another daemon is there');
}

test('a session that goes on from a younger source has it in the next daemon, too', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes, memory } = await remotely(t, client, { onFailure: 'hold' });
  const { peer, session } = await connect();
  const { path: copy } = image(t);
  writeFileSync(copy, bytes);
  await session.hold();
  truncateSync(memory, 0);
  const younger = fileSource(copy);
  await session.resume({ source: younger });

  await killed(client);

  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  younger.close();
});

test('a source that was refused is not what the next daemon serves from', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes } = await remotely(t, client);
  const { peer, session } = await connect();
  const { path: short } = image(t, PAGE);
  await session.hold();
  await t.throwsAsync(session.resume({ source: fileSource(short) }), { code: 'ERR_UFFD_PROTOCOL' });

  await killed(client);

  await session.resume();
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
});

test('sessions are held, resumed and given sources while daemons die', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes, memory } = await remotely(t, client);
  const { peer, session } = await connect();
  const { holderPid = 0 } = client;
  for (let round = 0; round < 10; round += 1) {
    const first = client.daemonPid;
    process.kill(first, 'SIGKILL');
    await until(() => daemonOf(holderPid, first) !== undefined, 'the next is being started');
    const second = daemonOf(holderPid, first) ?? 0;
    // It dies while clients connect to it, or before, or after.
    if (round % 2 === 0) await until(() => client.daemonPid !== first, 'it is reached');
    process.kill(second, 'SIGKILL');
    await session.hold();
    await session.resume({ source: fileSource(memory) });
    await until(() => client.daemonPid !== first && client.daemonPid !== second, 'the third is reached');
  }
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
});

test('an image that is broken while daemons change is whole again when somebody says so', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes, memory } = await remotely(t, client, { onFailure: 'hold' });
  const { peer, session } = await connect();

  truncateSync(memory, 0);
  await killed(client);
  const hash = peer.ask('hash');
  await until(() => session.held !== undefined, 'it is held');
  // As long as it was, and other bytes at first.
  truncateSync(memory, bytes.length);
  writeFileSync(memory, bytes);
  await session.resume();

  t.is((await hash).sha256, sha256(bytes));
  t.is(session.held, undefined);
  const { peer: later } = await connect();
  t.is((await later.ask('hash')).sha256, sha256(bytes), 'its server has lost nothing, either');
});

test('of an image that is written to while it is served nothing is taken before somebody says that it is right', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { connect, bytes, memory } = await remotely(t, client, { onFailure: 'hold' });
  const { peer, session } = await connect();
  await peer.ask('read', 0, 8);
  // As long as it was, and nothing but zeros.
  truncateSync(memory, 0);
  truncateSync(memory, bytes.length);

  const hash = peer.ask('hash');
  await until(() => session.held !== undefined, 'it is held');
  t.regex(session.held?.error?.message ?? '', /was written to while it was served/);
  writeFileSync(memory, bytes);
  await session.resume();

  t.is((await hash).sha256, sha256(bytes));
});

test('what was brought for a daemon that died is not taken for an answer to the next', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const size = 512 * KiB;
  const { bytes } = image(t, size);
  const asked: { offset: number; answer: () => void }[] = [];
  const source = callbackSource(
    async (offset, length) => {
      await new Promise<void>(answer => {
        asked.push({ offset, answer });
      });
      return bytes.subarray(offset, offset + length);
    },
    { size },
  );
  t.teardown(() => source.close());
  const first = await handedOver(t, `--region ${size}`);
  const session = await client.adopt(first.uffd, { source, regions: first.regions, pidfd: first.pidfd });
  first.peer.send('read', size - PAGE, 8);
  await until(() => asked.length === 1, 'the end of the image is asked for');
  first.peer.kill();
  await session.closed;

  await killed(client);
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${size}`);
  await client.adopt(uffd, { source, regions, pidfd });
  peer.send('read', 0, 8);
  await until(
    () => asked.length === 2,
    'its beginning is asked for, in the first request of this daemon, too',
  );
  for (const { answer } of asked) answer();

  t.is((await peer.answer<'read'>()).hex, bytes.subarray(0, 8).toString('hex'));
});

test('a process that comes while its client is away is asked about when the client is back', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const program = fileURLToPath(new URL('property/node-program.js', import.meta.url));
  const node = new Commanded(process.execPath, [program]);
  t.teardown(async () => {
    node.kill();
    await node.ended;
  });
  const socketPath = `${folder(t)}/ask.sock`;
  await node.ask('connect', client.socketPath);
  await node.ask('ask', socketPath);
  process.kill(node.pid, 'SIGSTOP');
  await killed(client);

  const peer = startPeer(t, ['--socket', socketPath, '--region', `${APART}`]);
  await peer.ready();
  await peer.ask('resident');
  process.kill(node.pid, 'SIGCONT');

  const expected = imageBytes()
    .subarray(GUEST_PAGE, GUEST_PAGE + 8)
    .toString('hex');
  t.is((await peer.ask('read', GUEST_PAGE, 8)).hex, expected);
});

test('what a path names is open in a daemon as long as it is served, and no longer', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path, bytes } = image(t);
  const socketPath = `${folder(t)}/vm.sock`;
  const overlays = [{ offset: 0, data: Buffer.from('laid over') }];
  const server = await serveFirecracker({
    pager: client,
    socketPath,
    memory: () => ({ memory: path, overlays }),
  });
  const images = (): number =>
    [client.daemonPid, client.holderPid ?? 0].flatMap(openIn).filter(open => open === path).length;
  for (let round = 0; round < 3; round += 1) {
    const peer = startPeer(t, ['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
    const session = await server.accept({ timeout: 10_000 });
    if (round === 2) await killed(client);
    t.is((await peer.ready(), await peer.ask('read', PAGE, 8)).hex, bytes.toString('hex', PAGE, PAGE + 8));
    t.is((await peer.ask('read', 0, 9)).hex, Buffer.from('laid over').toString('hex'));
    t.true(images() > 0);
    peer.kill();
    await session.closed;
    await until(() => images() === 0, 'the image is closed by both');
  }
  const second = await remotely(t, client, { size: MiB });
  await second.server.close();
  const left = (): number => openIn(client.daemonPid).filter(open => open === second.memory).length;
  await until(() => left() === 0, 'and that of a server which is closed');
});

test('a source that its client has closed is not kept because daemons change', async t => {
  if (!canRun(t)) return;
  const client = await daemon(t);
  const { path } = image(t, MiB);
  const source: PageSource = fileSource(path);
  const { uffd, regions, peer, pidfd } = await handedOver(t, `--region ${MiB}`);
  const session = await client.adopt(uffd, { source, regions, pidfd });
  source.close();

  await killed(client);
  await peer.ask('hash');
  t.true(openIn(client.daemonPid).includes(path));
  peer.kill();
  await session.closed;

  await until(() => !openIn(client.daemonPid).includes(path), 'the next daemon lets go of it');
});

test('a daemon ends in order although its holder hears of its heirs when they are dead', async t => {
  const client = await daemon(t);
  const { holderPid = 0, daemonPid } = client;
  process.kill(holderPid, 'SIGSTOP');
  // Those that die too often are not replaced.
  for (let [times, last] = [0, 0]; times < 32; times += 1) {
    await until(() => (heirOf(daemonPid) ?? last) !== last, 'there is another heir');
    last = heirOf(daemonPid) ?? 0;
    process.kill(last, 'SIGKILL');
  }
  await until(() => heirOf(daemonPid) === undefined, 'there is none');
  process.kill(holderPid, 'SIGCONT');

  await client.close();

  t.false(isAlive(daemonPid) || isAlive(holderPid));
});
