// What waits without holding up the event loop: events, other processes, descriptors.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, fstatSync, openSync, readSync, writeFileSync } from 'node:fs';
import { createServer, connect, type Socket } from 'node:net';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { onExit, peerOf, pidfdOf, receiveFds, sendFds, type UffdEvent, Userfaultfd } from 'userfaultfd';

import { inEveryWay, PAGE, pageOf, registered } from './helpers/faults.js';
import { folder, resources } from './helpers/serving.js';

inEveryWay('events come as they happen, and the loop ends when it is told to', async t => {
  const made = registered(t, 8);
  if (!made) return;
  const { uffd, mapping } = made;
  const readings = [0, 3, 5].map(async page => mapping.read(page * PAGE, 1));
  const controller = new AbortController();
  const seen: bigint[] = [];

  const error = await t.throwsAsync(async () => {
    for await (const events of uffd.events({ signal: controller.signal })) {
      for (const event of events as Extract<UffdEvent, { type: 'fault' }>[]) {
        seen.push(event.address);
        uffd.copy({ address: event.address, length: PAGE }, pageOf(9));
      }
      if (seen.length === 3) controller.abort(new Error('enough'));
    }
  });

  t.is(error?.message, 'enough');
  t.deepEqual(
    (await Promise.all(readings)).map(bytes => bytes[0]),
    [9, 9, 9],
  );
  t.is(new Set(seen).size, 3);
});

inEveryWay('waiting for events has an end: in time, by signal, and by closing', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const { uffd } = made;

  t.false(await uffd.wait({ timeout: 5 }));
  await t.throwsAsync(uffd.wait({ signal: AbortSignal.abort(new Error('stop')) }), { message: 'stop' });
  await t.throwsAsync(uffd.wait({ timeout: -1 }), { code: 'ERR_OUT_OF_RANGE' });
  const looping = (async () => {
    let count = 0;
    for await (const events of uffd.events()) count += events.length;
    return count;
  })();
  await uffd.wait({ timeout: 1 });
  uffd.close();

  t.is(await looping, 0);
});

test('the exit of a process is told, at once where it is past', async t => {
  const child = spawn('sleep', ['60'], { stdio: 'ignore' });
  const pid = child.pid as number;
  const controller = new AbortController();
  const aborted = onExit(pid, { signal: controller.signal });
  controller.abort(new Error('given up'));
  await t.throwsAsync(aborted, { message: 'given up' });

  const [exited, reaped] = [onExit(pid), once(child, 'exit')];
  child.kill('SIGKILL');
  await exited;
  await reaped;

  await onExit(pid);
  await t.throwsAsync(onExit(0), { code: 'ERR_OUT_OF_RANGE' });
});

/** Descriptors of two connected sockets. */
async function sockets(t: ExecutionContext): Promise<[Socket, number, Socket, number]> {
  const path = join(folder(t), 's');
  const server = createServer({ pauseOnConnect: true }).listen(path);
  await once(server, 'listening');
  const client = connect(path).pause();
  const [accepted] = (await once(server, 'connection')) as [Socket];
  if (client.connecting) await once(client, 'connect');
  // Tests that count descriptors come after this one: its own are gone when it has ended.
  t.teardown(async () => {
    const closed = [client, accepted]
      .filter(socket => !socket.closed)
      .map(async socket => once(socket, 'close'));
    [client, accepted].forEach(socket => socket.destroy());
    server.close();
    await Promise.all([...closed, once(server, 'close')]);
  });
  // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
  const fdOf = (socket: Socket): number => (socket as unknown as { _handle: { fd: number } })._handle.fd;
  return [client, fdOf(client), accepted, fdOf(accepted)];
}

test('descriptors are passed with a payload, and who connected is known', async t => {
  const [, client, , accepted] = await sockets(t);
  const path = join(folder(t), 'file');
  writeFileSync(path, 'passed');
  const file = openSync(path, 'r');
  t.teardown(() => closeSync(file));

  const receiving = receiveFds(accepted, { length: 5, maxFds: 2 });
  await sendFds(client, [file, file], Buffer.from('hello'));
  const { bytes, fds } = await receiving;

  t.is(bytes.toString(), 'hello');
  t.is(fds.length, 2);
  const text = Buffer.alloc(6);
  readSync(fds[0] as number, text, 0, 6, 0);
  t.is(text.toString(), 'passed');
  fds.forEach(fd => closeSync(fd));
  t.is(peerOf(accepted).pid, process.pid);
});

