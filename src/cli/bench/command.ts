/** `userfaultfd bench`: this machine's floor, and how close the package comes. */

import { cpus, release } from 'node:os';
import process from 'node:process';

import colors from 'picocolors';

import { MiB } from '../../units.js';
import { Userfaultfd } from '../../userfaultfd.js';
import { type Row, ROWS } from './rows.js';
import { type Result, runRow, withImage } from './run.js';
import type { Figures } from './works.js';

/** Options of the command line. */
export interface BenchOptions {
  json?: boolean;
  quick?: boolean;
}

const SIZE = 32 * MiB;
const ROUNDS = 3;
const QUICK = { size: 4 * MiB, rounds: 1 };

/** Measures everything, and says each as it is known. */
export async function bench({ json = false, quick = false }: BenchOptions, version: string): Promise<void> {
  // Where it cannot be had, the reason is told, and what to do.
  Userfaultfd.create().close();
  const [size, rounds] = quick ? [QUICK.size, QUICK.rounds] : [SIZE, ROUNDS];
  const machine = {
    cpu: cpus()[0]?.model ?? 'unknown CPU',
    cpus: cpus().length,
    kernel: release(),
    node: process.version,
    version,
  };
  const say = (text: string): void => void (json || process.stdout.write(`${text}\n`));
  say(
    `${machine.cpu}, ${machine.cpus} CPUs, Linux ${machine.kernel}, Node ${machine.node}, userfaultfd ${version}`,
  );
  say(colors.dim(`${size / MiB} MiB; fresh processes, medians of ${rounds} rounds`));
  const results: Result[] = [];
  await withImage(size, async image => {
    for (const row of ROWS) {
      say(`\n${colors.bold(row.title)}`);
      for (const placement of row.placements) {
        const result = await runRow(row, placement, { image, rounds });
        if (result === undefined) say(`  ${placement}: not measured, this process may use one only`);
        else {
          results.push(result);
          say(described(row, result));
        }
      }
    }
  });
  if (json)
    process.stdout.write(
      `${JSON.stringify({ machine, bytes: size, rounds, rows: results }, undefined, 2)}\n`,
    );
}

/** Three digits that say something. */
function digits(value: number): string {
  return value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
}

function described(row: Row, { placement, package: ours, floor, ratio, spread, others }: Result): string {
  const faults = row.figure === 'each' && row.name !== 'call';
  const figures = (all: Figures): string => {
    if (!faults) return row.figure === 'total' ? `${digits(all.total)} ms` : `${digits(all.each)} us`;
    const rate = `${Math.round(1e6 / all.each).toLocaleString('en')} faults/s`;
    return `${rate}, p50 ${digits(all.p50)} us, p99 ${digits(all.p99)} us`;
  };
  const [least, greatest] = spread.map(digits);
  const share = colors.bold(`${digits(ratio)}x of the floor's time`);
  return [
    `  ${placement}: ${share} (${least} to ${greatest})`,
    `    ${row.words[0]}: ${figures(ours)}`,
    `    ${colors.dim(`floor, ${row.words[1]}: ${figures(floor)}`)}`,
    ...Object.entries(others).map(([name, all]) => `    ${colors.dim(`${name}: ${figures(all)}`)}`),
  ].join('\n');
}
