// restoreFirecracker: each of the ways in which one of both sides fails first; nothing is left of any.

import { statSync, truncateSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { KiB, MiB, restoreFirecracker } from 'userfaultfd';

import { badRequest, NO_CONTENT } from './helpers/firecracker.js';
import { leftIn, prepared, refusal, silence } from './helpers/restoring.js';
import { canRun, folder, PAGE } from './helpers/serving.js';

const { ECONNREFUSED, ECONNRESET, ENOENT } = constants.errno;

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
