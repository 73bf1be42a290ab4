/** What is left of sources: of those that the caller has dropped, and of those that were made for one session. */

import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync, readdirSync, readlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import test, { type ExecutionContext } from 'ava';
import {
  callbackSource,
  fileSource,
  MemoryMapping,
  MiB,
  overlaySource,
  type PageSource,
  serveFirecracker,
} from 'userfaultfd';

import { mapped, PAGE } from './helpers/faults.js';
import { pagerOf } from './helpers/pagers.js';
import { canRun, folder, image, IMAGE_SIZE, serving } from './helpers/serving.js';

const FIXTURE = fileURLToPath(new URL('fixtures/sources.js', import.meta.url));
const run = promisify(execFile);
/** Milliseconds. */
const LIMIT = 60_000;

interface Holds {
  fds: number;
  threads: number;
  rss: number;
}

async function program(
  which: string,
  path: string,
  rounds: number,
): Promise<{ before: Holds; after: Holds }> {
  const args = ['--expose-gc', FIXTURE, which, path, `${rounds}`];
  // As many descriptors as a process has where nobody says otherwise.
  const limited = ['-c', 'ulimit -n 1024; exec "$0" "$@"', process.execPath, ...args];
  const { stdout } = await run('sh', limited, { timeout: LIMIT, killSignal: 'SIGKILL' });
  return JSON.parse(stdout || '{}') as { before: Holds; after: Holds };
}

function sparse(t: ExecutionContext): string {
  const path = join(folder(t), 'image');
  writeFileSync(path, Buffer.alloc(4 * MiB));
  return path;
}

for (const [which, rounds] of [
  ['file', 300],
  ['over a file', 300],
  ['callback', 300],
  ['worker', 10],
  ['overlays', 200],
  ['refused', 200],
  ['buffer', 60],
] as const) {
  test(`sources that are dropped, or made for one session, leave nothing behind: ${which}`, async t => {
    if (!canRun(t)) return;

    const { before, after } = await program(which, sparse(t), rounds);

    t.true(after.fds <= before.fds + 2, `${before.fds} descriptors before, ${after.fds} after`);
    t.true(after.threads <= before.threads + 2, `${before.threads} threads before, ${after.threads} after`);
    t.true(after.rss <= before.rss + 80 * MiB, `${before.rss} bytes before, ${after.rss} after`);
  });
}

test('files that are dropped are closed before a process runs out of descriptors', async t => {
  if (!canRun(t)) return;

  const { after } = await program('file without a hint', sparse(t), 2_000);

  t.true(after.fds < 1_000, `${after.fds} descriptors`);
});

test('a source that nobody but its session has answers to the end of it', async t => {
  if (!canRun(t)) return;

  await t.notThrowsAsync(program('dropped', '', 0));
});

test('a session goes on from a file, or an overlay over one, that was closed', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, 4 * MiB);
  const base = fileSource(path);
  for (const source of [overlaySource(base, [{ offset: 0, data: Buffer.from([1]) }]), base]) {
    const mapping = mapped(t, MemoryMapping.anonymous(4 * MiB));
    const session = await pagerOf(t).serve(mapping, { source, window: PAGE });
    source.close();

    t.deepEqual(await mapping.read(70 * PAGE, 10), bytes.subarray(70 * PAGE, 70 * PAGE + 10));

    await session.close({ rest: 'zero' });
  }
});

/** Descriptors of a file. */
function open(path: string): number {
  return readdirSync('/proc/self/fd').filter(fd => {
    const link = `/proc/self/fd/${fd}`;
    return existsSync(link) && readlinkSync(link) === path;
  }).length;
}

test('what a server has made for one process is closed with its session, or where there is none', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const overlays = [{ offset: 0, data: Buffer.from([1, 2]) }];
  const far = [{ offset: IMAGE_SIZE + PAGE, data: Buffer.from([1]) }];
  let choice = overlays;
  const { server, connect, start } = await serving(t, { memory: () => ({ memory: path, overlays: choice }) });
  for (let round = 0; round < 3; round += 1) {
    const { peer, session } = await connect();
    t.is((await peer.ask('read', 0, 2)).hex, '0102');
    t.is(open(path), 1);
    peer.kill();
    await session.closed;
  }
  t.is(open(path), 0);

  choice = far;
  const rejected = once(server, 'rejected');
  start('--region', `${IMAGE_SIZE}`);
  await rejected;

  t.is(open(path), 0);
});

test('what a server was to serve is closed where it cannot listen', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const source = fileSource(path);

  await t.throwsAsync(serveFirecracker({ socketPath: '/nowhere/s', memory: source }), {
    code: 'ERR_UFFD_SOCKET',
  });

  t.is(open(path), 1, 'it is the caller’s');
  source.close();
  t.is(open(path), 0);
});

test('a server holds a callback that nobody else has, and tells what it has thrown', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const bytes = readFileSync(path);
  let fails = false;
  const made = (): PageSource =>
    callbackSource(
      (offset, length) => {
        if (fails) throw new TypeError('as asked');
        return bytes.subarray(offset, offset + length);
      },
      { size: IMAGE_SIZE, chunk: PAGE },
    );
  const { connect } = await serving(t, { memory: made, window: PAGE });
  const { peer, session } = await connect();
  await setImmediate();
  t.is((await peer.ask('read', 9 * PAGE, 2)).hex, bytes.subarray(9 * PAGE, 9 * PAGE + 2).toString('hex'));
  fails = true;

  await peer.ask('probe', 20 * PAGE);

  const { error } = await session.closed;
  t.is((error?.cause as Error | undefined)?.message, 'as asked');
});
