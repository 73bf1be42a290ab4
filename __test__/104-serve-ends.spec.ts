// `userfaultfd serve` when it is to end, and when nobody reads what it says: neither harms those whom it serves.

import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  constants,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { constants as osConstants } from 'node:os';
import { join } from 'node:path';
import { Writable } from 'node:stream';

import test, { type ExecutionContext } from 'ava';
import { GiB, type RejectedConnection } from 'userfaultfd';

import type { Peer } from '../examples/support/peer.js';
import { daemon, isAlive, startPeer, until } from './helpers/daemon.js';
import { type Line, MAIN, type Outputs, Serve } from './helpers/serve.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE } from './helpers/serving.js';

/** Whoever hangs is found out by it. */
const DEADLINE = 30_000;

/** So much that it takes a fifth of a second to poison it: what comes meanwhile does not come too late. */
const LARGE = 4 * GiB;

interface Served {
  serve: Serve;
  peer: Peer;
  bytes: Buffer;
  /** What it said when it listened. */
  listening: Line;
}

async function served(t: ExecutionContext, args: readonly string[] = [], outputs?: Outputs): Promise<Served> {
  t.timeout(DEADLINE);
  const { path, bytes } = image(t);
  const socket = join(folder(t), 'vm.sock');
  const serve = new Serve(t, ['--socket', socket, '--memory', path, ...args], outputs);
  const listening = await serve.next('listening');
  const peer = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();
  await serve.next('session');
  return { serve, peer, bytes, listening };
}

/** The same with memory that is large, and a file without bytes. */
async function servedLarge(t: ExecutionContext, ...args: string[]): Promise<Omit<Served, 'bytes'>> {
  t.timeout(DEADLINE);
  const place = folder(t);
  const memory = join(place, 'image');
  writeFileSync(memory, 'image');
  truncateSync(memory, LARGE);
  const socket = join(place, 'vm.sock');
  const serve = new Serve(t, ['--socket', socket, '--memory', memory, ...args], { stderr: 'pipe' });
  const listening = await serve.next('listening');
  const peer = startPeer(t, ['--socket', socket, '--region', `${LARGE}`]);
  await peer.ready();
  await serve.next('session');
  await peer.ask('read', 0, 8);
  return { serve, peer, listening };
}

for (const [how, args] of [
  ['serve', []],
  ['serve --pager spawn', ['--pager', 'spawn']],
] as const) {
  test(`${how}: further signals do not cut short what is done for a process of 4 GiB`, async t => {
    if (!canRun(t)) return;
    const { serve, peer, listening } = await servedLarge(t, ...args);

    serve.child.kill('SIGTERM');
    serve.child.kill('SIGHUP');
    await serve.next('ending');
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR2'] as const) serve.child.kill(signal);

    t.like(await serve.next('end'), { reason: 'closed' });
    await serve.next('closed');
    t.deepEqual(await serve.ended, [0, null]);
    t.is((await peer.ask('probe', LARGE - PAGE)).result, 'efault', 'no hang, and no zeros');
    t.regex(serve.complaints, /^SIG\w+: it is ending already.*\n$/, 'it is told once');
    if (args.length > 0) t.false(isAlive(Number(listening['daemon'])));
  });
}

test('serve --on-failure kill: two signals at once kill the process that is served', async t => {
  if (!canRun(t)) return;
  const { serve, peer } = await servedLarge(t, '--on-failure', 'kill');

  serve.child.kill('SIGTERM');
  serve.child.kill('SIGINT');

  t.is((await peer.ended).signal, 'SIGKILL');
  t.deepEqual(await serve.ended, [0, null]);
});

/** Whether a process has something to do when a signal comes. */
function catches(pid: number, signal: number): boolean {
  const mask = /^SigCgt:\s+(\w+)$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
  return ((BigInt(`0x${mask}`) >> BigInt(signal - 1)) & 1n) === 1n;
}

