/**
 * What a call costs: one 4 KiB copy from JavaScript (`tryCopy`, `copy` with options), and 64 MiB by one `copy`, against the
 * same ioctls from C. Each measurement in a process of its own, interleaved.
 *
 *     node out/benchmark/calls.js [rounds]
 */

import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { cpus, release } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { MemoryMapping, MiB, Userfaultfd } from 'userfaultfd';

const SIZE = 64 * MiB;
const PAGE = 4096;
const ROUNDS = 5;
const CASES = ['tryCopy', 'copy', 'bulk'] as const;
type Case = (typeof CASES)[number];

const median = (values: number[]): number =>
  values.toSorted((a, b) => a - b)[values.length >> 1] ?? Number.NaN;

/** Nanoseconds of one call, in this process. */
function measure(which: Case): number {
  const uffd = Userfaultfd.create();
  const mapping = MemoryMapping.anonymous(SIZE, { pages: 'small' });
  uffd.register(mapping.range(), { modes: ['missing'] });
  const page = Buffer.alloc(PAGE, 1);
  const all = Buffer.alloc(SIZE, 1);
  const ranges = Array.from({ length: SIZE / PAGE }, (_, index) => mapping.range(index * PAGE, PAGE));
  const options = { writeProtect: false, wake: true };
  const run = {
    tryCopy: () => {
      for (const range of ranges)
        if (uffd.tryCopy(range, page) !== PAGE) throw new Error('a page was not copied');
    },
    copy: () => {
      for (const range of ranges) uffd.copy(range, page, options);
    },
    bulk: () => uffd.copy(mapping.range(), all),
  }[which];
  const times: number[] = [];
  for (let round = -2; round < ROUNDS; round += 1) {
    const start = process.hrtime.bigint();
    run();
    const time = Number(process.hrtime.bigint() - start);
    if (round >= 0) times.push(which === 'bulk' ? time : time / ranges.length);
    mapping.discardSync();
  }
  uffd.close();
  mapping.close();
  return median(times);
}

function main(rounds: number): void {
  const cache = fileURLToPath(new URL('../../.cache', import.meta.url));
  mkdirSync(cache, { recursive: true });
  const floor = join(cache, 'calls');
  const source = fileURLToPath(new URL('../../benchmark/floor/calls.c', import.meta.url));
  execFileSync('cc', ['-O2', '-o', floor, source]);
  const figures: Record<Case | 'one floor' | 'bulk floor', number[]> = {
    tryCopy: [],
    copy: [],
    bulk: [],
    'one floor': [],
    'bulk floor': [],
  };
  for (let round = 0; round < rounds; round += 1) {
    const [one, bulk] = execFileSync(floor, [`${ROUNDS}`], { encoding: 'utf8' })
      .split(' ')
      .map(Number);
    figures['one floor'].push(one ?? Number.NaN);
    figures['bulk floor'].push(bulk ?? Number.NaN);
    for (const which of CASES) {
      const text = execFileSync(process.execPath, [fileURLToPath(import.meta.url), 'measure', which]);
      figures[which].push(Number(text));
    }
  }
  const goals = { tryCopy: 1.3, copy: 1.6, bulk: 1.05 };
  process.stdout.write(
    `${cpus()[0]?.model ?? '?'}, ${cpus().length} CPUs, Linux ${release()}, Node ${process.version}\n`,
  );
  for (const which of CASES) {
    const base = figures[which === 'bulk' ? 'bulk floor' : 'one floor'];
    const ratios = figures[which].map((value, index) => value / (base[index] ?? Number.NaN));
    const spread = `${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)}`;
    const figure = `${median(figures[which]).toFixed(0)} ns, C ${median(base).toFixed(0)} ns`;
    process.stdout.write(
      `${which.padEnd(8)} ${median(ratios).toFixed(2)}x of C (${spread}; goal ${goals[which]}x): ${figure}\n`,
    );
  }
}

const [command, argument] = process.argv.slice(2);
if (command === 'measure') process.stdout.write(`${measure(argument as Case)}`);
else main(Number(command ?? 5));
