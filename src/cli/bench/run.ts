/** Rounds of measurements: each in a fresh process, one after the other, in another order each time. */

import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import type { Placement, Row } from './rows.js';
import type { Figures, Task, WorkName } from './works.js';

/** What a row came to on one placement. */
export interface Result {
  readonly name: string;
  readonly placement: Placement;
  readonly package: Figures;
  readonly floor: Figures;
  /** How many times as long as the floor: of each round, the median; and the least and the greatest. */
  readonly ratio: number;
  readonly spread: readonly [least: number, greatest: number];
  readonly others: Readonly<Record<string, Figures>>;
}

const MEASURE = fileURLToPath(new URL('measure.js', import.meta.url));
/** Milliseconds; a measurement takes less than two seconds. */
const DEADLINE = 60_000;

/** The CPUs this process may run on. */
function allowedCpus(): number[] {
  const list = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? '0';
  return list.split(',').flatMap(part => {
    const [first = 0, last = first] = part.split('-').map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  });
}

const [first = 0, second] = allowedCpus();

/** The CPUs of a placement; `undefined` where there are too few. */
function cpusOf(placement: Placement): Pick<Task, 'toucher' | 'answerer'> | undefined {
  if (placement === 'one CPU') return { toucher: second ?? first, answerer: second ?? first };
  return second === undefined ? undefined : { toucher: first, answerer: second };
}

async function measured(task: Task): Promise<Figures> {
  try {
    const { stdout } = await promisify(execFile)(process.execPath, [MEASURE, JSON.stringify(task)], {
      timeout: DEADLINE,
      killSignal: 'SIGKILL',
    });
    return JSON.parse(stdout) as Figures;
  } catch (error) {
    const { stderr, signal } = error as { stderr?: string; signal?: string };
    throw new Error(`'${task.work}' could not be measured: ${stderr?.trim() || signal || String(error)}`, {
      cause: error,
    });
  }
}

/** A file of random bytes that is gone when `use` is over. */
export async function withImage<T>(bytes: number, use: (path: string) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-bench-'));
  const clean = (): void => rmSync(folder, { recursive: true, force: true });
  const interrupted = (signal: NodeJS.Signals): void => {
    clean();
    process.kill(process.pid, signal); // nobody listens any more: it ends
  };
  // Also where something throws that nobody catches: a pipe whose reader is gone.
  process.once('exit', clean);
  process.once('SIGINT', interrupted).once('SIGTERM', interrupted);
  try {
    const path = join(folder, 'image');
    writeFileSync(path, randomBytes(bytes));
    return await use(path);
  } finally {
    clean();
    process.off('exit', clean).off('SIGINT', interrupted).off('SIGTERM', interrupted);
  }
}

/** Measures a row on one placement; `undefined` where the machine has too few CPUs. */
export async function runRow(
  row: Row,
  placement: Placement,
  { image, rounds }: { image: string; rounds: number },
): Promise<Result | undefined> {
  const cpus = cpusOf(placement);
  if (cpus === undefined) return undefined;
  const others = Object.entries(row.others).filter(
    ([, other]) => other.placement === undefined || other.placement === placement,
  );
  const works = [row.work, row.floor, ...others.map(([, { work }]) => work)];
  const all = new Map<WorkName, Figures[]>(works.map(work => [work, []]));
  for (let round = 0; round < rounds; round += 1) {
    for (const index of works.keys()) {
      const work = works[(index + round) % works.length] ?? row.work;
      all.get(work)?.push(await measured({ work, image, seed: row.seed, ...cpus }));
    }
  }
  const sums = new Set([...all.values()].flat().map(({ sum }) => sum));
  if (sums.size > 1) throw new Error(`${row.name}: not all of them have read the same bytes`);
  const of = (work: WorkName): Figures[] => all.get(work) ?? [];
  const theirs = of(row.floor);
  const ratios = of(row.work).map(
    (figures, round) => figures[row.figure] / (theirs[round]?.[row.figure] ?? 0),
  );
  return {
    name: row.name,
    placement,
    package: middle(of(row.work)),
    floor: middle(theirs),
    ratio: median(ratios),
    spread: [Math.min(...ratios), Math.max(...ratios)],
    others: Object.fromEntries(others.map(([name, { work }]) => [name, middle(of(work))])),
  };
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1] ?? Number.NaN;
}

/** Of each figure the median. */
function middle(rounds: readonly Figures[]): Figures {
  const of = (name: 'total' | 'each' | 'p50' | 'p99'): number => median(rounds.map(figures => figures[name]));
  return { total: of('total'), each: of('each'), p50: of('p50'), p99: of('p99') };
}