test('serve --pager PATH: who waits for a daemon that hangs can be ended', async t => {
  if (!canRun(t)) return;
  t.timeout(DEADLINE);
  const { socketPath, daemonPid } = await daemon(t);
  process.kill(daemonPid, 'SIGSTOP');
  t.teardown(() => process.kill(daemonPid, 'SIGCONT'));
  const args = ['--socket', join(folder(t), 'vm.sock'), '--memory', image(t).path, '--pager', socketPath];
  const serve = new Serve(t, args, { stderr: 'pipe' });
  const { SIGUSR2 } = osConstants.signals;
  // The last one that it comes to listen for.
  await until(() => catches(serve.child.pid ?? 0, SIGUSR2), 'it listens for signals');

  serve.child.kill('SIGTERM');

  t.deepEqual(await serve.ended, [1, null]);
  t.regex(serve.complaints, /^SIGTERM: the daemon at .* has not answered\n$/);
});

test('serve: SIGUSR2 does nothing while nobody is held', async t => {
  if (!canRun(t)) return;
  const { serve, peer, bytes } = await served(t);

  serve.child.kill('SIGUSR2');

  t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
  serve.child.kill('SIGTERM');
  t.deepEqual(await serve.ended, [0, null]);
});

test('serve --on-failure hold: what is told of its end is what happens', async t => {
  if (!canRun(t)) return;
  const { serve, peer } = await served(t, ['--on-failure', 'hold']);

  serve.child.kill('SIGTERM');

  t.like(await serve.next('ending'), { onFailure: 'poison' });
  await serve.ended;
  t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault');
});

for (const both of [false, true]) {
  test(`serve: goes on when whoever has read ${both ? 'all it says' : 'its lines'} is gone`, async t => {
    if (!canRun(t)) return;
    const { serve, peer, bytes } = await served(t, [], { stderr: 'pipe' });

    serve.child.stdout?.destroy();
    if (both) serve.child.stderr?.destroy();
    // Each makes a line, and so does a second.
    for (let n = 0; n < 3; n += 1) {
      const other = startPeer(t, ['--socket', socketOf(serve), '--region', `${IMAGE_SIZE}`]);
      await other.ready();
      await other.ask('read', 0, 8);
      await other.exit();
    }
    if (!both) await until(() => serve.complaints.includes('EPIPE'), 'it has found out');

    t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));
    serve.child.kill('SIGTERM');
    t.deepEqual(await serve.ended, [0, null]);
    t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault');
    if (!both) t.regex(serve.complaints, /^What this says is lost \(.*EPIPE\); it goes on.\n$/, 'told once');
  });
}

function socketOf({ lines }: Serve): string {
  return lines.find(({ event }) => event === 'listening')?.['socket'] as string;
}

/** A pipe, with which this process can do what it wants. */
function pipe(t: ExecutionContext): number {
  const path = join(folder(t), 'pipe');
  spawnSync('mkfifo', [path]);
  const fd = openSync(path, constants.O_RDWR | constants.O_NONBLOCK);
  t.teardown(() => closeSync(fd));
  return fd;
}

/** Until it would have to wait. */
function asLongAs(act: () => void): void {
  try {
    for (;;) act();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
  }
}

