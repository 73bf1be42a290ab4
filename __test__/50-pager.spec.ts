// The pager: memory of this process and of others, from files and from JavaScript.

import { execFileSync, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { truncateSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { Worker } from 'node:worker_threads';

import test, { type ExecutionContext } from 'ava';
import {
  callbackSource,
  type CallbackSourceOptions,
  fileSource,
  KiB,
  MemoryMapping,
  Pager,
  type PageSource,
  type ServeOptions,
  type Session,
  type SessionEnd,
  Userfaultfd,
  workerSource,
} from 'userfaultfd';

import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { canRun, counted, image, resources } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

const PAGES = 64;

const pagerIfAny = (t: ExecutionContext): Pager | undefined => (canRun(t) ? pagerOf(t) : undefined);

/** Memory of this process, served; closed in the right order when the test ends. */
async function served(
  t: ExecutionContext,
  source: PageSource,
  options: Partial<ServeOptions> = {},
  pages = PAGES,
): Promise<{ pager: Pager; mapping: MemoryMapping; session: Session } | undefined> {
  const mapping = mapped(t, MemoryMapping.anonymous(pages * PAGE, { pages: 'transparent' }));
  const pager = pagerIfAny(t);
  if (!pager) return undefined;
  const session = await pager.serve(mapping, { source, ...options });
  return { pager, mapping, session };
}

/** How a session ended. Waiting for that alone would not keep the program alive. */
async function ended({ pager, session }: { pager: Pager; session: Session }): Promise<SessionEnd> {
  await pager.drain({ timeout: 10_000 });
  return session.closed;
}

/** A source that brings pages of which every byte tells the page, and what it was asked for. */
function counting(options: Partial<CallbackSourceOptions> = {}): { source: PageSource; asked: number[] } {
  const asked: number[] = [];
  const source = callbackSource(
    (offset, length) => {
      asked.push(offset);
      const bytes = new Uint8Array(length);
      for (let at = 0; at < length; at += PAGE) bytes.fill(1 + (offset + at) / PAGE, at, at + PAGE);
      return bytes;
    },
    { size: PAGES * PAGE, chunk: 64 * KiB, ...options },
  );
  return { source, asked };
}

test('memory of this process comes from a file, also where this thread touches it itself', async t => {
  const { path, bytes } = image(t, PAGES * PAGE);
  const made = await served(t, fileSource(path));
  if (!made) return;
  const { mapping, session, pager } = made;

  t.deepEqual(await mapping.read(5 * PAGE + 7, 100), bytes.subarray(5 * PAGE + 7, 5 * PAGE + 107));
  t.true(Buffer.from(mapping.view(32 * PAGE)).equals(bytes.subarray(32 * PAGE)));
  t.true((await mapping.read(0, PAGES * PAGE)).equals(bytes));

  t.deepEqual(pager.sessions, [session]);
  t.is(session.peer.pid, process.pid);
  t.deepEqual(session.regions, [{ address: mapping.address, length: PAGES * PAGE, sourceOffset: 0 }]);
  t.is((await counted(session, PAGES)).pagesInstalled, PAGES);
  t.throws(() => mapping.close(), { code: 'ERR_UFFD_FAULTS_WAITING', message: /session/ });
  t.is((await session.close()).reason, 'closed');
  t.deepEqual(pager.sessions, []);
});

test('what is given back reads zero and never the source again', async t => {
  const { path, bytes } = image(t, PAGES * PAGE);
  const made = await served(t, fileSource(new URL(`file://${path}`)));
  if (!made) return;
  const { mapping } = made;
  await mapping.read(0, 4 * PAGE);

  await mapping.discard(PAGE, 2 * PAGE);
  mapping.discardSync(40 * PAGE, PAGE);

  t.deepEqual(await mapping.read(PAGE, 2 * PAGE), pageOf(0, 2));
  t.deepEqual(await mapping.read(40 * PAGE, PAGE), pageOf(0));
  t.deepEqual(await mapping.read(3 * PAGE, PAGE), bytes.subarray(3 * PAGE, 4 * PAGE));
});

test('a file that shrinks ends the session by its policy, never in zeros', async t => {
  const { path } = image(t, PAGES * PAGE);
  const made = await served(t, fileSource(path));
  if (!made) return;
  truncateSync(path, 10 * PAGE);

  await t.throwsAsync(made.mapping.read(20 * PAGE, 1), { code: 'ERR_UFFD_SYSTEM' });

  const end = await ended(made);
  t.is(end.reason, 'source-failed');
  t.is(end.error?.code, 'ERR_UFFD_SOURCE');
});

test('a callback is asked for each chunk once, whoever waits for it', async t => {
  const { source, asked } = counting();
  // Closed after the pager is.
  const other = mapped(t, MemoryMapping.anonymous(PAGES * PAGE, { pages: 'transparent' }));
  const made = await served(t, source);
  if (!made) return;
  const { mapping, pager } = made;
  await pager.serve(other, { source });

  const bytes = await Promise.all([
    mapping.read(3 * PAGE, 1),
    mapping.read(4 * PAGE, 1),
    other.read(3 * PAGE, 1),
    mapping.read(17 * PAGE, 1),
  ]);

  t.deepEqual(
    bytes.map(part => part[0]),
    [4, 5, 4, 18],
  );
  t.deepEqual(
    asked.toSorted((a, b) => a - b),
    [0, 64 * KiB],
  );
});

test('memory that only this thread could fill is not to be touched by it', async t => {
  const { source } = counting();
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const pager = pagerIfAny(t);
  if (!pager) return;
  const early = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  early.arrayBuffer();
  await t.throwsAsync(pager.serve(early, { source }), { code: 'ERR_UFFD_WOULD_DEADLOCK' });

  await pager.serve(mapping, { source });

  const expected = { code: 'ERR_UFFD_WOULD_DEADLOCK' };
  t.throws(() => mapping.view(), expected);
  t.throws(() => mapping.arrayBuffer(), expected);
  t.throws(() => mapping.sharedArrayBuffer(), expected);
  t.throws(() => mapping.readSync(0, new Uint8Array(1)), expected);
  t.throws(() => mapping.writeSync(0, new Uint8Array(1)), expected);
  t.deepEqual([...(await mapping.read(0, 1))], [1]);
});

test('a thread that waits for itself all the same is told so, and the program ends', t => {
  if (!canRun(t)) return;
  const { status, signal, stdout, stderr } = spawnSync(
    process.execPath,
    [join(import.meta.dirname, 'fixtures', 'deadlock.js')],
    { encoding: 'utf8', timeout: 30_000, killSignal: 'SIGKILL' },
  );

  t.deepEqual([status, signal, stdout], [null, 'SIGABRT', '']);
  t.regex(stderr, /deadlock: .* 0x[0-9a-f]+ .*workerSource/);
});

test('a callback that fails is tried again, and what it brings then is used', async t => {
  let failures = 2;
  const source = callbackSource(
    (_, length) => {
      failures -= 1;
      if (failures >= 0) throw new Error('not just now');
      return new Uint8Array(length).fill(7);
    },
    { size: PAGES * PAGE, retries: 2 },
  );
  const made = await served(t, source);
  if (!made) return;

  t.deepEqual([...(await made.mapping.read(9 * PAGE, 1))], [7]);
  t.is(failures, -1);
});

test('what a callback throws that is no error is tried again, too, and told as it was thrown', async t => {
  let calls = 0;
  const source = callbackSource(
    () => {
      calls += 1;
      // eslint-disable-next-line @typescript-eslint/only-throw-error -- that is what this is about
      throw { code: 503 };
    },
    { size: PAGES * PAGE, retries: 1 },
  );
  const made = await served(t, source);
  if (!made) return;

  await t.throwsAsync(made.mapping.read(0, 1), { code: 'ERR_UFFD_SYSTEM' });

  const { error } = await ended(made);
  t.is(calls, 2);
  t.regex(error?.message ?? '', /\{ code: 503 \}/);
  t.deepEqual(error?.cause, { code: 503 });
});

const WRONGS: [string, Partial<CallbackSourceOptions>, (length: number) => unknown, RegExp][] = [
  ['throws', { retries: 0 }, () => Promise.reject(new Error('out of order')), /out of order/],
  ['brings too little', {}, length => new Uint8Array(length - 1), /brought \d+ bytes/],
  ['brings too much', {}, length => new Uint8Array(length + 1), /brought \d+ bytes/],
  ['brings no bytes', {}, () => 'bytes', /no view of bytes/],
  ['takes too long', { timeout: 30 }, async () => new Promise(() => {}), /longer than 30 ms/],
];

for (const [what, options, act, message] of WRONGS) {
  test(`a callback that ${what} ends the session by its policy, with the cause`, async t => {
    const source = callbackSource((_, length) => act(length) as Uint8Array, {
      size: PAGES * PAGE,
      ...options,
    });
    const made = await served(t, source);
    if (!made) return;

    await t.throwsAsync(made.mapping.read(0, 1), { code: 'ERR_UFFD_SYSTEM' });

    const { reason, error } = await ended(made);
    t.is(reason, 'source-failed');
    t.is(error?.code, 'ERR_UFFD_SOURCE');
    t.regex(error?.message ?? '', message);
    t.true(error?.cause instanceof Error);
    await t.throwsAsync(made.mapping.read(40 * PAGE, 1), { code: 'ERR_UFFD_SYSTEM' });
  });
}

test('a source that never answers ends the session as stalled', async t => {
  const source = callbackSource(async () => new Promise<Uint8Array>(() => {}), { size: PAGES * PAGE });
  const made = await served(t, source, { sourceTimeout: 50 });
  if (!made) return;

  await t.throwsAsync(made.mapping.read(0, 1), { code: 'ERR_UFFD_SYSTEM' });

  const { reason, error } = await ended(made);
  t.deepEqual([reason, error?.code], ['stalled', 'ERR_UFFD_TIMEOUT']);
});

test('a source that is closed fails who still wants bytes, and what was there stays', async t => {
  const { source } = counting();
  const made = await served(t, source);
  if (!made) return;
  await made.mapping.read(0, 1);
  const before = await made.mapping.read(PAGE, 1);

  source.close();

  await t.throwsAsync(made.mapping.read(40 * PAGE, 1), { code: 'ERR_UFFD_SYSTEM' });
  t.is((await ended(made)).reason, 'source-failed');
  t.deepEqual(await made.mapping.read(PAGE, 1), before);
  const fresh = mapped(t, MemoryMapping.anonymous(PAGE));
  await t.throwsAsync(made.pager.serve(fresh, { source }), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
});

test('a source on a thread of its own serves what this thread touches itself', async t => {
  const url = new URL('fixtures/source-module.js', import.meta.url);
  const source = workerSource(url, { size: PAGES * PAGE, chunk: 64 * KiB, workerData: { plus: 10 } });
  t.teardown(() => source.close());
  const made = await served(t, source);
  if (!made) return;

  const view = made.mapping.view();

  t.deepEqual(
    [0, 1, 17, 63].map(page => view[page * PAGE + 5]),
    [11, 12, 28, 74],
  );
});

test('a module that cannot be a source is an error when it is opened, and one that fails ends its sessions', async t => {
  const pager = pagerIfAny(t);
  if (!pager) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  const wrong = workerSource(new URL('fixtures/touching.js', import.meta.url), {
    size: PAGE,
    startTimeout: 5000,
  });
  const missing = workerSource(new URL('fixtures/none.js', import.meta.url), { size: PAGE });
  for (const source of [wrong, missing]) {
    await t.throwsAsync(pager.serve(mapping, { source }), {
      code: 'ERR_UFFD_SOURCE',
      message: /could not be started/,
    });
  }

  const failing = workerSource(new URL('fixtures/source-module.js', import.meta.url), {
    size: PAGE,
    retries: 0,
    workerData: { plus: -1 },
  });
  t.teardown(() => failing.close());
  const session = await pager.serve(mapping, { source: failing });
  await t.throwsAsync(mapping.read(0, 1), { code: 'ERR_UFFD_SYSTEM' });
  const { reason, error } = await ended({ pager, session });
  t.is(reason, 'source-failed');
  t.regex(error?.message ?? '', /never has any/);
});

test('a userfaultfd that came from elsewhere is served, and follows what its owner does', async t => {
  const pager = pagerIfAny(t);
  if (!pager) return;
  const { path, bytes } = image(t, PAGES * PAGE);
  const worker = new Worker(join(import.meta.dirname, 'fixtures', 'handing.js'), {
    workerData: { pages: PAGES },
  });
  t.teardown(async () => worker.terminate());
  const [{ fd, address }] = (await once(worker, 'message')) as [{ fd: number; address: bigint }];
  const uffd = Userfaultfd.adopt(fd);
  const region = { address, length: PAGES * PAGE, sourceOffset: 0 };
  const source = fileSource(path);
  const tooFar = [{ ...region, sourceOffset: PAGE }];
  const session = await pager.adopt(uffd, { regions: [region], source });
  t.true(uffd.closed);

  const ask = async (what: object): Promise<Buffer> => {
    const answer = once(worker, 'message');
    worker.postMessage(what);
    const [answered] = (await answer) as [Uint8Array];
    return Buffer.from(answered);
  };
  t.deepEqual(await ask({ page: 9 }), bytes.subarray(9 * PAGE, 10 * PAGE));
  t.deepEqual(await ask({ page: 9, discard: true }), pageOf(0));
  t.deepEqual(await ask({ page: 50 }), bytes.subarray(50 * PAGE, 51 * PAGE));
  t.is((await session.close({ rest: 'populate' })).reason, 'closed');

  const other = Userfaultfd.create();
  await t.throwsAsync(pager.adopt(other, { regions: tooFar, source }), { code: 'ERR_UFFD_REGION' });
  // It is still the caller's.
  other.close();
});

test('memory that was refused keeps no program alive', t => {
  if (!canRun(t)) return;
  const { status, stdout } = spawnSync(
    process.execPath,
    [join(import.meta.dirname, 'fixtures', 'refused.js')],
    { encoding: 'utf8', timeout: 10_000, killSignal: 'SIGKILL' },
  );

  t.deepEqual([status, stdout], [0, 'ERR_UFFD_REGION']);
});

test('a pager drains, closes, and leaves nothing behind', async t => {
  if (!canRun(t)) return;
  const { path } = image(t, PAGES * PAGE);
  const before = resources().fds.length;
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(PAGES * PAGE);
  const source = fileSource(path);
  const session = await pager.serve(mapping, { source });

  await t.throwsAsync(pager.drain({ timeout: 20 }), { code: 'ERR_UFFD_TIMEOUT' });
  await t.throwsAsync(pager.drain({ signal: AbortSignal.abort(new Error('stop')) }), { message: 'stop' });
  const draining = pager.drain();
  await session.close({ rest: 'populate' });
  await draining;
  t.deepEqual(mapping.residency(0, PAGE), ['present']);
  await pager.close();

  mapping.close();
  source.close();
  t.true(pager.closed);
  await t.throwsAsync(pager.serve(MemoryMapping.anonymous(PAGE), { source: fileSource(path) }), {
    code: 'ERR_UFFD_USE_AFTER_CLOSE',
  });
  const left = resources();
  t.false(left.threads.includes('uffd-pager'));
  t.true(left.fds.length <= before, `${left.fds.length - before} descriptors more`);
});

test('a program that ends while it serves itself ends', t => {
  if (!canRun(t)) return;
  const { path } = image(t, PAGES * PAGE);
  const program = `
    import { fileSource, MemoryMapping, Pager } from 'userfaultfd';
    const pager = Pager.create();
    const mapping = MemoryMapping.anonymous(${PAGES * PAGE});
    await pager.serve(mapping, { source: fileSource(process.argv[1]) });
    process.stdout.write(String((await mapping.read(0, 1)).length));
  `;
  const output = execFileSync(process.execPath, ['--input-type=module', '-e', program, path], {
    encoding: 'utf8',
    timeout: 30_000,
    cwd: join(import.meta.dirname, '..', '..'),
  });

  t.is(output, '1');
});

test('wrong arguments of pagers and sources are named, and nothing is left behind', async t => {
  const pager = pagerIfAny(t);
  if (!pager) return;
  type Loose = never;
  const source = fileSource('/nowhere');
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  const uffd = Userfaultfd.create();
  t.teardown(() => uffd.close());
  const region = { address: 4096n, length: PAGE, sourceOffset: 0 };
  const [TYPE, VALUE, RANGE] = ['ERR_INVALID_ARG_TYPE', 'ERR_INVALID_ARG_VALUE', 'ERR_OUT_OF_RANGE'];
  const rows: [() => unknown, string | undefined, RegExp][] = [
    [() => Pager.create({ cpu: -1 }), RANGE, /`options.cpu`/],
    [() => Pager.create({ cpus: 1 } as Loose), VALUE, /`cpus`/],
    [() => fileSource(5 as Loose), TYPE, /`path`/],
    [() => callbackSource('no' as Loose, { size: 1 }), TYPE, /`fetch`/],
    [() => callbackSource(() => pageOf(1), { size: 0 }), RANGE, /`options.size`/],
    [() => callbackSource(() => pageOf(1), { size: 1, chunk: 5000 }), RANGE, /`options.chunk`/],
    [() => callbackSource(() => pageOf(1), { size: 1, concurrency: 0 }), RANGE, /`options.concurrency`/],
    [() => callbackSource(() => pageOf(1), { size: 1, retry: 1 } as Loose), VALUE, /`retry`/],
    [() => workerSource('file:///x' as Loose, { size: 1 }), TYPE, /`url`/],
    [() => workerSource(new URL('file:///x'), { size: 1, startTimeout: 0 }), RANGE, /`options.startTimeout`/],
    [async () => pager.serve({} as Loose, { source }), TYPE, /`mapping`/],
    [async () => pager.serve(mapping, { source: {} as Loose }), TYPE, /`options.source`/],
    [async () => pager.serve(mapping, { source, window: 5000 }), RANGE, /`options.window`/],
    [async () => pager.serve(mapping, { source, onFailure: 'zero' as Loose }), VALUE, /`options.onFailure`/],
    [async () => pager.serve(mapping, { source, sourceTimeout: 0 }), RANGE, /`options.sourceTimeout`/],
    [async () => pager.serve(mapping, { sources: source } as Loose), VALUE, /`sources`/],
    [async () => pager.serve(mapping, { source }), 'ERR_UFFD_SOURCE', /nowhere/],
    [async () => pager.adopt({} as Loose, { source, regions: [] }), TYPE, /`uffd`/],
    [async () => pager.adopt(uffd, { source, regions: {} as Loose }), TYPE, /`options.regions`/],
    [
      async () => pager.adopt(uffd, { source, regions: [{ ...region, address: 4096 as Loose }] }),
      TYPE,
      /`options.regions\[0\].address`/,
    ],
    [
      async () => pager.adopt(uffd, { source, regions: [region, { ...region, length: 0 }] }),
      RANGE,
      /`options.regions\[1\].length`/,
    ],
    [
      async () => pager.adopt(uffd, { source, regions: [region], pageSize: 5000 }),
      RANGE,
      /`options.pageSize`/,
    ],
    [async () => pager.drain({ timeout: -1 }), RANGE, /`options.timeout`/],
    [async () => pager.close({ rest: 'kill' as Loose }), VALUE, /`options.rest`/],
  ];
  for (const [act, code, message] of rows) {
    await t.throwsAsync(async () => act(), { code: code as string, message }, String(act));
  }
  t.deepEqual(pager.sessions, []);
  t.false(uffd.closed);
});
