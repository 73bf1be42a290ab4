/**
 * What statistics cost at the highest rate of faults: a pager built with them against one built without (`--cfg
 * userfaultfd_without_statistics`), which answers page after page from memory. In processes of their own, interleaved.
 *
 *     node out/benchmark/statistics.js [rounds]
 */

import { execFileSync } from 'node:child_process';
import { cpus, release } from 'node:os';
import { fileURLToPath } from 'node:url';

import { allowedCpus } from '../examples/support/machine.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const GOAL = 1.03;

/** The program, built one way. */
function build(statistics: boolean): string {
  const folder = fileURLToPath(
    new URL(`../../.cache/storm-${statistics ? 'with' : 'without'}`, import.meta.url),
  );
  const flags = statistics ? '' : '--cfg userfaultfd_without_statistics';
  const lines = execFileSync(
    'cargo',
    [
      'bench',
      '-p',
      'pager',
      '--bench',
      'storm',
      '--no-run',
      '--target-dir',
      folder,
      '--message-format',
      'json',
    ],
    { cwd: ROOT, encoding: 'utf8', env: { ...process.env, RUSTFLAGS: flags }, maxBuffer: 1 << 28 },
  );
  const executables = lines
    .split('\n')
    .filter(line => line.startsWith('{'))
    .map(line => JSON.parse(line) as { target?: { name: string }; executable?: string | null })
    .flatMap(({ target, executable }) => (target?.name === 'storm' && executable ? [executable] : []));
  const [executable] = executables;
  if (executable === undefined) throw new Error('cargo has built no executable');
  return executable;
}

const median = (values: number[]): number =>
  values.toSorted((a, b) => a - b)[values.length >> 1] ?? Number.NaN;

const rounds = Number(process.argv[2] ?? 7);
const [first = 0, second] = allowedCpus();
const storm = (program: string, where: string, threads: number): number =>
  Number(execFileSync('taskset', ['-c', where, program, `${threads}`, '5'], { encoding: 'utf8' }));
const [counting, plain] = [build(true), build(false)];
const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { cwd: ROOT, encoding: 'utf8' }).trim();
console.log(
  `${cpus()[0]?.model ?? 'unknown CPU'}, ${cpus().length} CPUs, Linux ${release()}, Node ${process.version}, commit ${commit}`,
);
const cases = [
  { name: 'one CPU, 1 thread', where: `${first}`, threads: 1 },
  { name: 'one CPU, 4 threads', where: `${first}`, threads: 4 },
  ...(second === undefined ? [] : [{ name: 'two CPUs, 8 threads', where: `${first},${second}`, threads: 8 }]),
];
let reached = true;
for (const { name, where, threads } of cases) {
  const figures: { counted: number; bare: number }[] = [];
  for (let round = 0; round < rounds; round += 1) {
    figures.push({ counted: storm(counting, where, threads), bare: storm(plain, where, threads) });
  }
  const ratios = figures.map(({ counted, bare }) => counted / bare);
  const ratio = median(ratios);
  reached &&= ratio <= GOAL;
  console.log(
    `${name}: ${median(figures.map(({ counted }) => counted))} ns a fault with statistics, ` +
      `${median(figures.map(({ bare }) => bare))} without = ${ratio.toFixed(3)}x ` +
      `(${Math.min(...ratios).toFixed(3)} to ${Math.max(...ratios).toFixed(3)}; goal at most ${GOAL}x)`,
  );
}
process.exitCode = reached ? 0 : 1;
