// Which image for whom: `memory` as a function, and what becomes of processes that get none.

import { once } from 'node:events';
import { truncateSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import test, { type ExecutionContext } from 'ava';
import {
  type ChooseImage,
  type ImageRequest,
  MiB,
  serveFirecracker,
  type UffdError,
  type UffdErrorCode,
} from 'userfaultfd';

import { Peer } from '../examples/support/peer.js';
import { program } from './helpers/programs.js';
import {
  canRun,
  folder,
  image,
  IMAGE_SIZE,
  nextRejection,
  PAGE,
  resources,
  serving,
} from './helpers/serving.js';

/** A promise, and what settles it. */
function deferred<T>(): { promise: Promise<T>; resolve: (value: T) => void } {
  let resolve!: (value: T) => void;
  const promise = new Promise<T>(done => {
    resolve = done;
  });
  return { promise, resolve };
}

/** Resolves when the signal has aborted. */
async function aborted(signal: AbortSignal): Promise<void> {
  if (!signal.aborted) await once(signal, 'abort');
}

test('one socket serves every process from the image that is its own', async t => {
  if (!canRun(t)) return;
  const images = new Map([MiB, 2 * MiB, 3 * MiB].map(size => [size, image(t, size)]));
  const { connect } = await serving(t, {
    memory: async ({ regions }) => images.get(regions[0]?.length ?? 0)?.path ?? '',
  });

  const served = await Promise.all(
    [...images].map(async ([size, { bytes }]) => {
      const { peer } = await connect('--region', `${size}`);
      await peer.ask('touch', 'order=random', 'seed=1');
      return [(await peer.ask('read', PAGE, 4096)).hex, bytes.subarray(PAGE, 2 * PAGE).toString('hex')];
    }),
  );

  for (const [read, expected] of served) t.is(read, expected);
});

test('the function is told who asks, and may answer at once, by path or by URL', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  const requests: ImageRequest[] = [];
  const { connect } = await serving(t, {
    memory: request => {
      requests.push(request);
      return requests.length === 1 ? path : pathToFileURL(path);
    },
  });

  const one = await connect();
  const two = await connect();

  for (const [index, { peer, session }] of [one, two].entries()) {
    const request = requests[index];
    t.is(request?.peer.pid, peer.pid);
    t.deepEqual(request?.peer, session.peer);
    t.deepEqual(request?.regions, session.regions);
    t.is(request?.pageSize, PAGE);
    t.false(request?.signal.aborted);
    t.is((await peer.ask('read', 3 * PAGE, 32)).hex, bytes.subarray(3 * PAGE, 3 * PAGE + 32).toString('hex'));
  }
});

test('what the answer says of window and policy goes before what the server says', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const { connect } = await serving(t, {
    memory: () => ({ memory: path, window: PAGE, onFailure: 'kill' }),
    window: MiB,
    onFailure: 'poison',
  });
  const { peer, session } = await connect();

  await peer.ask('read', 0, 8);
  truncateSync(path, 0);
  peer.send('read', 9 * PAGE, 8);

  t.is((await session.closed).reason, 'source-failed');
  t.is(session.stats().pagesInstalled, 1);
  t.is((await peer.ended).signal, 'SIGKILL');
});

test('a process that faults while it is being decided about waits, and gets the bytes', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  const [asked, decided] = [deferred<undefined>(), deferred<string>()];
  const { start, server } = await serving(t, {
    memory: async () => {
      asked.resolve(undefined);
      return decided.promise;
    },
  });
  const peer = start('--region', `${IMAGE_SIZE}`);
  await peer.ready();
  const reading = peer.ask('read', 7 * PAGE, 32);
  await asked.promise;
  t.deepEqual(server.sessions, []);

  decided.resolve(path);

  t.is((await reading).hex, bytes.subarray(7 * PAGE, 7 * PAGE + 32).toString('hex'));
  t.is((await server.accept({ timeout: 10_000 })).peer.pid, peer.pid);
});

