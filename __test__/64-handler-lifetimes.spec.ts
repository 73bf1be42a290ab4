// How handlers begin and end, what they keep alive, and what they keep.

import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import process from 'node:process';
import { setTimeout } from 'node:timers/promises';
import { promisify } from 'node:util';
import { Worker } from 'node:worker_threads';

import test from 'ava';
import { type FaultHandler, type HandlerEnd, MiB } from 'userfaultfd';

import { FORK, Faulter, REMOVE } from './helpers/faulter.js';
import { inEveryWay, PAGE, pageOf, registered } from './helpers/faults.js';
import { canRun, resources } from './helpers/serving.js';

const FIXTURE = join(import.meta.dirname, 'fixtures', 'lifetimes.js');
const execute = promisify(execFile);

inEveryWay('closing waits for answers that are on their way, and then poisons what is missing', async t => {
  const made = registered(t, 4, ['missing'], { require: ['poison'] });
  if (!made) return;
  const { uffd, mapping } = made;
  const before = resources().threads;
  const order: string[] = [];
  let release = (): void => undefined;
  const handler = uffd.createHandler({
    fault: async fault =>
      new Promise<void>(resolve => {
        release = () => {
          fault.copy(pageOf(7));
          resolve();
        };
      }),
    closed: () => order.push('closed'),
  });
  const reading = mapping.read(0, 1).then(bytes => {
    order.push('read');
    return bytes[0];
  });
  while (uffd.waitingThreads() === 0) await setTimeout(1);

  const closing = Promise.all([handler.close(), handler.close({ rest: 'zero' })]);
  await setTimeout(10);
  t.false(handler.isClosed);
  release();

  t.is(await reading, 7);
  const [end, again] = await closing;
  t.is(end, again);
  t.is(await handler.closed, end);
  t.like(end, { reason: 'closed' });
  t.false('error' in end);
  t.deepEqual(order.toSorted(), ['closed', 'read']);
  t.true(uffd.closed);
  t.deepEqual(mapping.residency(), ['present', 'noted', 'noted', 'noted']);
  t.deepEqual(
    resources().threads.filter(name => name !== 'uffd-job'),
    before.filter(name => name !== 'uffd-job'),
  );
});

inEveryWay('zeros are given at the end only where they are asked for', async t => {
  const made = registered(t, 2);
  if (!made) return;
  const handler = made.uffd.createHandler({ fault: fault => fault.copy(pageOf(1)) });

  await handler.close({ rest: 'zero' });

  t.deepEqual(made.mapping.residency(), ['absent', 'absent']);
  t.is((await made.mapping.read(PAGE, 1))[0], 0);
});

test('a signal closes it, with its reason', async t => {
  const made = registered(t, 1);
  if (!made) return;
  const controller = new AbortController();
  const ends: HandlerEnd[] = [];
  const handler = made.uffd.createHandler(
    { fault: fault => fault.copy(pageOf(1)), closed: end => ends.push(end) },
    { signal: controller.signal },
  );

  const reason = new Error('enough');
  controller.abort(reason);

  t.like(await handler.closed, { reason: 'aborted', error: reason });
  t.is(ends.length, 1);
});

test('disposing ends it at once, or when it is drained', async t => {
  const [first, second] = [registered(t, 1), registered(t, 1)];
  if (!first || !second) return;
  const create = ({ uffd }: typeof first): FaultHandler =>
    uffd.createHandler({ fault: fault => fault.copy(pageOf(3)) });
  {
    const handler = create(first);
    handler[Symbol.dispose]();
    t.true(handler.isClosed);
    handler[Symbol.dispose]();
  }
  const handler = create(second);
  const reading = second.mapping.read(0, 1);
  while (second.uffd.waitingThreads() === 0 && second.mapping.residency()[0] !== 'present')
    await setTimeout(1);
  await handler[Symbol.asyncDispose]();
  t.is((await reading)[0], 3);
});

test('a process that ends ends its handler', async t => {
  const faulter = await Faulter.start(t, REMOVE);
  if (!faulter) return;
  const ends: HandlerEnd[] = [];
  const handler = faulter.handle(t, { fault: fault => fault.zero(), closed: end => ends.push(end) });
  const start = await faulter.map(1);
  await faulter.load(start);

  process.kill(faulter.pid, 'SIGKILL');

  t.like(await handler.closed, { reason: 'peer-exited' });
  t.is(ends.length, 1);
});

test('a forked child is handled in one line, apart from its parent', async t => {
  const faulter = await Faulter.start(t, FORK);
  if (!faulter) return;
  const start = await faulter.map(2);
  const ends: string[] = [];
  faulter.handle(t, {
    fault: fault => fault.copy(pageOf(1)),
    forked: child =>
      child.createHandler({
        fault: fault => fault.copy(pageOf(2)),
        forked: grandchild => grandchild.close(),
        closed: end => ends.push(end.reason),
      }),
  });
  await faulter.load(start);

  t.is(Number((await faulter.ask('fork', start + PAGE))[0]), 2);

  t.is((await faulter.load(start + PAGE)).byte, 1);
  while (ends.length === 0) await setTimeout(5);
  t.deepEqual(ends, ['peer-exited']);
});

inEveryWay('a worker that was handed the userfaultfd handles faults of this thread’s memory', async t => {
  const made = registered(t, 2);
  if (!made) return;
  const fd = made.uffd.releaseFd();
  const worker = new Worker(join(import.meta.dirname, 'fixtures', 'handling.js'), { workerData: { fd } });
  t.teardown(async () => worker.terminate());
  const failed = once(worker, 'error').then(([error]) => {
    throw error;
  });

  // Touched by this very thread, which the worker does not need.
  t.is(await Promise.race([made.mapping.read(0, 1).then(bytes => bytes[0]), failed]), 6);
  const byte = new Uint8Array(1);
  made.mapping.readSync(PAGE, byte);
  t.is(byte[0], 6);
});

test('it keeps the program alive, unless it is told not to', async t => {
  if (!canRun(t)) return;
  const { stdout } = await execute(process.execPath, [FIXTURE, 'unref'], { timeout: 20_000 });
  t.is(stdout, 'read 1\n');

  const child = execFile(process.execPath, [FIXTURE, 'ref']);
  t.teardown(() => child.kill('SIGKILL'));
  await once(child.stdout as NodeJS.ReadableStream, 'data');
  const ended = once(child, 'exit').then(() => 'ended');
  t.is(await Promise.race([ended, setTimeout(200, 'alive')]), 'alive');
});

test('a million faults leave nothing, and one that is answered at once allocates 200 bytes at most', async t => {
  if (!canRun(t)) return;
  const args = ['--expose-gc', '--max-semi-space-size=128', FIXTURE, 'memory', '123'];
  const { stdout } = await execute(process.execPath, args, { timeout: 110_000 });
  t.log(stdout.trim());
  const { faults, perFault, heap, external, native } = JSON.parse(stdout) as {
    [name: string]: number;
  };

  t.true((faults ?? 0) >= 1_000_000);
  t.true((perFault ?? Infinity) > 0 && (perFault ?? Infinity) <= 200);
  t.true((heap ?? Infinity) < MiB && (external ?? Infinity) < MiB);
  t.true((native ?? Infinity) < 16 * MiB);
});
