// restoreFirecracker: both sides of a restore, and each of the ways in which one of them fails first.

import { existsSync, readdirSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';

import test, { type ExecutionContext } from 'ava';
import { KiB, MiB, restoreFirecracker, type RestoreOptions, UffdError } from 'userfaultfd';

import { badRequest, FakeFirecracker, NO_CONTENT } from './helpers/firecracker.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE, resources } from './helpers/serving.js';

const { ECONNREFUSED, ECONNRESET, ENOENT } = constants.errno;

/** A Firecracker, an image, and a folder for temporary files that has to be empty in the end. */
async function prepared(
  t: ExecutionContext,
  jailRoot?: string,
): Promise<{ firecracker: FakeFirecracker; options: RestoreOptions; bytes: Buffer; temporary: string }> {
  const firecracker = await FakeFirecracker.start(t, jailRoot);
  const { path: memory, bytes } = image(t);
  const options = { apiSocket: firecracker.apiSocket, state: '/snapshots/vm.state', memory };
  const temporary = folder(t);
  const before = process.env['TMPDIR'];
  process.env['TMPDIR'] = temporary;
  t.teardown(() => {
    if (before === undefined) delete process.env['TMPDIR'];
    else process.env['TMPDIR'] = before;
  });
  return { firecracker, options, bytes, temporary };
}

/** What a restore has left in the folder for temporary files; the tests' own folders have other names. */
function leftIn(temporary: string): string[] {
  return readdirSync(temporary).filter(name => !name.startsWith('userfaultfd-'));
}

function lasting(): string[] {
  // Threads that open images stay a moment, for the next one.
  return resources().threads.filter(name => name !== 'uffd-job');
}

/** Restores, which has to fail; then nothing may be left of it. */
async function refusal(
  t: ExecutionContext,
  { options, temporary }: { options: RestoreOptions; temporary: string },
): Promise<UffdError> {
  const before = lasting();
  const error = await t.throwsAsync(restoreFirecracker(options), { instanceOf: UffdError });
  t.deepEqual(lasting(), before, 'no thread');
  t.deepEqual(leftIn(temporary), [], 'no socket, no folder');
  if (options.socketPath !== undefined) t.false(existsSync(options.socketPath));
  return error;
}

/** Never. */
async function silence(): Promise<undefined> {
  return new Promise(() => {});
}

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

test('what Firecracker refuses is told with its own words', async t => {
  const made = await prepared(t);
  made.firecracker.onLoad = async () => badRequest('Load snapshot error: no such version');

  const error = await refusal(t, made);

  t.is(error.code, 'ERR_UFFD_API');
  t.regex(error.message, /PUT \/snapshot\/load \(status 400\): Load snapshot error: no such version/);
  t.is((error.cause as Error).message, 'Load snapshot error: no such version');
  t.is(error.errno, undefined);
});

for (const [policy, how] of [
  ['poison', 'poisoned'],
  ['kill', 'killed'],
] as const) {
  test(`a Firecracker that refuses after it has handed over its memory is ${how}`, async t => {
    if (!canRun(t)) return;
    const made = await prepared(t);
    made.firecracker.onLoad = async request => {
      await made.firecracker.connect(request);
      return badRequest('Cannot restore devices');
    };

    const error = await refusal(t, { ...made, options: { ...made.options, onFailure: policy } });

    t.is(error.code, 'ERR_UFFD_API');
    const { peer } = made.firecracker;
    if (policy === 'kill') t.is((await peer.ended).signal, 'SIGKILL');
    else t.is((await peer.ask('probe', PAGE)).result, 'efault');
  });
}

test('an API that answers something else is quoted', async t => {
  const made = await prepared(t);
  made.firecracker.onLoad = async () => 'HTTP/1.1 500 \r\nContent-Length: 9\r\n\r\nnot today';
  t.regex((await refusal(t, made)).message, /status 500\): not today/);
  made.firecracker.onLoad = async () => 'HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n';
  t.regex((await refusal(t, made)).message, /status 500\): no reason given/);
  made.firecracker.onLoad = async () => 'SSH-2.0-OpenSSH\r\n';
  const error = await refusal(t, made);
  t.is(error.code, 'ERR_UFFD_API');
  t.true(error.cause instanceof Error);
});

test('an API socket that is missing, or that nobody listens on, is named', async t => {
  const made = await prepared(t);
  const missing = join(folder(t), 'missing.sock');

  const absent = await refusal(t, { ...made, options: { ...made.options, apiSocket: missing } });
  writeFileSync(missing, '');
  const file = await refusal(t, { ...made, options: { ...made.options, apiSocket: missing } });

  for (const [error, errno] of [
    [absent, ENOENT],
    [file, ECONNREFUSED],
  ] as const) {
    t.is(error.code, 'ERR_UFFD_API');
    t.is(error.errno, errno);
    t.true(error.message.includes(missing));
    t.regex(error.hint ?? '', /--api-sock/);
  }
});

