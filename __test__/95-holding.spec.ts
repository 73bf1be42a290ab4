// Sessions that are held, and functions that say what happens to memory that cannot be served.

import { spawnSync } from 'node:child_process';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { once } from 'node:events';
import { copyFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import {
  callbackSource,
  type FailurePolicy,
  fileSource,
  KiB,
  MemoryMapping,
  Pager,
  type PageSource,
  type ServeOptions,
  type Session,
  type SessionFailure,
  type SessionHold,
} from 'userfaultfd';

import { Peer } from '../examples/support/peer.js';
import { mapped, PAGE } from './helpers/faults.js';
import { program } from './helpers/programs.js';
import { canRun, folder, image, IMAGE_SIZE, serving } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

const PAGES = 16;

/** A source that fails until it is mended: then each byte tells its page. */
function failing(): { source: PageSource; mend: () => void } {
  let broken = true;
  const source = callbackSource(
    (offset, length) => {
      if (broken) throw new Error('the store is down');
      return new Uint8Array(length).fill(1 + offset / PAGE);
    },
    { size: PAGES * PAGE, chunk: PAGE, retries: 0 },
  );
  return { source, mend: () => (broken = false) };
}

interface Made {
  pager: Pager;
  mapping: MemoryMapping;
  session: Session;
  mend: () => void;
}

async function served(t: ExecutionContext, options: Partial<ServeOptions>): Promise<Made | undefined> {
  if (!canRun(t)) return undefined;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const pager = pagerOf(t);
  const { source, mend } = failing();
  const session = await pager.serve(mapping, { source, window: 4 * KiB, ...options });
  return { pager, mapping, session, mend };
}

async function held(session: Session): Promise<SessionHold> {
  if (session.held) return session.held;
  // A timer that holds the event loop open: a signal of its own would not, and the event may come after `hold()` has resolved.
  const deadline = new AbortController();
  const timer = setTimeout(() => deadline.abort(), 10_000);
  try {
    const [hold] = (await once(session, 'held', { signal: deadline.signal })) as [SessionHold];
    return hold;
  } finally {
    clearTimeout(timer);
  }
}

test("'hold': faults of a source that fails wait, and are answered when it is resumed", async t => {
  const made = await served(t, { onFailure: 'hold' });
  if (!made) return;
  const { pager, mapping, session, mend } = made;
  const heard: unknown[] = [];
  const listen = (message: unknown): void => void heard.push(message);
  subscribe('userfaultfd:session:held', listen);
  t.teardown(() => unsubscribe('userfaultfd:session:held', listen));
  const told = once(pager, 'held');

  const reads = [3, 5, 3].map(async page => mapping.read(page * PAGE, 2));
  const hold = await held(session);

  t.deepEqual(await told, [session, hold]);
  t.true(heard.some(message => (message as { session: Session }).session === session));
  t.is(hold.reason, 'source-failed');
  t.is(hold.error?.code, 'ERR_UFFD_SOURCE');
  t.like(hold.error?.cause, { message: 'the store is down' });
  t.is(hold.until, undefined);
  t.is(session.held, hold);
  await mapping.discard(5 * PAGE, PAGE);

  mend();
  await session.resume();

  t.is(session.held, undefined);
  t.deepEqual(
    (await Promise.all(reads)).map(bytes => bytes[0]),
    [4, 0, 4],
  );
  t.is((await session.close({ rest: 'zero' })).error, undefined);
});

test('a VM whose image is gone waits, and goes on from another file', async t => {
  if (!canRun(t)) return;
  const { connect, memory, bytes, server } = await serving(t, { onFailure: 'hold', window: 4 * KiB });
  const copy = join(folder(t), 'copy');
  copyFileSync(memory, copy);
  const { peer, session } = await connect();
  await peer.ask('touch', 'limit=64');
  truncateSync(memory, 0);
  const told = once(server, 'held');
  peer.send('compare', copy);
  const hold = await held(session);
  t.deepEqual(await told, [session, hold]);
  t.is(hold.reason, 'source-failed');

  await session.resume({ source: fileSource(copy) });

  t.is((await peer.answer<'compare'>()).different, 0);
  t.is(session.stats().pagesPoisoned, 0);
  t.is((await peer.ask('read', 0, 8)).hex, bytes.subarray(0, 8).toString('hex'));
});

for (const [rest, found] of [
  ['poison', 'efault'],
  ['zero', 'ok'],
] as const) {
  test(`a held session is closed as it is told to: ${rest}`, async t => {
    if (!canRun(t)) return;
    const { connect, memory } = await serving(t, { onFailure: 'hold', window: 4 * KiB });
    const { peer, session } = await connect();
    truncateSync(memory, 0);
    peer.send('probe', PAGE);
    await held(session);

    const end = await session.close({ rest });

    t.is(end.reason, 'closed');
    t.is(end.error?.code, 'ERR_UFFD_SOURCE', 'why it was held');
    t.is((await peer.answer<'probe'>()).result, found);
    await t.throwsAsync(session.resume(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  });
}

test('a session is held on purpose, and nothing is lost', async t => {
  const made = await served(t, {});
  if (!made) return;
  const { session, mapping, mend } = made;
  mend();
  await session.hold();
  t.is((await held(session)).reason, 'asked');
  const read = mapping.read(PAGE, 1);
  while (session.stats().faults === 0) await new Promise(setImmediate);
  t.is(session.stats().faultsInstalled, 0);

  await session.resume();
  await session.resume();

  t.deepEqual([...(await read)], [2]);
  t.is(session.held, undefined);
});

test('a hold that lasts too long ends in poison', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t, { onFailure: 'hold', holdTimeout: 50, window: 4 * KiB });
  const { peer, session } = await connect();
  truncateSync(memory, 0);

  peer.send('probe', PAGE);
  const { at, until } = await held(session);

  t.true(until !== undefined && until.getTime() - at.getTime() <= 50);
  t.is((await peer.answer<'probe'>()).result, 'efault');
  t.is((await session.closed).reason, 'source-failed');
});

for (const [answer, signal] of [
  ['poison', 'SIGBUS'],
  ['kill', 'SIGKILL'],
] as const) {
  test(`a function says what happens: ${answer}`, async t => {
    if (!canRun(t)) return;
    const asked: SessionFailure[] = [];
    const { connect, memory } = await serving(t, {
      window: 4 * KiB,
      onFailure: async failure => {
        asked.push(failure);
        return Promise.resolve(answer);
      },
    });
    const { peer, session } = await connect();
    truncateSync(memory, 0);

    peer.send('touch');

    t.is((await peer.ended).signal, signal);
    t.is((await session.closed).reason, 'source-failed');
    t.is(asked.length, 1);
    t.is(asked[0]?.session, session);
    t.is(asked[0]?.peer.pid, session.peer.pid);
    t.is(asked[0]?.reason, 'source-failed');
    t.is(asked[0]?.error.code, 'ERR_UFFD_SOURCE');
    t.false(asked[0]?.signal.aborted);
  });
}

test('a function says that it is held, and the session goes on later', async t => {
  const made = await served(t, { onFailure: () => 'hold' });
  if (!made) return;
  const read = made.mapping.read(7 * PAGE, 1);
  const hold = await held(made.session);
  t.is(hold.reason, 'source-failed');

  made.mend();
  await made.session.resume();

  t.deepEqual([...(await read)], [8]);
});

for (const [what, onFailure, warning] of [
  [
    'throws',
    () => {
      throw new Error('no idea');
    },
    /no idea/,
  ],
  ['rejects', async () => Promise.reject(new Error('no idea')), /no idea/],
  ['says what is no policy', () => 'zero' as FailurePolicy, /'poison', 'kill', 'hold', got 'zero'/],
  ['never answers', async () => new Promise<FailurePolicy>(() => {}), undefined],
] as const) {
  test.serial(`a function that ${what}: what is missing is poisoned`, async t => {
    if (!canRun(t)) return;
    const { connect, memory } = await serving(t, { window: 4 * KiB, onFailure, decisionTimeout: 100 });
    const warnings: Error[] = [];
    const listen = (told: Error): void => void warnings.push(told);
    process.on('warning', listen);
    t.teardown(() => process.off('warning', listen));
    const { peer, session } = await connect();
    truncateSync(memory, 0);

    t.is((await peer.ask('probe', PAGE)).result, 'efault');

    t.is((await session.closed).error?.code, 'ERR_UFFD_SOURCE');
    if (warning) t.true(warnings.some(({ message }) => warning.test(message)));
  });
}

test('each image has a policy of its own', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const asked: SessionFailure[] = [];
  const { connect } = await serving(t, {
    onFailure: 'poison',
    memory: () => ({
      memory: path,
      window: 4 * KiB,
      onFailure: failure => {
        asked.push(failure);
        return 'kill';
      },
    }),
  });
  const { peer } = await connect();
  truncateSync(path, 0);

  peer.send('touch');

  t.is((await peer.ended).signal, 'SIGKILL');
  t.is(asked.length, 1);
});