inEveryWay('a userfaultfd is passed and served by whoever received it', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const [, client, , accepted] = await sockets(t);
  await sendFds(client, [made.uffd.fd], Buffer.from([1]));
  const { fds } = await receiveFds(accepted);
  const received = Userfaultfd.adopt(fds[0] as number);
  t.teardown(() => received.close({ waiting: 'zero' }));
  const reading = made.mapping.read(0, 1);

  t.true(await received.wait({ timeout: 10_000 }));
  received.copy(made.mapping.range(), pageOf(3));

  t.deepEqual([...(await reading)], [3]);
});

test('who connected is known by a descriptor that no reused number deceives', async t => {
  const [client, , accepted, acceptedFd] = await sockets(t);
  const own = pidfdOf(acceptedFd);
  t.teardown(() => closeSync(own));
  const controller = new AbortController();
  const waiting = onExit({ pidfd: own }, { signal: controller.signal });
  controller.abort(new Error('still alive'));
  await t.throwsAsync(waiting, { message: 'still alive' });

  // A process that connects and is killed.
  const path = join(folder(t), 'other');
  const server = createServer({ pauseOnConnect: true }).listen(path);
  t.teardown(() => server.close());
  await once(server, 'listening');
  const program = `require('node:net').connect(${JSON.stringify(path)}).resume()`;
  const child = spawn(process.execPath, ['-e', program], { stdio: 'ignore' });
  const [connection] = (await once(server, 'connection')) as [Socket];
  t.teardown(() => connection.destroy());
  // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
  const fd = (connection as unknown as { _handle: { fd: number } })._handle.fd;
  const pidfd = pidfdOf(fd);
  t.teardown(() => closeSync(pidfd));
  const [exited, reaped] = [onExit({ pidfd }), once(child, 'exit')];
  child.kill('SIGKILL');
  await exited;
  await reaped;

  await onExit({ pidfd });
  t.throws(() => pidfdOf(fd), { code: 'ERR_UFFD_CLOSED' });
  await t.throwsAsync(onExit({ pidfd: 0 }), { code: 'ERR_UFFD_SYSTEM' });
  await t.throwsAsync(onExit({ pidfd: -1 }), { code: 'ERR_OUT_OF_RANGE', message: /`process.pidfd`/ });
  await t.throwsAsync(onExit({} as { pidfd: number }), { code: 'ERR_INVALID_ARG_TYPE' });
  t.true(client.writable && accepted.readable);
});

test('surplus descriptors, missing bytes and closed ends are errors that leave nothing open', async t => {
  const [client, clientFd, accepted, acceptedFd] = await sockets(t);
  const before = new Set(resources().fds);
  await sendFds(clientFd, [0, 1, 2], Buffer.from('x'));
  await t.throwsAsync(receiveFds(acceptedFd, { maxFds: 1 }), { code: 'ERR_UFFD_PROTOCOL' });
  await t.throwsAsync(receiveFds(acceptedFd, { timeout: 20 }), { code: 'ERR_UFFD_TIMEOUT' });
  await t.throwsAsync(sendFds(clientFd, [-1], Buffer.from('x')), { message: /fds\[0\]/ });
  await t.throwsAsync(sendFds(clientFd, [0], Buffer.alloc(0)), { message: /payload/ });
  await t.throwsAsync(sendFds(clientFd, [], Buffer.from('x')), { message: /fds/ });
  t.deepEqual(
    resources().fds.filter(fd => !before.has(fd)),
    [],
  );

  client.destroy();
  await once(client, 'close');
  await t.throwsAsync(receiveFds(acceptedFd), { code: 'ERR_UFFD_PROTOCOL' });
  accepted.destroy();
  t.true(fstatSync(0).mode > 0);
  const file = openSync('/dev/null', 'r');
  t.throws(() => peerOf(file), { code: 'ERR_UFFD_SYSTEM' });
  closeSync(file);
});