test('a memory file that is missing is told before Firecracker is asked for anything', async t => {
  const made = await prepared(t);

  const error = await refusal(t, { ...made, options: { ...made.options, memory: '/nonexistent/image' } });

  t.is(error.code, 'ERR_UFFD_SOURCE');
  t.deepEqual(made.firecracker.requests, []);
});

test('a Firecracker that exits before it has connected is told as what it is', async t => {
  const made = await prepared(t);
  made.firecracker.onLoad = async () => {
    made.firecracker.exit();
    return undefined;
  };

  const error = await refusal(t, made);

  t.is(error.code, 'ERR_UFFD_API');
  t.is(error.errno, ECONNRESET);
});

test('a Firecracker that exits while it is restored is told by name, whatever its API says', async t => {
  if (!canRun(t)) return;
  const made = await prepared(t);
  made.firecracker.onLoad = async request => {
    await made.firecracker.connect(request);
    await made.firecracker.peer.ask('read', 0, 8);
    made.firecracker.exit();
    return undefined;
  };

  const error = await refusal(t, made);

  t.is(error.code, 'ERR_UFFD_CLOSED', error.message);
  t.true(error.message.includes(`process ${made.firecracker.peer.pid}`));
});

for (const [policy, signal] of [
  ['poison', 'SIGBUS'],
  ['kill', 'SIGKILL'],
] as const) {
  test(`an image that fails while Firecracker loads is the error, and the end of it (${policy})`, async t => {
    if (!canRun(t)) return;
    const made = await prepared(t);
    made.firecracker.onLoad = async request => {
      await made.firecracker.connect(request);
      truncateSync(made.options.memory as string, 0);
      made.firecracker.peer.send('read', 9 * PAGE, 8);
      // Its API hangs, as it does when the thread behind it waits for memory.
      return silence();
    };

    const error = await refusal(t, { ...made, options: { ...made.options, onFailure: policy } });

    t.is(error.code, 'ERR_UFFD_SOURCE', error.message);
    t.is((await made.firecracker.peer.ended).signal, signal);
  });
}

test('an image that does not fit is the error, and not that Firecracker hangs', async t => {
  if (!canRun(t)) return;
  const made = await prepared(t);
  truncateSync(made.options.memory as string, MiB);
  made.firecracker.onLoad = async request => {
    await made.firecracker.connect(request);
    made.firecracker.peer.send('probe', PAGE);
    return silence();
  };

  const error = await refusal(t, made);

  t.is(error.code, 'ERR_UFFD_REGION', error.message);
  t.is((await made.firecracker.peer.answer<'probe'>()).result, 'efault');
});

test('a handshake that is none is the error', async t => {
  if (!canRun(t)) return;
  const made = await prepared(t);
  made.firecracker.onLoad = async request => {
    await made.firecracker.connect(request, '--fd', 'null');
    return silence();
  };

  t.is((await refusal(t, made)).code, 'ERR_UFFD_PROTOCOL');
});

for (const [what, onLoad, message] of [
  ['never answers', async () => silence(), /did not hand over its memory within 150 ms/],
  ['answers, but asks for no memory', async () => NO_CONTENT, /did not hand over its memory within 150 ms/],
] as const) {
  test(`a Firecracker that ${what} is not waited for beyond the timeout`, async t => {
    const made = await prepared(t);
    made.firecracker.onLoad = onLoad;

    const error = await refusal(t, { ...made, options: { ...made.options, timeout: 150 } });

    t.is(error.code, 'ERR_UFFD_TIMEOUT');
    t.regex(error.message, message);
  });
}

test('a Firecracker that hands over its memory and then hangs is poisoned when time is up', async t => {
  if (!canRun(t)) return;
  const made = await prepared(t);
  made.firecracker.onLoad = async request => {
    await made.firecracker.connect(request);
    return silence();
  };

  const error = await refusal(t, { ...made, options: { ...made.options, timeout: 1500, window: 4 * KiB } });

  t.is(error.code, 'ERR_UFFD_TIMEOUT');
  t.regex(error.message, /did not answer PUT \/snapshot\/load within 1500 ms/);
  t.is((await made.firecracker.peer.ask('probe', 9 * PAGE)).result, 'efault');
});

