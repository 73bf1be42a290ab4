// Every way to wait for oneself that can be written, each in a process of its own, which ends with the stated outcome.

import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { Worker } from 'node:worker_threads';

import test, { type ExecutionContext } from 'ava';
import { capabilities } from 'userfaultfd';

import { Faulter } from './helpers/faulter.js';
import { holdings, leaked } from './helpers/rounds.js';
import { canRun, folder } from './helpers/serving.js';

const FIXTURES = join(import.meta.dirname, 'fixtures');
/** What a program that deadlocks may take, once it has begun. */
const LIMIT = 2000;
/** What Node itself takes to start, on a machine that is busy with other things. */
const START = 3000;

interface Ended {
  status: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
  killed: boolean;
}

async function run(words: string[], flags: string[] = []): Promise<Ended> {
  const args = [...flags, join(FIXTURES, 'deadlocks.js'), ...words];
  return new Promise(resolve => {
    const child = execFile(
      process.execPath,
      args,
      { timeout: LIMIT + START, killSignal: 'SIGKILL' },
      (error, stdout, stderr) => {
        resolve({
          status: child.exitCode,
          signal: child.signalCode,
          stdout,
          stderr,
          killed: error?.killed === true,
        });
      },
    );
  });
}

/** Ends by abort, with an explanation. */
function aborted(t: ExecutionContext, ended: Ended, where: RegExp): void {
  t.false(ended.killed, `it hung: ${ended.stderr}`);
  t.is(ended.signal, 'SIGABRT', ended.stderr);
  t.regex(ended.stderr, /deadlock: the JavaScript thread \d+ .*offset \d+ of the mapping of 262144 bytes/);
  t.regex(ended.stderr, where);
}

for (const ids of ['thread-id', 'none']) {
  for (const [which, offset, stack] of [
    ['inside', 28_672, /deadlocks\.js/],
    ['in-then', 12_288, /./],
    ['main', 12_288, /deadlocks\.js/],
    ['readSync', 8192, /./],
  ] as const) {
    test(`a fault of the handler's own thread ends the program: ${which} (${ids === 'none' ? 'without ids' : 'by its id'})`, async t => {
      if (!canRun(t)) return;
      const ended = await run([which, ids]);

      aborted(t, ended, new RegExp(`offset ${offset} `));
      t.regex(ended.stderr, stack);
    });
  }
}

test('the explanation has a diagnostic report with the stack, where Node is asked for it', async t => {
  if (!canRun(t)) return;
  const path = folder(t);

  const ended = await run(['main'], ['--report-on-fatalerror', `--report-directory=${path}`]);

  aborted(t, ended, /offset 12288 /);
  const [report = ''] = readdirSync(path);
  const text = readFileSync(join(path, report), 'utf8');
  const { javascriptStack } = JSON.parse(text) as { javascriptStack: { stack?: string[] } };
  t.true(
    javascriptStack.stack?.some(line => line.includes('deadlocks.js')),
    JSON.stringify(javascriptStack),
  );
});

test('where zeros are asked for, the program goes on and is told', async t => {
  if (!canRun(t)) return;
  const ended = await run(['main', 'thread-id', 'zero']);

  t.deepEqual(ended.stdout.trim().split('\n').toSorted(), [
    'ERR_UFFD_WOULD_DEADLOCK',
    'closed: closed',
    'read 0',
  ]);
  t.is(ended.status, 0);
});

test('processes are started while forks are followed', async t => {
  if (!canRun(t)) return;
  if (!capabilities().ptrace) {
    t.log('skipped: event-fork needs CAP_SYS_PTRACE');
    t.pass();
    return;
  }
  const ended = await run(['spawn']);

  t.is(ended.stdout, 'spawned\nread 1\nclosed: closed\n', ended.stderr);
  t.is(ended.status, 0);
});

test('when all of libuv’s threads wait for a handler that waits for one of them, the deadline frees them', async t => {
  if (!canRun(t)) return;
  const ended = await run(['fs']);

  t.is(ended.status, 0, ended.stderr);
  t.regex(ended.stdout, /ERR_UFFD_TIMEOUT/);
  t.regex(ended.stdout, /rejected/);
  t.regex(ended.stdout, /closed: closed/);
});

test('memory that is collected while faults wait neither waits nor is waited for', async t => {
  if (!canRun(t)) return;
  const ended = await run(['finalizer'], ['--expose-gc']);

  t.is(ended.status, 0, ended.stderr);
  t.regex(ended.stdout, /read 1\nclosed: closed/);
});

test('process.exit ends with its status although threads wait', async t => {
  if (!canRun(t)) return;
  const ended = await run(['exit']);

  t.false(ended.killed, ended.stderr);
  t.is(ended.status, 7, ended.stderr);
});

test('process.exit ends with its status although a worker waits, which cannot be joined', async t => {
  if (!canRun(t)) return;
  const ended = await run(['exit-worker']);

  t.false(ended.killed, ended.stderr);
  t.is(ended.status, 7, ended.stderr);
  t.regex(ended.stderr, /ends with status 7 although 1 threads wait/);
});

test('process.exit ends with its status although a worker is asked that answers nobody', async t => {
  if (!canRun(t)) return;
  const ended = await run(['exit-elsewhere']);

  t.false(ended.killed, ended.stderr);
  t.is(ended.status, 7, ended.stderr);
  t.regex(ended.stderr, /ends with status 7 although 1 threads wait/);
});

test('another process that waits when the program exits gets no zeros', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const start = await faulter.map(1);
  const fd = faulter.uffd.releaseFd();
  const child = spawn(process.execPath, [join(FIXTURES, 'deadlocks.js'), 'exit-peer', 'thread-id', '3'], {
    stdio: ['ignore', 'inherit', 'inherit', fd],
  });
  const exited = once(child, 'exit');
  closeSync(fd);

  await t.throwsAsync(faulter.load(start), { message: /SIGBUS/ });
  t.deepEqual(await exited, [7, null]);
});

test('an uncaught exception ends the program as ever', async t => {
  if (!canRun(t)) return;
  const ended = await run(['throw']);

  t.is(ended.status, 1, ended.stderr);
  t.regex(ended.stderr, /nobody catches this/);
});

test('a worker is terminated in the middle, and leaves nothing behind', async t => {
  if (!canRun(t)) return;
  const round = async (): Promise<void> => {
    const worker = new Worker(join(FIXTURES, 'handling.js'));
    await once(worker, 'message');
    const late = new Error('it has not ended');
    const timer = setTimeout(() => t.fail(String(late)), LIMIT);
    await worker.terminate();
    clearTimeout(timer);
  };
  for (let count = 0; count < 5; count += 1) await round();
  const before = holdings();

  for (let count = 0; count < 10; count += 1) await round();

  t.deepEqual(leaked(before, holdings()), []);
});
