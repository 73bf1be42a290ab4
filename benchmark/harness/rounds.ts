/** Rounds: every contender once, one after the other, in processes of their own; then the next round, in another order. */

import type { Case, Measured, Placement, Row } from './case.js';
import { cpusOf } from './placement.js';
import { Run } from './run.js';
import { median, spread } from './statistics.js';

/** What a row came to. */
export interface Line {
  case: string;
  unit: string;
  ours: number;
  floor: number;
  ratio: number;
  /** What the ratio is to be; `null`: reported only. */
  goal: number | null;
  ok: boolean | null;
  rivals: Record<string, number>;
  /** The least and the greatest ratio of a round. */
  spread: [number, number];
}

/** The lines of the rows of one case, as they are done: placement by placement. */
export async function* linesOf(
  one: Case,
  rows: readonly Row[],
  options: { quick: boolean; rounds?: number | undefined },
): AsyncGenerator<{ row: Row; line: Line }> {
  const [full, quick] = one.rounds ?? [5, 1];
  const rounds = options.rounds ?? (options.quick ? quick : full);
  for (const placement of new Set(rows.map(row => row.placement))) {
    const here = rows.filter(row => row.placement === placement);
    const measured = await measureAll(one, here, placement, rounds, options.quick);
    if (measured === undefined) continue;
    for (const row of here) yield { row, line: lineOf(row, measured) };
  }
}

/** By contender, what each round came to; `undefined` where the machine has too few CPUs. */
async function measureAll(
  one: Case,
  rows: readonly Row[],
  placement: Placement,
  rounds: number,
  quick: boolean,
): Promise<Map<string, Measured[]> | undefined> {
  const cpus = cpusOf(placement);
  if (cpus === undefined) return undefined;
  const names = [...new Set(rows.flatMap(contendersOf))];
  const measured = new Map<string, Measured[]>(names.map(name => [name, []]));
  for (let round = 0; round < rounds; round += 1) {
    const order = names.map((_, index) => names[(index + round) % names.length] ?? '');
    for (const name of order) {
      const contender = one.contenders[name];
      if (contender === undefined) throw new Error(`${one.name} has no contender ${name}`);
      const got = await contender(new Run(cpus, quick));
      measured.get(name)?.push(got);
    }
  }
  for (const row of rows) compare(row, measured);
  return measured;
}

const contendersOf = ({ ours, floor, rivals = [] }: Row): readonly string[] => [ours, floor, ...rivals];

/** Who has done other work is no rival. */
function compare(row: Row, measured: ReadonlyMap<string, readonly Measured[]>): void {
  const results = contendersOf(row).map(
    name => [name, measured.get(name)?.map(({ result }) => result)] as const,
  );
  const told = new Set(results.flatMap(([, list]) => list ?? []).filter(result => result !== undefined));
  if (told.size > 1)
    throw new Error(`${row.name}: results differ: ${JSON.stringify(Object.fromEntries(results))}`);
}

function lineOf(row: Row, measured: ReadonlyMap<string, readonly Measured[]>): Line {
  const figures = (name: string): number[] =>
    (measured.get(name) ?? []).map(({ figures: all }) => all[row.figure] ?? Number.NaN);
  const ours = figures(row.ours);
  const ratios = (name: string): number[] => {
    const theirs = figures(name);
    return ours.map((own, round) => {
      const other = theirs[round] ?? Number.NaN;
      return row.ratio === 'share' ? own / other : other / own;
    });
  };
  const all = ratios(row.floor);
  const ratio = median(all);
  const { goal } = row;
  const wanted = goal === undefined ? null : 'atLeast' in goal ? goal.atLeast : goal.atMost;
  const reached =
    goal === undefined ? null : 'atLeast' in goal ? ratio >= goal.atLeast : ratio <= goal.atMost;
  return {
    case: row.name,
    unit: row.unit,
    ours: median(ours),
    floor: median(figures(row.floor)),
    ratio,
    goal: wanted,
    ok: reached,
    rivals: Object.fromEntries((row.rivals ?? []).map(name => [name, median(ratios(name))])),
    spread: spread(all),
  };
}