const CAUSE = new Error('no such customer');
const NO_IMAGE: [
  what: string,
  memory: (t: ExecutionContext) => ChooseImage,
  code: UffdErrorCode,
  message: RegExp,
][] = [
  [
    'throws',
    () => () => {
      throw CAUSE;
    },
    'ERR_UFFD_SOURCE',
    /process \d+: no such customer/,
  ],
  ['rejects', () => async () => Promise.reject(CAUSE), 'ERR_UFFD_SOURCE', /process \d+: no such customer/],
  ['answers nothing', () => (() => {}) as never, 'ERR_UFFD_SOURCE', /the answer of options.memory/],
  ['answers a number', () => (() => 5) as never, 'ERR_UFFD_SOURCE', /the answer of options.memory.*got 5/],
  ['answers no path', () => (() => ({})) as never, 'ERR_UFFD_SOURCE', /the answer of options.memory.memory/],
  [
    'misspells an option',
    () => () => ({ memory: 'x', windows: 1 }),
    'ERR_UFFD_SOURCE',
    /`windows` in `the answer of options.memory`/,
  ],
  [
    'answers with a window that is none',
    () => () => ({ memory: 'x', window: 12_288 }),
    'ERR_UFFD_SOURCE',
    /the answer of options.memory.window.*12288/,
  ],
  [
    'answers with a policy that is none',
    () => (() => ({ memory: 'x', onFailure: 'zero' })) as never,
    'ERR_UFFD_SOURCE',
    /the answer of options.memory.onFailure.*'zero'/,
  ],
  ['answers a file that is missing', () => () => '/nonexistent/image', 'ERR_UFFD_SOURCE', /nonexistent/],
  [
    'answers an image that is too small',
    t => () => image(t, MiB).path,
    'ERR_UFFD_REGION',
    /beyond the memory image/,
  ],
];

for (const [what, memory, code, message] of NO_IMAGE) {
  test(`a function that ${what} has the process turned away, its memory poisoned`, async t => {
    if (!canRun(t)) return;
    const before = resources();
    const { start, server } = await serving(t, { memory: memory(t) });
    const next = nextRejection(server);
    const peer = start('--region', `${IMAGE_SIZE}`);
    await peer.ready();
    // It waits already, or comes too late: the answer is the same.
    const waiting = peer.ask('probe', PAGE);

    const rejection = await next;

    t.is(rejection.error.code, code, rejection.error.message);
    t.regex(rejection.error.message, message);
    t.is(rejection.peer?.pid, peer.pid);
    t.is((await waiting).result, 'efault');
    t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault');
    peer.send('read', 5 * PAGE, 8);
    t.is((await peer.ended).signal, 'SIGBUS');
    await server.close();
    // Threads that open images stay a moment, for the next one.
    const lasting = (threads: string[]): string[] => threads.filter(name => name !== 'uffd-job');
    t.deepEqual(lasting(resources().threads), lasting(before.threads));
    t.is(resources().fds.length, before.fds.length);
  });
}

test('what the function has thrown is the cause of the rejection', async t => {
  if (!canRun(t)) return;
  const { start, server } = await serving(t, {
    memory: async () => Promise.reject(CAUSE),
    onFailure: 'kill',
  });
  const next = nextRejection(server);
  const peer = start('--region', `${IMAGE_SIZE}`);

  t.is((await next).error.cause, CAUSE);
  t.is((await peer.ended).signal, 'SIGKILL');
});

test('a server goes on with others after it has turned one away', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  let count = 0;
  const { start, server, connect } = await serving(t, {
    memory: () => ((count += 1) === 1 ? '/nonexistent' : path),
  });
  const next = nextRejection(server);
  start('--region', `${PAGE}`);
  await next;

  const { peer } = await connect();

  t.is((await peer.ask('read', 0, 16)).hex, bytes.subarray(0, 16).toString('hex'));
});

test('an answer that does not come in time is not waited for: the signal aborts, the memory is poisoned', async t => {
  if (!canRun(t)) return;
  const asked = deferred<AbortSignal>();
  const { start, server } = await serving(t, {
    handshakeTimeout: 300,
    memory: async ({ signal }) => {
      asked.resolve(signal);
      await aborted(signal);
      return '/too/late';
    },
  });
  const next = nextRejection(server);
  const peer = start('--region', `${IMAGE_SIZE}`);
  await peer.ready();
  const waiting = peer.ask('probe', PAGE);

  const { error } = await next;

  t.is(error.code, 'ERR_UFFD_TIMEOUT', error.message);
  t.regex(error.message, /300 ms/);
  const signal = await asked.promise;
  await aborted(signal);
  t.is(signal.reason, error);
  t.is((await waiting).result, 'efault');
  t.false(server.closed);
});

test('a process that exits while it is being decided about ends the question', async t => {
  if (!canRun(t)) return;
  const asked = deferred<AbortSignal>();
  const { start, server } = await serving(t, {
    memory: async ({ signal }) => {
      asked.resolve(signal);
      await aborted(signal);
      throw new Error('nobody hears this');
    },
  });
  const next = nextRejection(server);
  const peer = start('--region', `${IMAGE_SIZE}`);
  const signal = await asked.promise;

  peer.kill();

  const { error } = await next;
  t.is(error.code, 'ERR_UFFD_PROTOCOL', error.message);
  t.is(error.cause, undefined);
  await aborted(signal);
});

