import { execFile } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';

import { PEER } from '../examples/support/peer.js';
import { canRun } from './helpers/serving.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

interface Ran {
  status: number;
  output: string;
  errors: string;
}

/** `npm run bench` with these words. */
async function bench(...words: string[]): Promise<Ran> {
  const command = ['run', '--silent', 'bench', '--', ...words];
  const env = { ...process.env, UFFD_PEER: PEER };
  return new Promise(resolve => {
    execFile(
      'npm',
      command,
      { cwd: ROOT, encoding: 'utf8', timeout: 100_000, env },
      (error, output, errors) => {
        const status = error === null ? 0 : typeof error.code === 'number' ? error.code : -1;
        resolve({ status, output, errors });
      },
    );
  });
}

test('the benchmark prints one object for each row it was asked for, whatever the figures are', async t => {
  if (!canRun(t)) return;

  const { status, output, errors } = await bench(
    '--quick',
    '--json',
    '--case',
    'try-copy',
    '--case',
    'minor-one-cpu',
  );

  t.is(status, 0, errors);
  const lines = output
    .trim()
    .split('\n')
    .map(line => JSON.parse(line) as Record<string, unknown>);
  t.deepEqual(
    lines.map(line => [line['case'], line['unit'], line['goal']]),
    [
      ['minor-one-cpu', 'pages/s', 0.9],
      ['try-copy', 'ns', 1.3],
    ],
  );
  for (const line of lines) {
    t.deepEqual(Object.keys(line), [
      'case',
      'unit',
      'ours',
      'floor',
      'ratio',
      'goal',
      'ok',
      'rivals',
      'spread',
    ]);
    for (const name of ['ours', 'floor', 'ratio']) t.true((line[name] as number) > 0, `${name}: ${output}`);
    t.is(typeof line['ok'], 'boolean');
    t.true(
      Object.values(line['rivals'] as object).every(ratio => ratio > 0),
      output,
    );
    const [least = 0, most = 0] = line['spread'] as number[];
    t.true(least <= (line['ratio'] as number) && (line['ratio'] as number) <= most);
  }
});

test('for people, the benchmark names the machine, where things ran, and what was not reached', async t => {
  if (!canRun(t)) return;

  const { status, output, errors } = await bench('--quick', '--case', 'try-copy');

  t.is(status, 0, errors);
  t.regex(output, /^.+, \d+ CPUs, Linux \S+, Node v\S+, commit \S+$/m);
  t.regex(output, /^try-copy, one CPU \(\d+\)$/m);
  t.regex(
    output,
    /^ {2}tryCopy \/ C ioctl = [\d.]+x \([\d.]+ to [\d.]+\), goal at most 1\.3: (NOT REACHED|reached)$/m,
  );
  t.regex(output, /^(every goal was reached|not reached: try-copy)$/m);
});

test('a case that does not exist is refused before anything is measured', async t => {
  const { status, output, errors } = await bench('--json', '--case', 'no-such-case');

  t.is(status, 1);
  t.is(output, '');
  t.regex(errors, /there is no no-such-case; --list tells all there are/);
});

test('every file of a case is part of the benchmark, and no two rows have one name', async t => {
  const { status, output, errors } = await bench('--list');

  t.is(status, 0, errors);
  const cases = output.match(/^\S.*(?=: )/gm) ?? [];
  const rows = output.match(/^ {2}\S+$/gm) ?? [];
  const files = readdirSync(join(ROOT, 'benchmark', 'cases')).filter(name => name !== 'index.ts');
  t.true(existsSync(join(ROOT, 'benchmark', 'floor')));
  t.true(cases.length >= files.length, output);
  t.is(new Set(rows).size, rows.length, output);
});
