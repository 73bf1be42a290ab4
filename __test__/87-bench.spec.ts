// `userfaultfd bench`: what it says is measured, and of all of it.

import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';

import { allowedCpus } from '../examples/support/machine.js';
import { afterSetup, CONFINED, NO_DEVICE } from './helpers/confining.js';
import { canRun, folder } from './helpers/serving.js';

const MAIN = fileURLToPath(new URL('../../dist/src/cli/main.js', import.meta.url));

interface Figures {
  total: number;
  each: number;
  p50: number;
  p99: number;
}

interface Bench {
  machine: Record<string, unknown>;
  bytes: number;
  rounds: number;
  rows: {
    name: string;
    placement: string;
    package: Figures;
    floor: Figures;
    ratio: number;
    spread: [number, number];
    others: Record<string, Figures>;
  }[];
}

function bench(
  t: ExecutionContext,
  ...args: string[]
): { status: number | null; stdout: string; stderr: string } {
  const TMPDIR = folder(t);
  const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, 'bench', ...args], {
    encoding: 'utf8',
    timeout: 100_000,
    env: { ...process.env, NO_COLOR: '1', TMPDIR },
  });
  t.deepEqual(readdirSync(TMPDIR), [], 'nothing is left behind');
  return { status, stdout, stderr };
}

test('bench --json: the package and its floor, for each row and placement, with figures that belong together', t => {
  if (!canRun(t)) return;

  const { status, stdout, stderr } = bench(t, '--quick', '--json');

  t.is(status, 0, stderr);
  const { machine, bytes, rounds, rows } = JSON.parse(stdout) as Bench;
  t.deepEqual(Object.keys(machine), ['cpu', 'cpus', 'kernel', 'node', 'version']);
  t.is(rounds, 1);
  const two = allowedCpus().length > 1;
  const expected = ['page', 'image', 'handler'].flatMap(name =>
    [`${name}, one CPU`, `${name}, two CPUs`].slice(0, two ? 2 : 1),
  );
  t.deepEqual(
    rows.map(({ name, placement }) => `${name}, ${placement}`),
    [...expected, 'call, one CPU'],
  );
  for (const row of rows) {
    const { name, ratio, spread, package: ours, floor, others } = row;
    for (const { total, each, p50, p99 } of [ours, floor, ...Object.values(others)]) {
      t.true(p50 > 0 && p99 >= p50, `${name}: ${stdout}`);
      // Microseconds a page and milliseconds of all say the same.
      t.true(Math.abs((each * (bytes / 4096)) / 1e3 - total) < total / 1e6, name);
    }
    const compared = name === 'image' ? ours.total / floor.total : ours.each / floor.each;
    t.true(Math.abs(ratio - compared) < 1e-9, name);
    t.deepEqual(spread, [ratio, ratio], 'of one round');
  }
  t.deepEqual(Object.keys(rows.find(({ name }) => name === 'image')?.others ?? {}), [
    'native loop, a page a fault',
    'mmap of the file',
  ]);
});

test('bench: for people, it names the machine, and each row has its floor beside it', t => {
  if (!canRun(t)) return;

  const { status, stdout, stderr } = bench(t, '--quick');

  t.is(status, 0, stderr);
  t.regex(stdout, /^.+, \d+ CPUs, Linux \S+, Node v\S+, userfaultfd \d+\.\d+\.\d+$/m);
  t.regex(stdout, /^ {2}one CPU: [\d.]+x of the floor's time \([\d.]+ to [\d.]+\)$/m);
  t.regex(stdout, /^ {4}pager: [\d,]+ faults\/s, p50 [\d.]+ us, p99 [\d.]+ us$/m);
  t.regex(stdout, /^ {4}floor, native loop: poll, read, UFFDIO_COPY: [\d,]+ faults\/s/m);
  t.regex(stdout, /^ {4}mmap of the file: [\d.]+ ms$/m);
});

test('bench: where no userfaultfd can be had, the reason is told before anything is measured', t => {
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can take it away from a process');
    t.pass();
    return;
  }
  const [program, ...args] = afterSetup(NO_DEVICE, [
    CONFINED,
    '1',
    process.execPath,
    MAIN,
    'bench',
    '--quick',
  ]);

  const { status, stdout, stderr } = spawnSync(program, args, { encoding: 'utf8' });

  t.is(status, 1, stdout);
  t.regex(stderr, /^ERR_UFFD_NOT_PERMITTED: .+/);
  t.is(stdout, '');
});

test('bench: what is interrupted leaves nothing behind', async t => {
  if (!canRun(t)) return;
  const TMPDIR = folder(t);
  const child = spawn(process.execPath, [MAIN, 'bench'], { env: { ...process.env, TMPDIR } });
  t.teardown(() => child.kill('SIGKILL'));
  const ended = once(child, 'close');
  let said = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (said += text));
  while (!said.includes('Faults')) await once(child.stdout, 'data', { signal: AbortSignal.timeout(30_000) });
  t.is(readdirSync(join(TMPDIR)).length, 1);

  child.kill('SIGINT');

  t.deepEqual(await ended, [null, 'SIGINT']);
  t.deepEqual(readdirSync(TMPDIR), []);
});