test('a restore that is no longer wanted ends with the reason of its signal', async t => {
  const made = await prepared(t);
  const controller = new AbortController();
  const reason = new Error('no longer wanted');
  made.firecracker.onLoad = async () => {
    controller.abort(reason);
    return silence();
  };
  const options = { ...made.options, signal: controller.signal };

  t.is(await t.throwsAsync(restoreFirecracker(options)), reason);
  t.is(await t.throwsAsync(restoreFirecracker(options)), reason);

  t.is(made.firecracker.requests.length, 1);
  t.deepEqual(leftIn(made.temporary), []);
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

test('a jail that is missing is named', async t => {
  const made = await prepared(t);
  const jailRoot = join(folder(t), 'missing');

  const error = await refusal(t, {
    ...made,
    options: { ...made.options, jailRoot, state: join(jailRoot, 's') },
  });

  t.is(error.code, 'ERR_UFFD_SOCKET');
  t.is(error.errno, ENOENT);
});

for (const [what, wrong, code, message] of [
  ['a misspelt option', { overlay: [] }, 'ERR_INVALID_ARG_VALUE', /`overlay` in `options`/],
  ['no API socket', { apiSocket: undefined }, 'ERR_INVALID_ARG_TYPE', /options\.apiSocket/],
  [
    'an API socket whose path is too long',
    { apiSocket: 'x'.repeat(108) },
    'ERR_INVALID_ARG_VALUE',
    /options\.apiSocket.*107/,
  ],
  [
    'a socket whose path is too long',
    { socketPath: 'x'.repeat(108) },
    'ERR_INVALID_ARG_VALUE',
    /options\.socketPath.*107/,
  ],
  ['no state', { state: undefined }, 'ERR_INVALID_ARG_TYPE', /options\.state/],
  ['a state that is empty', { state: '' }, 'ERR_INVALID_ARG_VALUE', /options\.state/],
  ['no memory', { memory: undefined }, 'ERR_INVALID_ARG_TYPE', /options\.memory/],
  ['a jail that is no path', { jailRoot: 5 }, 'ERR_INVALID_ARG_TYPE', /options\.jailRoot.*got 5/],
  [
    'a state outside the jail',
    { jailRoot: '/jail', state: '/jail/../s' },
    'ERR_INVALID_ARG_VALUE',
    /options\.state.*\/jail/,
  ],
  [
    'a state that is the jail',
    { jailRoot: '/jail', state: '/jail' },
    'ERR_INVALID_ARG_VALUE',
    /options\.state/,
  ],
  [
    'a socket outside the jail',
    { jailRoot: '/jail', state: '/jail/s', socketPath: '/jailed/sock' },
    'ERR_INVALID_ARG_VALUE',
    /options\.socketPath.*options\.jailRoot/,
  ],
  ['resume that is no boolean', { resume: 'yes' }, 'ERR_INVALID_ARG_TYPE', /options\.resume.*got 'yes'/],
  ['no time', { timeout: 0 }, 'ERR_OUT_OF_RANGE', /options\.timeout.*got 0/],
  ['a timeout that is a string', { timeout: '5s' }, 'ERR_INVALID_ARG_TYPE', /options\.timeout/],
  ['a signal that is none', { signal: {} }, 'ERR_INVALID_ARG_TYPE', /options\.signal/],
  ['a policy that is none', { onFailure: 'zero' }, 'ERR_INVALID_ARG_VALUE', /options\.onFailure/],
  ['a window of no power of two', { window: 12_288 }, 'ERR_OUT_OF_RANGE', /options\.window/],
  ['a uid that is none', { peer: { uid: -1 } }, 'ERR_OUT_OF_RANGE', /options\.peer\.uid/],
] as const) {
  test(`restoring with ${what} is refused by name, before anything is done`, async t => {
    const { firecracker, options, temporary } = await prepared(t);

    await t.throwsAsync(restoreFirecracker({ ...options, ...wrong } as never), { code, message });

    t.deepEqual(leftIn(temporary), []);
    t.deepEqual(firecracker.requests, []);
  });
}

test('restoring with options that are none is refused by name', async t => {
  for (const options of [undefined, null, 5, []]) {
    await t.throwsAsync(restoreFirecracker(options as never), {
      code: 'ERR_INVALID_ARG_TYPE',
      message: /`options`/,
    });
  }
});

test('the folder of the socket can be reached by another user exactly where that is the one allowed', async t => {
  const made = await prepared(t);
  const seen: number[] = [];
  made.firecracker.onLoad = async ({ body }) => {
    const { mem_backend: backend } = JSON.parse(body) as { mem_backend: { backend_path: string } };
    seen.push(statSync(join(backend.backend_path, '..')).mode & 0o777);
    return badRequest('enough');
  };

  await refusal(t, made);
  if (process.getuid?.() === 0) {
    await refusal(t, { ...made, options: { ...made.options, peer: { uid: 65_534 } } });
    t.deepEqual(seen, [0o700, 0o711]);
  } else {
    t.deepEqual(seen, [0o700]);
  }
});
