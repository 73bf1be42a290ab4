// restoreFirecracker: a VM whose memory is served while it runs; what it is told, and what it can be told afterwards.

import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';

import test from 'ava';
import { KiB, restoreFirecracker, UffdError } from 'userfaultfd';

import { badRequest, NO_CONTENT } from './helpers/firecracker.js';
import { lasting, leftIn, prepared, silence } from './helpers/restoring.js';
import { canRun, folder, IMAGE_SIZE, PAGE } from './helpers/serving.js';

test('a VM is restored: what it reads is its image, also before Firecracker has answered', async t => {
  if (!canRun(t)) return;
  const { firecracker, options, bytes, temporary } = await prepared(t);
  let early = '';
  firecracker.onLoad = async request => {
    await firecracker.connect(request);
    early = (await firecracker.peer.ask('read', 5 * PAGE, 16)).hex;
    return NO_CONTENT;
  };
  const before = lasting();

  const vm = await restoreFirecracker(options);

  t.is(early, bytes.subarray(5 * PAGE, 5 * PAGE + 16).toString('hex'));
  t.is((await firecracker.peer.ask('compare', options.memory as string)).different, 0);
  t.is(vm.session.peer.pid, firecracker.peer.pid);
  t.deepEqual(leftIn(temporary), [], 'nobody finds the socket any more');
  const { listening, handshake, loaded, total } = vm.timings;
  t.true(0 < listening && listening <= handshake && listening <= loaded, JSON.stringify(vm.timings));
  t.true(Math.max(handshake, loaded) <= total, JSON.stringify(vm.timings));
  firecracker.exit();
  t.is((await vm.session.closed).reason, 'peer-exited');
  t.is((await vm.close()).reason, 'peer-exited');
  t.deepEqual(lasting(), before);
});

test('what Firecracker is sent is its own protocol', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const socketPath = join(folder(t), 'memory.sock');

  const vm = await restoreFirecracker({ ...options, socketPath, resume: false });
  await vm.resume();
  await vm.pause();
  await vm.close();

  const body = `{"snapshot_path":"/snapshots/vm.state","mem_backend":{"backend_path":"${socketPath}","backend_type":"Uffd"},"resume_vm":false}`;
  t.deepEqual(
    firecracker.requests.map(request => [request.line, request.body]),
    [
      ['PUT /snapshot/load HTTP/1.1', body],
      ['PATCH /vm HTTP/1.1', '{"state":"Resumed"}'],
      ['PATCH /vm HTTP/1.1', '{"state":"Paused"}'],
    ],
  );
  for (const { headers, body: sent } of firecracker.requests) {
    t.true(headers.includes('Content-Type: application/json'));
    t.true(headers.includes(`Content-Length: ${sent.length}`));
  }
});

test('a jailed Firecracker is told the paths as it sees them', async t => {
  if (!canRun(t)) return;
  const jailRoot = folder(t);
  const { firecracker, options, bytes } = await prepared(t, jailRoot);
  const state = join(jailRoot, 'snapshot', 'vm.state');

  const vm = await restoreFirecracker({ ...options, state, jailRoot });

  t.is((await firecracker.peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
  const sent = JSON.parse(firecracker.requests[0]?.body ?? '') as Record<string, Record<string, string>>;
  t.is<unknown, string>(sent['snapshot_path'], '/snapshot/vm.state');
  t.regex(sent['mem_backend']?.['backend_path'] ?? '', /^\/uffd-\w+\/uffd\.sock$/);
  t.deepEqual(readdirSync(jailRoot), ['run'], 'the folder of the socket is gone');
  await vm.close();
});

test('a socket path in the jail is used, and removed again', async t => {
  if (!canRun(t)) return;
  const jailRoot = folder(t);
  const { firecracker, options } = await prepared(t, jailRoot);
  const socketPath = join(jailRoot, 'run', '..', 'memory.sock');

  await using vm = await restoreFirecracker({
    ...options,
    state: join(jailRoot, 'state'),
    jailRoot,
    socketPath,
  });

  t.true(firecracker.requests[0]?.body.includes('"backend_path":"/memory.sock"'));
  await vm.close();
  t.false(existsSync(socketPath));
});

test('memory may be a function here as well', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const memory = options.memory as string;

  const vm = await restoreFirecracker({ ...options, memory: async () => ({ memory, window: 4 * KiB }) });

  t.is((await firecracker.peer.ask('compare', memory)).different, 0);
  await vm.close();
  // Counted after the thread was woken: exact when it is over.
  t.is(vm.session.stats().windows, IMAGE_SIZE / PAGE);
});

test('closing poisons what is missing, or does as it is told', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const vm = await restoreFirecracker({ ...options, window: 4 * KiB });

  t.is((await vm.close()).reason, 'closed');

  t.is((await firecracker.peer.ask('probe', 9 * PAGE)).result, 'efault');
  const other = await prepared(t);
  const populated = await restoreFirecracker(other.options);
  await populated.close({ rest: 'populate' });
  t.is((await other.firecracker.peer.ask('compare', other.options.memory as string)).different, 0);
});

test('pausing that is refused, takes too long or is not wanted any more is told; the VM is served on', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const vm = await restoreFirecracker(options);
  firecracker.onState = async () => badRequest('The VM is not running');
  const refused = await t.throwsAsync(vm.pause(), { instanceOf: UffdError });
  t.is(refused.code, 'ERR_UFFD_API');
  t.regex(refused.message, /PATCH \/vm.*The VM is not running/);
  firecracker.onState = async () => silence();
  await t.throwsAsync(vm.resume({ timeout: 50 }), {
    code: 'ERR_UFFD_TIMEOUT',
    message: /PATCH \/vm within 50 ms/,
  });
  const controller = new AbortController();
  const waiting = vm.pause({ signal: controller.signal });
  await setImmediate();
  controller.abort(new Error('no longer wanted'));
  await t.throwsAsync(waiting, { message: 'no longer wanted' });
  for (const [wrong, code, message] of [
    [{ timeuot: 1 }, 'ERR_INVALID_ARG_VALUE', /`timeuot` in `options`/],
    [{ timeout: -1 }, 'ERR_OUT_OF_RANGE', /options\.timeout/],
    [{ signal: 1 }, 'ERR_INVALID_ARG_TYPE', /options\.signal/],
    [null, 'ERR_INVALID_ARG_TYPE', /`options`/],
  ] as const) {
    await t.throwsAsync(vm.pause(wrong as never), { code, message });
    await t.throwsAsync(vm.resume(wrong as never), { code, message });
  }

  t.is((await firecracker.peer.ask('compare', options.memory as string)).different, 0);
  await t.throwsAsync(vm.close({ rset: 1 } as never), { code: 'ERR_INVALID_ARG_VALUE', message: /`rset`/ });
  await vm.close();
});
