// `userfaultfd serve`, as a service manager and as a person at a terminal meet it.

import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { MiB } from 'userfaultfd';

import { Peer } from '../examples/support/peer.js';
import { type Line, MAIN, Serve } from './helpers/serve.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE } from './helpers/serving.js';

async function serving(
  t: ExecutionContext,
  { size = IMAGE_SIZE, args = [] as string[], from = image(t, size) } = {},
): Promise<{ serve: Serve; socket: string; bytes: Buffer; peer: Peer }> {
  const { path: memory, bytes } = from;
  const socket = join(folder(t), 'vm.sock');
  const serve = new Serve(t, ['--socket', socket, '--memory', memory, ...args]);
  await serve.next('listening');
  const peer = new Peer(['--socket', socket, '--region', `${size}`]);
  t.teardown(async () => {
    peer.kill();
    await peer.ended;
  });
  await peer.ready();
  await serve.next('session');
  return { serve, socket, bytes, peer };
}

test('serve: a process gets its memory, and each second has a line about it', async t => {
  if (!canRun(t)) return;
  const { serve, bytes, peer } = await serving(t);

  const { hex } = await peer.ask('read', 5 * PAGE, 32);
  let progress = await serve.next('progress');
  // The first may be of a moment before.
  while (progress['faults'] === 0) progress = await serve.next('progress');

  const { bytesInstalled, sessions, pagesMissing } = progress;
  t.is(hex, bytes.subarray(5 * PAGE, 5 * PAGE + 32).toString('hex'));
  t.is(sessions, 1);
  t.true(Number(bytesInstalled) >= PAGE);
  t.is(pagesMissing, (IMAGE_SIZE - Number(bytesInstalled)) / PAGE);
  await peer.exit();
  t.like(await serve.next('end'), { reason: 'peer-exited' });
});

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  test(`serve: ${signal} poisons what is missing, keeps what is there, removes the socket, and is no failure`, async t => {
    if (!canRun(t)) return;
    const { serve, socket, bytes, peer } = await serving(t);
    await peer.ask('read', 0, 8);

    serve.child.kill(signal);

    t.like(await serve.next('end'), { reason: 'closed' });
    await serve.next('closed');
    t.deepEqual(await serve.ended, [0, null]);
    t.false(existsSync(socket));
    t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault', 'no zeros');
    t.is((await peer.ask('read', 0, 8)).hex, bytes.subarray(0, 8).toString('hex'));
  });
}

test('serve: SIGTERM while the memory is being read never gives zeros', async t => {
  if (!canRun(t)) return;
  const { serve, peer, bytes } = await serving(t, { size: 64 * MiB });
  peer.send('touch', 'order=random');

  serve.child.kill('SIGTERM');
  await serve.ended;

  const touched = await peer.answer<'touch'>().catch(() => undefined);
  if (touched === undefined) {
    t.is((await peer.ended).signal, 'SIGBUS');
  } else {
    // It had all of it in time.
    t.is((await peer.ask('hash')).sha256, createHash('sha256').update(bytes).digest('hex'));
  }
});

test('serve --on-failure kill: SIGTERM kills the process that is served', async t => {
  if (!canRun(t)) return;
  const { serve, peer } = await serving(t, { args: ['--on-failure', 'kill'] });

  serve.child.kill('SIGTERM');

  t.is((await peer.ended).signal, 'SIGKILL');
  t.deepEqual(await serve.ended, [0, null]);
});

test('serve --on-failure hold: a process waits for its image, and SIGUSR2 lets it go on', async t => {
  if (!canRun(t)) return;
  const from = image(t);
  const { serve, peer } = await serving(t, {
    from,
    args: ['--on-failure', 'hold', '--hold-timeout', '60000'],
  });
  truncateSync(from.path, 0);
  peer.send('hash');
  t.like(await serve.next('held'), { reason: 'source-failed', code: 'ERR_UFFD_SOURCE' });

  writeFileSync(from.path, from.bytes);
  serve.child.kill('SIGUSR2');

  await serve.next('resumed');
  const { sha256 } = await peer.answer<'hash'>();
  t.is(sha256, createHash('sha256').update(from.bytes).digest('hex'));
});

test('serve --record writes what a process wanted, and --replay brings it to the next', async t => {
  if (!canRun(t)) return;
  const path = join(folder(t), 'run.trace');
  const from = image(t);
  const first = await serving(t, { from, args: ['--record', path] });
  await first.peer.ask('read', 100 * PAGE, 8);
  first.serve.child.kill('SIGTERM');
  t.like(await first.serve.next('end'), { recording: { path, state: 'written' } });
  await first.serve.ended;

  const second = await serving(t, { from, args: ['--replay', path] });
  await second.serve.next('progress');
  second.serve.child.kill('SIGTERM');

  const { replay } = (await second.serve.next('end')) as Line & {
    replay: { pages: number; installed: number };
  };
  t.true(replay.pages > 0);
  t.is(replay.installed, replay.pages, 'before anything was touched');
});

test('serve: what cannot be served is told with its code, and ends with status 1', t => {
  const { status, stderr, stdout } = spawnSync(
    process.execPath,
    [MAIN, 'serve', '--socket', join(folder(t), 'vm.sock'), '--memory', join(folder(t), 'none')],
    { encoding: 'utf8' },
  );

  t.is(status, 1);
  t.regex(stderr, /^ERR_UFFD_SOURCE: .*none/);
  t.is(stdout, '');
});

test('serve: at a terminal one line is written over as memory arrives', async t => {
  if (!canRun(t)) return;
  const { path: memory } = image(t);
  const socket = join(folder(t), 'vm.sock');
  // script(1) gives it a terminal.
  const command = `exec ${process.execPath} ${MAIN} serve --socket ${socket} --memory ${memory}`;
  const child = spawn('script', ['-qefc', command, '/dev/null'], { stdio: ['pipe', 'pipe', 'inherit'] });
  const ended = once(child, 'close');
  t.teardown(() => child.kill('SIGKILL'));
  let said = '';
  const signal = AbortSignal.timeout(30_000);
  const says = async (wanted: RegExp): Promise<void> => {
    while (!wanted.test(said)) await once(child.stdout, 'data', { signal });
  };
  child.stdout.setEncoding('utf8').on('data', (text: string) => (said += text));
  await says(/listening/);
  const peer = new Peer(['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  t.teardown(() => peer.kill());
  await peer.ready();
  await peer.ask('read', 0, 8);

  const progress = /1 sessions, (0\.\d) MiB, \d+ faults\/s, (\d+) pages missing/;
  await says(progress);
  const [brought = 0, missing = 0] = progress.exec(said)?.slice(1).map(Number) ?? [];
  t.true(Math.abs(brought - (IMAGE_SIZE - missing * PAGE) / MiB) <= 0.05, `${brought} MiB, ${missing} pages`);
  child.stdin.write('\x03'); // Ctrl-C

  await says(/SIGINT.*ending 1 sessions \(poison\)/);
  await ended;
  t.regex(said, /closed/);
  t.notRegex(said, /"event"/);
});
