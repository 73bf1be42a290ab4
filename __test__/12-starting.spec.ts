import { chmodSync, existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import test, { type ExecutionContext } from 'ava';
import { type FirecrackerServerOptions, serveFirecracker, UffdError } from 'userfaultfd';

import { folder, image, resources, serving } from './helpers/serving.js';

const { ENOENT, EADDRINUSE, ENAMETOOLONG, EACCES } = constants.errno;

async function refusal(t: ExecutionContext, options: Partial<FirecrackerServerOptions>): Promise<UffdError> {
  const socketPath = join(folder(t), 's');
  const before = resources();
  const error = await t.throwsAsync(serveFirecracker({ socketPath, memory: image(t).path, ...options }), {
    instanceOf: UffdError,
  });
  t.deepEqual(resources(), before, 'nothing is left behind');
  t.false(existsSync(socketPath));
  return error;
}

test('a server listens on a private socket, which close() removes with every thread and descriptor', async t => {
  const before = resources();
  const socketPath = join(folder(t), 's');

  const server = await serveFirecracker({ socketPath, memory: pathToFileURL(image(t).path) });

  t.is(statSync(socketPath).mode & 0o777, 0o600);
  t.true(statSync(socketPath).isSocket());
  await server.close();
  t.true(server.closed);
  t.false(existsSync(socketPath));
  t.deepEqual(resources(), before);
});

test('a memory file that is missing is named', async t => {
  const error = await refusal(t, { memory: '/nonexistent/image' });

  t.is(error.code, 'ERR_UFFD_SOURCE');
  t.is(error.errno, ENOENT);
  t.is(error.syscall, 'open');
  t.regex(error.message, /\/nonexistent\/image/);
});

test('what cannot be a memory file is refused', async t => {
  const empty = join(folder(t), 'empty');
  writeFileSync(empty, '');

  t.is((await refusal(t, { memory: empty })).code, 'ERR_UFFD_SOURCE');
  t.is((await refusal(t, { memory: '/dev/null' })).code, 'ERR_UFFD_SOURCE');
  t.is((await refusal(t, { memory: folder(t) })).code, 'ERR_UFFD_SOURCE');
});

test('a memory file that may not be read is named', async t => {
  if (process.getuid?.() === 0) {
    t.log('skipped: root may read every file');
    t.pass();
    return;
  }
  const { path } = image(t);
  chmodSync(path, 0);

  t.is((await refusal(t, { memory: path })).errno, EACCES);
});

test('a socket path that is in use is refused, and its server goes on', async t => {
  const { socketPath, server } = await serving(t);

  const error = await t.throwsAsync(serveFirecracker({ socketPath, memory: image(t).path }), {
    instanceOf: UffdError,
  });

  t.is(error.code, 'ERR_UFFD_SOCKET');
  t.is(error.errno, EADDRINUSE);
  t.true(existsSync(socketPath));
  t.false(server.closed);
});

test('a plain file at the socket path is refused and never deleted', async t => {
  const file = join(folder(t), 'precious');
  writeFileSync(file, 'precious');

  const error = await refusal(t, { socketPath: file });

  t.is(error.errno, EADDRINUSE);
  t.is(readFileSync(file, 'utf8'), 'precious');
});

test('a socket path that is too long, or whose folder is missing, is refused', async t => {
  t.is((await refusal(t, { socketPath: join(folder(t), 'x'.repeat(108)) })).errno, ENAMETOOLONG);
  t.is((await refusal(t, { socketPath: join(folder(t), 'missing', 's') })).errno, ENOENT);
});

test('a folder that others can change is refused', async t => {
  const shared = join(folder(t), 'shared');
  mkdirSync(shared);
  chmodSync(shared, 0o777);

  t.is((await refusal(t, { socketPath: join(shared, 's') })).errno, EACCES);
});

test('a CPU that this machine does not have is refused', async t => {
  t.is((await refusal(t, { cpu: 1000 })).syscall, 'sched_setaffinity');
});

for (const [what, options, code, message] of [
  ['a misspelt option', { onFailiure: 'kill' }, 'ERR_INVALID_ARG_VALUE', /Unknown option `onFailiure`/],
  ['a path that is no string', { socketPath: 5 }, 'ERR_INVALID_ARG_TYPE', /options\.socketPath.*got 5/],
  ['an empty path', { memory: '' }, 'ERR_INVALID_ARG_VALUE', /options\.memory/],
  ['a path with a NUL', { memory: 'a\0b' }, 'ERR_INVALID_ARG_VALUE', /options\.memory/],
  [
    'an unknown policy',
    { onFailure: 'zero' },
    'ERR_INVALID_ARG_VALUE',
    /'poison', 'kill', 'hold', got 'zero'/,
  ],
  ['a window of no power of two', { window: 12_288 }, 'ERR_OUT_OF_RANGE', /power of two, got 12288/],
  ['a window below a page', { window: 1024 }, 'ERR_OUT_OF_RANGE', /from 4096 to 2097152, got 1024/],
  ['a timeout that is no number', { handshakeTimeout: '5s' }, 'ERR_INVALID_ARG_TYPE', /handshakeTimeout/],
  ['a negative uid', { peer: { uid: -1 } }, 'ERR_OUT_OF_RANGE', /peer\.uid/],
  ['a misspelt peer option', { peer: { user: 1 } }, 'ERR_INVALID_ARG_VALUE', /Unknown option `user`/],
  ['no sessions', { maxSessions: 0 }, 'ERR_OUT_OF_RANGE', /maxSessions/],
] as const) {
  test(`${what} is refused by name`, async t => {
    const wrong = {
      socketPath: join(folder(t), 's'),
      memory: 'image',
      ...options,
    } as unknown as FirecrackerServerOptions;

    const error = await t.throwsAsync(serveFirecracker(wrong), { code });

    t.regex(error.message, message);
  });
}

test('accept ends with ERR_UFFD_TIMEOUT when nobody comes', async t => {
  const { server } = await serving(t);

  await t.throwsAsync(server.accept({ timeout: 20 }), { code: 'ERR_UFFD_TIMEOUT' });
});

test('accept ends with the reason of its signal', async t => {
  const { server } = await serving(t);
  const controller = new AbortController();
  const waiting = server.accept({ signal: controller.signal });

  controller.abort(new Error('no longer wanted'));

  await t.throwsAsync(waiting, { message: 'no longer wanted' });
  await t.throwsAsync(server.accept({ signal: controller.signal }), { message: 'no longer wanted' });
});

test('accept and iteration end when the server is closed', async t => {
  const { server } = await serving(t);
  const waiting = server.accept();
  const sessions = (async () => {
    for await (const session of server) t.fail(`session ${session.id}`);
  })();

  await server.close();

  await t.throwsAsync(waiting, { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  await sessions;
  await t.throwsAsync(server.accept(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  await server.close();
});
