// `collapse`: what is there is joined to transparent huge pages, behind the faults.

import { spawnSync } from 'node:child_process';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import { bufferSource, MemoryMapping, MiB, Pager, type Session, type SessionStats } from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { mapped, PAGE } from './helpers/faults.js';
import { blocksIn, HUGE, hugeIn } from './helpers/huge.js';
import { canRun, folder, image, serving } from './helpers/serving.js';

const SIZE = 8 * MiB;

/** The counters when so many pages are joined, or it took too long. */
async function joined(session: Session, pages: number): Promise<SessionStats> {
  const until = performance.now() + 10_000;
  while (session.stats().pagesJoined < pages && performance.now() < until) await setTimeout(1);
  return session.stats();
}

test('a mapping is joined when it is there, and its bytes are what they were', async t => {
  if (!canRun(t)) return;
  const { bytes } = image(t, SIZE);
  // Zeros between others are copied, so that the kernel does not refuse them.
  bytes.fill(0, 3 * MiB, 3 * MiB + 8 * PAGE);
  const mapping = mapped(t, MemoryMapping.anonymous(SIZE, { pages: 'transparent' }));
  await using pager = Pager.create();
  const session = await pager.serve(mapping, { source: bufferSource(bytes), collapse: true });
  t.is(session.fallback, undefined);

  await session.populate();
  const { pagesJoined, blocksNotJoined } = await joined(session, SIZE / PAGE);

  t.deepEqual([pagesJoined, blocksNotJoined], [SIZE / PAGE, 0]);
  t.true(bytes.equals(await mapping.read(0, SIZE)));
});

test('the memory of another process is joined where it is whole, and is served as before', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, SIZE);
  const { peer, uffd, pidfd, regions } = await handedOver(t, `--region ${SIZE}`);
  await using pager = Pager.create();
  const session = await pager.adopt(uffd, { source: bufferSource(bytes), regions, pidfd, collapse: true });
  const { address, length } = regions[0] ?? { address: 0n, length: 0 };
  // In the middle of the last block.
  const inLast = Number(((address + BigInt(length)) / BigInt(HUGE)) * BigInt(HUGE) - address) - MiB;
  await peer.ask('discard', inLast, PAGE);
  const whole = ((blocksIn(address, length) - 1) * HUGE) / PAGE;

  await session.populate();
  const { pagesJoined } = await joined(session, whole);

  t.is(pagesJoined, whole);
  t.is(hugeIn(peer.pid, address, length) * 1024, whole * PAGE);
  t.is((await peer.ask('compare', path)).different, 0);
  await peer.ask('discard', 3 * MiB, PAGE);
  t.is((await peer.ask('zeros')).nonzero, 0);
  t.is(session.stats().pagesRemoved, 2);
});

test('what a server fills before it tells of a process is joined afterwards', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t, { mode: 'fill', collapse: true });

  const { peer, session } = await connect();
  await joined(session, (2 * HUGE) / PAGE);

  t.true(session.stats().pagesJoined >= (2 * HUGE) / PAGE);
  t.is((await peer.ask('compare', memory)).different, 0);
});

test('where nothing can be joined it is said why', async t => {
  if (!canRun(t)) return;
  const { bytes } = image(t, SIZE);
  const mapping = mapped(t, MemoryMapping.anonymous(SIZE));
  await using pager = Pager.create();
  const source = bufferSource(bytes);

  const session = await pager.serve(mapping, { source, collapse: true, modes: ['missing', 'write-protect'] });

  t.is(session.fallback?.code, 'ERR_UFFD_UNSUPPORTED');
  const fixture = fileURLToPath(new URL('fixtures/filling.js', import.meta.url));
  const words = ['--bounding-set', '-sys_nice', process.execPath, fixture, folder(t), '{"collapse":true}'];
  const { error, stdout, stderr } = spawnSync('setpriv', words, { encoding: 'utf8', timeout: 20_000 });
  if (error) {
    t.log(`a right cannot be given up here (${error.message})`);
    return;
  }
  const told = JSON.parse(stdout || `"${stderr}"`) as Record<string, string>;
  t.is(told['code'], 'ERR_UFFD_NOT_PERMITTED', stderr);
  t.regex(told['message'] ?? '', /process_madvise.*CAP_SYS_NICE/);
  t.is(told['hex'], '07', 'it is served');
});

test('collapse is true or false', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  await using pager = Pager.create();
  const source = bufferSource(Buffer.alloc(PAGE));

  await t.throwsAsync(pager.serve(mapping, { source, collapse: 1 as never }), {
    code: 'ERR_INVALID_ARG_TYPE',
  });
});
