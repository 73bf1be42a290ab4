import { truncateSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';

import test from 'ava';
import { KiB, MiB } from 'userfaultfd';

import { Peer } from '../examples/support/peer.js';
import { program } from './helpers/programs.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE, resources, serving } from './helpers/serving.js';

test('a process that is killed ends its session by itself, within 100 ms', async t => {
  if (!canRun(t)) return;
  const { connect } = await serving(t, { size: 64 * MiB, window: 4 * KiB });
  const delays: number[] = [];
  // The best of three: what else the machine does can delay any one.
  for (let round = 0; round < 3; round += 1) {
    const { peer, session } = await connect();
    peer.send('touch', 'order=random');
    while (session.stats().pagesInstalled < 100) await setImmediate();
    const killed = Date.now();
    peer.kill();
    const end = await session.closed;
    t.is(end.reason, 'peer-exited');
    t.is(end.error, undefined);
    delays.push(end.at.getTime() - killed);
  }
  t.true(Math.min(...delays) <= 100, `${delays.join(', ')} ms`);
});

for (const [policy, signal] of [
  ['poison', 'SIGBUS'],
  ['kill', 'SIGKILL'],
] as const) {
  for (const [where, size] of [
    ['to a page border', 2 * MiB],
    ['to the middle of a page', 2 * MiB + 1234],
    ['to nothing', 0],
  ] as const) {
    test(`an image truncated ${where} while it is served stops the process by ${signal} (${policy})`, async t => {
      if (!canRun(t)) return;
      const { connect, memory } = await serving(t, { onFailure: policy, window: 4 * KiB });
      const { peer, session } = await connect();
      await peer.ask('touch', 'limit=64');
      truncateSync(memory, size);

      peer.send('touch');

      const end = await session.closed;
      t.is(end.reason, 'source-failed');
      t.is(end.error?.code, 'ERR_UFFD_SOURCE', end.error?.message);
      t.is((await peer.ended).signal, signal);
    });
  }
}

test('after a failure every page that was missing is poisoned, those that were there are kept', async t => {
  if (!canRun(t)) return;
  const { connect, memory, bytes } = await serving(t, { window: 4 * KiB });
  const { peer, session } = await connect();
  await peer.ask('read', 0, 8);
  await peer.ask('discard', 40 * PAGE, PAGE);
  truncateSync(memory, 100);

  // Through a system call: it reports what a load would die of.
  const failed = await peer.ask('probe', 7 * PAGE);
  await session.closed;

  t.is(failed.result, 'efault');
  t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault');
  t.is((await peer.ask('read', 0, 8)).hex, bytes.subarray(0, 8).toString('hex'));
  t.is((await peer.ask('read', 40 * PAGE, 8)).hex, '0000000000000000');
});

test('one image that fails does not disturb the session of another', async t => {
  if (!canRun(t)) return;
  const bad = await serving(t);
  const good = await serving(t);
  const failing = await bad.connect();
  const { peer } = await good.connect();
  truncateSync(bad.memory, 0);

  failing.peer.send('touch');
  await failing.session.closed;

  await peer.ask('touch', 'order=random');
  t.is((await peer.ask('compare', good.memory)).different, 0);
});

test('closing a session poisons what is missing, by default', async t => {
  if (!canRun(t)) return;
  const { connect, bytes, server } = await serving(t, { window: 4 * KiB });
  const { peer, session } = await connect();
  await peer.ask('read', PAGE, 8);

  const end = await session.close();

  t.is(end.reason, 'closed');
  t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
  t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
  t.is(session.stats().pagesPoisoned, IMAGE_SIZE / PAGE - 1);
  t.deepEqual(server.sessions, []);
  t.deepEqual(await session.close(), end);
});

test('closing with rest: populate leaves a process that needs no pager any more', async t => {
  if (!canRun(t)) return;
  const { connect, memory, server } = await serving(t);
  const { peer, session } = await connect();
  await peer.ask('discard', 40 * PAGE, PAGE);

  await session.close({ rest: 'populate' });
  await server.close();

  t.is((await peer.ask('compare', memory)).different, 0);
  t.is((await peer.ask('zeros')).nonzero, 0);
});

test('closing with rest: zero gives zeros, because it was asked for', async t => {
  if (!canRun(t)) return;
  const { connect } = await serving(t);
  const { peer, session } = await connect();

  await session.close({ rest: 'zero' });

  t.is((await peer.ask('read', PAGE, 8)).hex, '0000000000000000');
});

test('threads that fault while the server closes are answered, by bytes or by SIGBUS', async t => {
  if (!canRun(t)) return;
  const { connect, server } = await serving(t, { size: 64 * MiB, window: 4 * KiB });
  const { peer, session } = await connect();
  peer.send('touch', 'order=random', 'threads=4');
  while (session.stats().pagesInstalled < 500) await setImmediate();

  await server.close();

  t.is((await peer.ended).signal, 'SIGBUS');
});

test('close() leaves no descriptor, no thread and no socket, also with sessions alive', async t => {
  if (!canRun(t)) return;
  const before = resources();
  const { connect, server } = await serving(t);
  const { peer } = await connect();
  const second = await connect();
  await peer.ask('read', 0, 8);

  await server.close();
  peer.kill();
  second.peer.kill();
  await Promise.all([peer.ended, second.peer.ended]);

  t.deepEqual(resources().threads, before.threads);
  t.is(resources().fds.length, before.fds.length);
});

for (const [how, policy, status] of [
  ['exit', 'poison', 7],
  ['exit', 'kill', 7],
  ['throw', 'poison', 1],
  ['unref', 'poison', 0],
] as const) {
  test(`a program that ends without closing (${how}, ${policy}) leaves no zeros and no hang`, async t => {
    if (!canRun(t)) return;
    const socketPath = join(folder(t), 's');
    const { path, bytes } = image(t);
    const { say, ended } = await program(t, 'abandon', socketPath, path, how, policy);
    const peer = new Peer(['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
    t.teardown(() => peer.kill());
    await peer.ready();
    t.is((await peer.ask('read', 0, 8)).hex, bytes.subarray(0, 8).toString('hex'));
    say('end');

    t.deepEqual(await ended, [status, null]);

    if (policy === 'kill') {
      t.is((await peer.ended).signal, 'SIGKILL');
    } else {
      t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
    }
  });
}
