/**
 * The benchmark: `npm run bench`. Each row in processes of its own, rivals interleaved, results compared.
 *
 *     node out/benchmark/main.js [--quick] [--case NAME]... [--rounds N] [--json] [--list]
 */

import process from 'node:process';
import { parseArgs } from 'node:util';

import { CASES } from './cases/index.js';
import type { Case, Row } from './harness/case.js';
import { machine, text } from './harness/report.js';
import { linesOf } from './harness/rounds.js';

/** The rows that are wanted, case by case. */
function chosen(names: readonly string[]): { one: Case; rows: Row[] }[] {
  const known = new Set(CASES.flatMap(one => [one.name, ...one.rows.map(row => row.name)]));
  const unknown = names.filter(name => !known.has(name));
  if (unknown.length > 0) {
    throw new Error(`--case: there is no ${unknown.join(', ')}; --list tells all there are`);
  }
  const wanted = (one: Case, row: Row): boolean =>
    names.length === 0 || names.includes(one.name) || names.includes(row.name);
  return CASES.map(one => ({ one, rows: one.rows.filter(row => wanted(one, row)) })).filter(
    ({ rows }) => rows.length > 0,
  );
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      quick: { type: 'boolean', default: false },
      case: { type: 'string', multiple: true, default: [] },
      rounds: { type: 'string' },
      json: { type: 'boolean', default: false },
      list: { type: 'boolean', default: false },
    },
  });
  const rounds = values.rounds === undefined ? undefined : Number(values.rounds);
  if (rounds !== undefined && !(Number.isInteger(rounds) && rounds > 0)) {
    throw new Error(`--rounds: expected a number above 0, got ${values.rounds}`);
  }
  const print = (line: string): void => void process.stdout.write(`${line}\n`);
  if (values.list) {
    for (const one of CASES)
      print(`${one.name}: ${one.about}\n  ${one.rows.map(row => row.name).join('\n  ')}`);
    return;
  }
  const wanted = chosen(values.case);
  if (!values.json) print(machine());
  const missed: string[] = [];
  for (const { one, rows } of wanted) {
    for await (const { row, line } of linesOf(one, rows, { quick: values.quick, rounds })) {
      print(values.json ? JSON.stringify(line) : text(row, line));
      if (line.ok === false) missed.push(row.name);
    }
  }
  if (!values.json) print(missed.length > 0 ? `not reached: ${missed.join(', ')}` : 'every goal was reached');
}

try {
  await main();
} catch (error) {
  process.stderr.write(`${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`);
  process.exitCode = 1;
}