test('memory that fails before its session is there is not held, and a function is asked without a session', async t => {
  if (!canRun(t)) return;
  for (const policy of ['hold', 'asked'] as const) {
    const asked: SessionFailure[] = [];
    const onFailure = (failure: SessionFailure): FailurePolicy => {
      asked.push(failure);
      return 'hold';
    };
    const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
    const pager = Pager.create();
    const { source } = failing();

    await t.throwsAsync(
      pager.serve(mapping, { source, mode: 'fill', onFailure: policy === 'hold' ? policy : onFailure }),
      { code: 'ERR_UFFD_SOURCE' },
    );

    t.is(asked.length, policy === 'hold' ? 0 : 1);
    t.is(asked[0]?.session, undefined);
    await pager.close();
  }
});

test('options of policies, and sources to resume from, are checked', async t => {
  const made = await served(t, {});
  if (!made) return;
  const { session, pager, mapping } = made;
  type Loose = never;
  for (const [options, code] of [
    [{ onFailure: 'zero' }, 'ERR_INVALID_ARG_VALUE'],
    [{ onFailure: 5 }, 'ERR_INVALID_ARG_VALUE'],
    [{ decisionTimeout: 0 }, 'ERR_OUT_OF_RANGE'],
    [{ holdTimeout: -1 }, 'ERR_OUT_OF_RANGE'],
    [{ holdTimeout: '1' }, 'ERR_INVALID_ARG_TYPE'],
  ] as const) {
    await t.throwsAsync(pager.serve(mapping, { source: failing().source, ...(options as object) }), { code });
  }
  await t.throwsAsync(session.resume({ source: 'file' as Loose }), { code: 'ERR_INVALID_ARG_TYPE' });
  await t.throwsAsync(session.resume({ from: 1 } as Loose), { code: 'ERR_INVALID_ARG_VALUE' });
  await session.hold();
  const short = join(folder(t), 'short');
  writeFileSync(short, Buffer.alloc(PAGE));
  await t.throwsAsync(session.resume({ source: fileSource(short) }), {
    code: 'ERR_UFFD_PROTOCOL',
    message: /4096 bytes, .* 65536/,
  });
  t.is(session.held?.reason, 'asked');
  await session.close({ rest: 'zero' });
  await t.throwsAsync(session.hold(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

const HOLDING = join(import.meta.dirname, 'fixtures', 'holding.js');

test('a program that ends while it holds leaves no zeros and no hang', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const socketPath = join(folder(t), 'vm.sock');
  const { ended } = await program(t, 'holding', 'exit', socketPath, path);
  const peer = new Peer(['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  t.teardown(() => peer.kill());
  await peer.ready();
  truncateSync(path, 0);

  // The program ends as soon as it hears that the session is held.
  t.is((await peer.ask('probe', 9 * PAGE)).result, 'efault');
  t.deepEqual(await ended, [7, null]);
});

test('a thread that touches memory which only it could resume is told so, and the program ends', t => {
  if (!canRun(t)) return;
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, [HOLDING, 'touch'], {
    encoding: 'utf8',
    timeout: 30_000,
    killSignal: 'SIGKILL',
  });

  t.deepEqual([status, signal, stdout], [null, 'SIGABRT', 'held\n'], stderr);
  t.regex(stderr, /deadlock: .* 0x[0-9a-f]+ while the session is held/);
});
