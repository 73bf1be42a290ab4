// `mode: 'huge-fill'`: everything is there before anybody hears of the session, in transparent huge pages.

import { spawnSync } from 'node:child_process';
import { readFileSync, truncateSync } from 'node:fs';
import { once } from 'node:events';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';
import {
  bufferSource,
  callbackSource,
  fileSource,
  MemoryMapping,
  MiB,
  Pager,
  type PageSource,
  restoreFirecracker,
  type Session,
} from 'userfaultfd';

import { type Handed, handedOver } from './helpers/adopting.js';
import { mapped, PAGE } from './helpers/faults.js';
import { blocksIn, HUGE, hugeIn } from './helpers/huge.js';
import { prepared, residentWhenResumed } from './helpers/restoring.js';
import { canRun, folder, image, IMAGE_SIZE, reserveHugePages } from './helpers/serving.js';
import { pagerOf } from './helpers/pagers.js';

const SIZE = 8 * MiB;

const stateOf = (pid: number): string =>
  /^\d+ \(.*\) (\w)/.exec(readFileSync(`/proc/${pid}/stat`, 'utf8'))?.[1] ?? '';

/** Another process, and its memory filled; what warned meanwhile. */
async function filled(
  t: ExecutionContext,
  { peer, uffd, pidfd, regions }: Handed,
  source: PageSource,
  meanwhile: () => Promise<void> = async () => {},
): Promise<{ session: Session; joined: number; blocks: number }> {
  const pager = pagerOf(t);
  const adopt = pager.adopt(uffd, { source, regions, pidfd, mode: 'huge-fill' });
  await meanwhile();
  const session = await adopt;
  const [region] = regions;
  const { address, length } = region ?? { address: 0n, length: 0 };
  t.is(hugeIn(peer.pid, address, length) * 1024, session.stats().pagesJoined * PAGE);
  return { session, joined: session.stats().pagesJoined, blocks: blocksIn(address, length) };
}

test('a mapping is filled with huge pages, but for one that was there before', async t => {
  if (!canRun(t)) return;
  const { bytes } = image(t, SIZE);
  const mapping = mapped(t, MemoryMapping.anonymous(SIZE, { pages: 'transparent' }));
  mapping.writeSync(3 * PAGE, Buffer.from('before'));
  await using pager = Pager.create();

  const session = await pager.serve(mapping, { source: bufferSource(bytes), mode: 'huge-fill' });

  t.is(session.mode, 'huge-fill');
  t.is(session.fallback, undefined);
  const expected = Buffer.from(bytes).fill(0, 0, HUGE);
  expected.write('before', 3 * PAGE);
  t.true(expected.equals(await mapping.read(0, SIZE)));
  const { pagesJoined, pagesInstalled, faults } = session.stats();
  t.deepEqual([pagesJoined, faults], [((SIZE / HUGE - 1) * HUGE) / PAGE, 0]);
  t.is(pagesInstalled, pagesJoined);
  t.is((await session.detach()).reason, 'detached');
});

test('another process is stopped, filled with huge pages, and goes on; it is served as before', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, SIZE);
  const handed = await handedOver(t, `--region ${SIZE}`);
  const { peer } = handed;

  const { session, joined, blocks } = await filled(t, handed, bufferSource(bytes));

  t.is(session.mode, 'huge-fill');
  t.is(joined, (blocks * HUGE) / PAGE);
  t.is((await peer.ask('compare', path)).different, 0);
  t.is(session.stats().faults, 0);
  await peer.ask('discard', 4 * MiB, 16 * PAGE);
  t.is((await peer.ask('zeros')).nonzero, 0);
  t.is(session.stats().pagesRemoved, 16, 'it is registered again');
});

test('a process that was stopped before stays stopped', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, SIZE);
  const handed = await handedOver(t, `--region ${SIZE}`);
  const { peer } = handed;
  peer.kill('SIGSTOP');
  while (stateOf(peer.pid) !== 'T') await setTimeout(1);

  const { session } = await filled(t, handed, bufferSource(bytes));

  t.is(session.mode, 'huge-fill');
  t.is(stateOf(peer.pid), 'T');
  peer.kill('SIGCONT');
  t.is((await peer.ask('compare', path)).different, 0);
});

test('what a worker has to read becomes huge pages as well', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, SIZE);
  const source = callbackSource(async (offset, length) => bytes.subarray(offset, offset + length), {
    size: SIZE,
    chunk: HUGE,
  });
  const handed = await handedOver(t, `--region ${SIZE}`);

  const { joined, blocks } = await filled(t, handed, source);

  t.is(joined, (blocks * HUGE) / PAGE);
  t.is((await handed.peer.ask('compare', path)).different, 0);
});