test('closing the server answers those that wait for a decision', async t => {
  if (!canRun(t)) return;
  const asked = deferred<AbortSignal>();
  const { start, server } = await serving(t, {
    memory: async ({ signal }) => {
      asked.resolve(signal);
      await aborted(signal);
      return '/too/late';
    },
  });
  const peer = start('--region', `${IMAGE_SIZE}`);
  await peer.ready();
  const waiting = peer.ask('probe', PAGE);
  const signal = await asked.promise;

  await server.close();

  t.is((await waiting).result, 'efault');
  t.true(signal.aborted);
  t.is((signal.reason as UffdError).code, 'ERR_UFFD_USE_AFTER_CLOSE');
});

for (const policy of ['poison', 'kill'] as const) {
  test(`a program that ends while it decides leaves no zeros and no hang (${policy})`, async t => {
    if (!canRun(t)) return;
    const socketPath = join(folder(t), 's');
    const { ended } = await program(t, 'asked', socketPath, policy);
    const peer = new Peer(['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
    t.teardown(() => peer.kill());
    if (policy === 'poison') await peer.ready();

    if (policy === 'kill') {
      t.is((await peer.ended).signal, 'SIGKILL');
    } else {
      t.is((await peer.ask('probe', PAGE)).result, 'efault');
    }
    t.deepEqual(await ended, [7, null]);
  });
}

test('a process beyond maxSessions reads SIGBUS, and does not wait for ever', async t => {
  if (!canRun(t)) return;
  const { server, connect, start } = await serving(t, { maxSessions: 1 });
  const first = await connect();
  const next = nextRejection(server);
  const peer = start('--region', `${IMAGE_SIZE}`);
  await peer.ready();
  const waiting = peer.ask('probe', PAGE);

  t.is((await next).error.code, 'ERR_UFFD_EXHAUSTED');
  t.is((await waiting).result, 'efault');
  t.is((await first.peer.ask('probe', 0)).result, 'ok');
});

test('a process for which there is not even room to be turned away waits its turn, and reads SIGBUS then', async t => {
  if (!canRun(t)) return;
  const { server, connect, start, socketPath } = await serving(t, { maxSessions: 1, handshakeTimeout: 500 });
  const first = await connect();
  // As many as are heard at one time, who say nothing until their time is over.
  const silent = Array.from({ length: 64 }, () => createConnection(socketPath));
  t.teardown(() => silent.forEach(socket => socket.destroy()));
  await Promise.all(silent.map(async socket => once(socket, 'connect')));
  const rejected = new Promise<UffdError>(resolve => {
    server.on('rejected', ({ peer: from, error }) => {
      if (from?.pid === peer.pid) resolve(error);
    });
  });
  const peer = start('--region', `${IMAGE_SIZE}`);
  await peer.ready();

  t.is((await peer.ask('probe', PAGE)).result, 'efault');
  t.is((await rejected).code, 'ERR_UFFD_EXHAUSTED');
  t.is((await first.peer.ask('probe', 0)).result, 'ok');
});

test('a process whose regions do not fit the image reads SIGBUS, and does not wait for ever', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t, { size: MiB });
  const next = nextRejection(server);
  const peer = start('--region', `${2 * MiB}`);
  await peer.ready();
  const waiting = peer.ask('probe', PAGE);

  t.is((await next).error.code, 'ERR_UFFD_REGION');
  t.is((await waiting).result, 'efault');
  t.is((await peer.ask('probe', 2 * MiB - PAGE)).result, 'efault');
  await peer.ask('discard', 0, PAGE);
});

test('a process that has handed over memory without saying which is killed', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t, { handshakeTimeout: 300 });
  const next = nextRejection(server);
  const peer = start('--region', `${PAGE}`, '--json', '[{"base_host_virt_addr":');
  peer.send('read', 0, 8);

  t.is((await next).error.code, 'ERR_UFFD_TIMEOUT');
  t.is((await peer.ended).signal, 'SIGKILL');
});

test('memory that is neither an image nor a function is refused by name', async t => {
  for (const [memory, code] of [
    [5, 'ERR_INVALID_ARG_TYPE'],
    [undefined, 'ERR_INVALID_ARG_TYPE'],
    ['', 'ERR_INVALID_ARG_VALUE'],
    [{ memory: 'image' }, 'ERR_INVALID_ARG_TYPE'],
  ] as const) {
    const options = { socketPath: join(folder(t), 's'), memory } as never;
    await t.throwsAsync(serveFirecracker(options), { code, message: /options\.memory/ });
  }
});
