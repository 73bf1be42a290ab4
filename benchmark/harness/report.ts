/** What is printed: about the machine, and a line for each row. */

import { execFileSync } from 'node:child_process';
import { cpus, release } from 'node:os';

import type { Row } from './case.js';
import { describe } from './placement.js';
import type { Line } from './rounds.js';
import { ROOT } from './tools.js';

/** Machine, kernel, Node, commit. */
export function machine(): string {
  const commit = (): string => {
    try {
      const words = ['describe', '--always', '--dirty', '--exclude', '*'];
      return execFileSync('git', words, { cwd: ROOT, encoding: 'utf8', stdio: 'pipe' }).trim();
    } catch {
      return 'unknown'; // unpacked without its history
    }
  };
  const all = cpus();
  return `${all[0]?.model ?? 'unknown CPU'}, ${all.length} CPUs, Linux ${release()}, Node ${process.version}, commit ${commit()}`;
}

/** Three digits that say something. */
function digits(value: number): string {
  if (!Number.isFinite(value)) return `${value}`;
  if (Math.abs(value) >= 100) return value.toFixed(0);
  return Number(value.toPrecision(3)).toString();
}

/** For people. */
export function text({ name, placement, goal, ours, floor, ratio: how }: Row, line: Line): string {
  const bar =
    goal === undefined
      ? 'reported only'
      : `goal ${'atLeast' in goal ? 'at least' : 'at most'} ${line.goal ?? ''}: ${line.ok === true ? 'reached' : 'NOT REACHED'}`;
  const compared = how === 'share' ? `${ours} / ${floor}` : `${floor} / ${ours}`;
  const [least, most] = line.spread;
  const rivals = Object.entries(line.rivals).map(([rival, ratio]) => `${rival} ${digits(ratio)}x`);
  return [
    `${name}, ${describe(placement)}`,
    `  ${compared} = ${digits(line.ratio)}x (${digits(least)} to ${digits(most)}), ${bar}`,
    `  ${ours} ${digits(line.ours)} ${line.unit}, ${floor} ${digits(line.floor)} ${line.unit}`,
    ...(rivals.length > 0 ? [`  the same ratio against ${rivals.join(', ')}`] : []),
  ].join('\n');
}