test('serve: its end does not wait for whoever has stopped to read', async t => {
  if (!canRun(t)) return;
  t.timeout(DEADLINE);
  const { path, bytes } = image(t);
  const socket = join(folder(t), 'vm.sock');
  const stdout = pipe(t);
  const serve = new Serve(t, ['--socket', socket, '--memory', path], { stdout });
  const said = Buffer.alloc(4096);
  let length = 0;
  const listens = (): boolean => {
    asLongAs(() => (length += readSync(stdout, said, length, said.length - length, null)));
    return said.includes('listening');
  };
  await until(listens, 'it listens');
  // Nothing fits into it any more, not even one byte.
  for (const size of [4096, 1]) asLongAs(() => writeSync(stdout, said, 0, size));
  const peer = startPeer(t, ['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();
  t.is((await peer.ask('read', PAGE, 8)).hex, bytes.subarray(PAGE, PAGE + 8).toString('hex'));

  serve.child.kill('SIGTERM');

  t.deepEqual(await serve.ended, [0, null]);
  t.is((await peer.ask('probe', IMAGE_SIZE - PAGE)).result, 'efault');
});

interface Lines {
  progress(sessions: readonly never[]): void;
  rejected(rejection: Pick<RejectedConnection, 'error'>): void;
  left(signal: string, sessions: number): void;
}

/** The log of `serve`, into something that takes one line and then none, until it goes on. */
async function logged(): Promise<{ log: Lines; said: string[]; goOn: () => void; waiting: () => number }> {
  const url = new URL('../../dist/src/cli/serve-log.js', import.meta.url).href;
  const { JsonLog } = (await import(url)) as { JsonLog: new (out: Writable) => Lines };
  const said: string[] = [];
  let goOn: (() => void) | undefined;
  let stopped = true;
  const out = new Writable({
    decodeStrings: false,
    write: (line: string, _encoding, taken) => {
      said.push(line);
      if (stopped) goOn = taken;
      else taken();
    },
  });
  const proceed = (): void => {
    stopped = false;
    goOn?.();
  };
  return { log: new JsonLog(out), said, goOn: proceed, waiting: () => out.writableLength };
}

test('serve: progress that nobody takes is dropped, the rest up to a limit, and how much is told', async t => {
  const { log, said, goOn, waiting } = await logged();
  const error = { code: 'ERR_UFFD_PROTOCOL', message: 'x'.repeat(1000) } as RejectedConnection['error'];

  log.progress([]);
  for (let n = 0; n < 3; n += 1) log.progress([]);
  const before = waiting();
  for (let n = 0; n < 5000; n += 1) log.rejected({ error });
  const most = waiting();
  goOn();
  await until(() => waiting() === 0, 'all is taken');
  log.left('SIGTERM', 0);

  t.true(before < 300, 'one line of progress');
  t.true(most > 1_000_000 && most < 1_100_000, `${most} bytes`);
  const lines = said.map(line => JSON.parse(line) as { event: string; lines?: number });
  const events = lines.map(({ event }) => event);
  t.deepEqual([events[0], ...events.slice(-2)], ['progress', 'dropped', 'left']);
  const rejected = events.filter(event => event === 'rejected').length;
  t.is(lines.at(-2)?.lines, 3 + 5000 - rejected);
});

test('commands whose reader goes away end without a word, and say why where a disk is full', async t => {
  if (!canRun(t)) return;
  t.timeout(2 * DEADLINE);
  for (const args of [['doctor'], ['bench', '--quick'], ['--help']]) {
    const child = spawn(process.execPath, [MAIN, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
    t.teardown(() => child.kill('SIGKILL'));
    let complaints = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => (complaints += text));
    child.stdout.destroy();
    t.deepEqual(await once(child, 'close'), [0, null], args.join(' '));
    t.is(complaints, '', args.join(' '));
  }

  const full = openSync('/dev/full', 'w');
  const { status, stderr } = spawnSync(process.execPath, [MAIN, 'doctor'], {
    stdio: ['ignore', full, 'pipe'],
    encoding: 'utf8',
  });
  closeSync(full);
  t.is(status, 1);
  t.regex(stderr, /^ENOSPC: .*\nThe disk is full.*\n$/);
});

test('serve: what an option cannot be is told with its name and the value, and status 2', t => {
  const needed = ['--socket', join(folder(t), 'vm.sock'), '--memory', join(folder(t), 'none')];
  for (const [args, told] of [
    [['--uid', ''], /'--uid <uid>' argument '' is invalid/],
    [['--uid', 'abc'], /'--uid <uid>' argument 'abc' is invalid. Expected an integer from 0 to 4294967294/],
    [['--uid', '-1'], /'--uid <uid>' argument '-1'/],
    [['--uid', '4294967295'], /'--uid <uid>' argument '4294967295'/],
    [['--hold-timeout', '1e3', '--on-failure', 'hold'], /'--hold-timeout <ms>' argument '1e3'/],
    [['--hold-timeout', '0x10', '--on-failure', 'hold'], /'--hold-timeout <ms>' argument '0x10'/],
    [['--hold-timeout', '0', '--on-failure', 'hold'], /'--hold-timeout <ms>' argument '0'.* from 1 to /],
    [['--hold-timeout', '1000'], /'--hold-timeout <ms>' does nothing without '--on-failure hold'/],
    [['--hold-timeout', '1000', '--on-failure', 'kill'], /does nothing without/],
    [['--pager', ''], /'--pager <path>' argument '' is invalid. Expected a path/],
  ] as const) {
    const command = [MAIN, 'serve', ...needed, ...args];
    const { status, stderr } = spawnSync(process.execPath, command, { encoding: 'utf8' });
    t.is(status, 2, args.join(' '));
    t.regex(stderr, told);
    t.regex(stderr, /^error: option .*\n\nUsage: /);
  }
});

for (const pager of [[], ['--pager', 'spawn']]) {
  const how = ['serve', ...pager, '--record'].join(' ');

  test(`${how}: where no file can be is said before it listens, and what to do`, t => {
    const { path } = image(t);
    const place = folder(t);
    for (const [record, told] of [
      [place, /^ERR_UFFD_TRACE: .*EISDIR.*\nA folder has that name: name a file in it.\n$/],
      [join(place, 'none', 'x.trace'), /^ERR_UFFD_TRACE: .*ENOENT.*\nLook at the path: .*\n$/],
      ['/dev/null', /^ERR_UFFD_TRACE: \/dev\/null .*something that is no file has that name\n$/],
    ] as const) {
      const args = ['serve', '--socket', join(place, 'vm.sock'), '--memory', path, '--record', record];
      const child = spawnSync(process.execPath, [MAIN, ...args, ...pager], {
        encoding: 'utf8',
        timeout: DEADLINE,
      });
      t.is(child.status, 1, record);
      t.is(child.stdout, '');
      t.regex(child.stderr, told);
    }
  });

  test(`${how}: one that could not be written is told, and the status is not 0`, async t => {
    if (!canRun(t)) return;
    const path = join(folder(t), 'run.trace');
    const { serve, peer } = await served(t, ['--record', path, ...pager], { stderr: 'pipe' });
    mkdirSync(path);
    await peer.ask('read', 0, 8);
    await peer.exit();

    const { recording } = await serve.next('end');
    serve.child.kill('SIGTERM');

    t.like(recording, { path, state: 'failed', error: { code: 'ERR_UFFD_TRACE' } });
    t.regex((recording as { error: { message: string } }).error.message, /EISDIR/);
    t.deepEqual(await serve.ended, [1, null]);
    t.regex(serve.complaints, /recordings that could not be written: 1\n$/);
  });
}

test('serve --pager PATH --record: a recording that could not be written is in the status of who leaves, too', async t => {
  if (!canRun(t)) return;
  const { socketPath } = await daemon(t);
  const path = join(folder(t), 'run.trace');
  const args = ['--record', path, '--pager', socketPath];
  const { serve, peer } = await served(t, args, { stderr: 'pipe' });
  mkdirSync(path);
  await peer.exit();
  await serve.next('end');

  serve.child.kill('SIGTERM');

  await serve.next('left');
  t.deepEqual(await serve.ended, [1, null]);
});

test('what a command cannot open is told with its code once, and what to do', async t => {
  if (!canRun(t)) return;
  const place = folder(t);
  const one = join(place, 'one.trace');
  const { serve, peer } = await served(t, ['--record', one]);
  await peer.exit();
  await serve.next('end');
  const nowhere = join(place, 'none', 'x');
  for (const [args, told] of [
    [
      ['trace', 'show', nowhere],
      /^ERR_UFFD_TRACE: .*ENOENT.*\nA recording has its name when .* Is the path right/,
    ],
    [['trace', 'show', place], /^ERR_UFFD_TRACE: .*EISDIR.*\nA folder has that name/],
    [
      ['report', one, '-o', `${nowhere}.html`],
      /^ERR_UFFD_SYSTEM: .*none.x.html could not be written: ENOENT.*\nThere is no folder .*none/,
    ],
    [['serve', '--socket', join(place, 's'), '--memory', nowhere], /^ERR_UFFD_SOURCE: .*\nLook at the path/],
    [['serve', '--socket', nowhere, '--memory', MAIN], /^ERR_UFFD_SOCKET: .*\nLook at the path/],
  ] as const) {
    const { status, stderr } = spawnSync(process.execPath, [MAIN, ...args], { encoding: 'utf8' });
    t.is(status, 1);
    t.regex(stderr, told);
  }
});