test('a process that somebody lets go on in between is filled the ordinary way, and has its bytes', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, SIZE);
  let open = (): void => {};
  const opened = new Promise<void>(resolve => {
    open = resolve;
  });
  const fetch = async (offset: number, length: number): Promise<Uint8Array> => {
    await opened;
    return bytes.subarray(offset, offset + length);
  };
  const handed = await handedOver(t, `--region ${SIZE}`);
  const { peer } = handed;

  const { session } = await filled(
    t,
    handed,
    callbackSource(fetch, { size: SIZE, chunk: HUGE }),
    async () => {
      while (stateOf(peer.pid) !== 'T') await setTimeout(1);
      peer.kill('SIGCONT');
      while (stateOf(peer.pid) === 'T') await setTimeout(1);
      open();
    },
  );

  t.is(session.mode, 'fill');
  t.regex(session.fallback?.message ?? '', /was let go on|did not stop/);
  t.is((await peer.ask('compare', path)).different, 0);
});

test('what the image has zeros for takes no huge page', async t => {
  if (!canRun(t)) return;
  const path = `${folder(t)}/sparse`;
  const { bytes } = image(t, HUGE);
  const { writeFileSync } = await import('node:fs');
  writeFileSync(path, bytes);
  truncateSync(path, SIZE);
  const handed = await handedOver(t, `--region ${SIZE}`);

  const { session, blocks, joined } = await filled(t, handed, fileSource(path));

  const { pagesZero } = session.stats();
  t.true(pagesZero >= ((blocks - 2) * HUGE) / PAGE, `${pagesZero}`);
  t.true(joined <= HUGE / PAGE, `${joined}`);
  t.is((await handed.peer.ask('compare', path)).different, 0);
});

test('memory that cannot have huge pages is filled the ordinary way, and says why, also as a warning', async t => {
  if (!canRun(t)) return;
  const { bytes } = image(t, SIZE);
  await using pager = Pager.create();
  const shared = mapped(t, MemoryMapping.memfd(SIZE));
  const tracked = mapped(t, MemoryMapping.anonymous(SIZE));
  const source = bufferSource(bytes);
  const warned = once(process, 'warning') as Promise<[Error & { code?: string }]>;

  const session = await pager.serve(tracked, {
    source,
    mode: 'huge-fill',
    modes: ['missing', 'write-protect'],
  });

  t.is(session.mode, 'fill');
  t.is(session.fallback?.code, 'ERR_UFFD_UNSUPPORTED');
  t.regex(session.fallback?.message ?? '', /whose writes are tracked/);
  const [warning] = await warned;
  t.is(warning.code, 'ERR_UFFD_UNSUPPORTED');
  t.regex(warning.message, /has no huge pages: .*tracked/);
  t.true(bytes.equals(await tracked.read(0, SIZE)));
  const other = await pager.serve(shared, { source, mode: 'huge-fill' });
  t.is(other.mode, 'fill');
  t.regex(other.fallback?.message ?? '', /UFFDIO_MOVE/);
  t.true(bytes.equals(await shared.read(0, SIZE)));
});

test('the right that is missing is named, and the memory filled all the same', t => {
  if (!canRun(t)) return;
  const fixture = fileURLToPath(new URL('fixtures/filling.js', import.meta.url));
  const without = [
    '--bounding-set',
    '-sys_nice',
    process.execPath,
    fixture,
    folder(t),
    '{"mode":"huge-fill"}',
  ];
  const { error, stdout, stderr } = spawnSync('setpriv', without, { encoding: 'utf8', timeout: 20_000 });
  if (error) {
    t.log(`skipped: a right cannot be given up here (${error.message})`);
    t.pass();
    return;
  }
  const told = JSON.parse(stdout || `"${stderr}"`) as Record<string, string>;

  t.is(told['mode'], 'fill', stderr);
  t.is(told['code'], 'ERR_UFFD_NOT_PERMITTED');
  t.regex(told['message'] ?? '', /^process_madvise\(MADV_COLLAPSE\): EPERM.*CAP_SYS_NICE/);
  t.is(told['hex'], '07');
});

test('huge pages of the pool are filled as they are', async t => {
  if (!canRun(t) || !reserveHugePages(t, 3)) return;
  const { bytes } = image(t, 6 * MiB);
  const mapping = mapped(t, MemoryMapping.anonymous(6 * MiB, { pages: HUGE }));
  await using pager = Pager.create();

  const session = await pager.serve(mapping, { source: bufferSource(bytes), mode: 'huge-fill' });

  t.deepEqual([session.mode, session.fallback], ['huge-fill', undefined]);
  t.true(bytes.equals(await mapping.read(0, 6 * MiB)));
});

test('a VM is loaded paused, filled with huge pages, and then resumed', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const resident = residentWhenResumed(firecracker);

  const vm = await restoreFirecracker({ ...options, mode: 'huge-fill' });

  t.is(resident(), IMAGE_SIZE / PAGE);
  t.is(vm.session.mode, 'huge-fill');
  t.true(vm.session.stats().pagesJoined >= (2 * HUGE) / PAGE);
  t.is((await firecracker.peer.ask('compare', options.memory as string)).different, 0);
  t.deepEqual(
    firecracker.requests.map(({ body }) => body.includes('"resume_vm":false') || body.includes('Resumed')),
    [true, true],
  );
  await vm.close();
});
