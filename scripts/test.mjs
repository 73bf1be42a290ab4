// `npm test`: everything that is checked, Rust and TypeScript, on a fresh clone as well as on a built tree.
//
//   --only rust|ts    for developers: one half of it
//   --match PATTERN   for developers: only tests whose name has PATTERN in it
//
// All steps run even when one fails. The last line sums them up: tests one by one, every other step as one.

import { parseArgs } from 'node:util';
import { explain, make, requirePlatform, steps } from './ensure.mjs';
import { bin } from './paths.mjs';
import { readCargoTest, readTap } from './results.mjs';
import { run, seconds } from './run.mjs';

const { values } = parseArgs({ options: { only: { type: 'string' }, match: { type: 'string' } } });
const { only, match } = values;
if (only !== undefined && only !== 'rust' && only !== 'ts') {
  process.stdout.write(`--only takes rust or ts, not ${only}\n`);
  process.exit(2);
}

/** @type {import('./results.mjs').Results} */
const total = { passed: 0, failed: 0, skipped: [], failures: [] };

function report(name, outcome, milliseconds) {
  process.stdout.write(`${name.padEnd(28)} ${outcome}, ${seconds(milliseconds)}\n`);
}

/** A command that is right or wrong as a whole. */
async function check(name, command, env = {}) {
  const result = await run(command, { name: name.replaceAll(/\W+/g, '-'), env });
  report(name, result.ok ? 'ok' : 'FAILED', result.milliseconds);
  if (result.ok) return;
  total.failed += 1;
  total.failures.push(`${name}\n${explain(result)}`);
}

/** Something that has to be built before tests can run. */
async function prepare(step) {
  const result = await make(step);
  if (result === undefined) return true;
  report(step.name, result.ok ? 'made' : 'FAILED', result.milliseconds);
  if (result.ok) return true;
  total.failed += 1;
  total.failures.push(`${step.name}\n${explain(result)}`);
  return false;
}

/** A command that prints the results of many tests. */
async function tests(name, command, read, options) {
  const result = await run(command, options);
  const results = read(result);
  if (!result.ok && results.failed === 0) {
    results.failed = 1;
    results.failures.push(explain(result));
  }
  report(
    name,
    `${results.passed} passed, ${results.failed} failed, ${results.skipped.length} skipped`,
    result.milliseconds,
  );
  total.passed += results.passed;
  total.failed += results.failed;
  total.skipped.push(...results.skipped);
  total.failures.push(...results.failures.map(text => `${name}: ${text}`));
}

async function checkRust() {
  await check('rustfmt', ['cargo', 'fmt', '--all', '--check']);
  await check('clippy', ['cargo', 'clippy', '--workspace', '--all-targets', '--', '-D', 'warnings']);
  await check('rustdoc', ['cargo', 'doc', '--workspace', '--no-deps'], { RUSTDOCFLAGS: '-D warnings' });
}

async function testRust() {
  const command = [
    'cargo',
    'test',
    '--workspace',
    '--no-fail-fast',
    '--',
    '--show-output',
    ...(match ? [match] : []),
  ];
  await tests('cargo test', command, result => readCargoTest(result.stdout), { name: 'cargo-test' });
}

async function checkTypeScript() {
  await check('lint', [bin('oxlint'), '--deny-warnings', '--report-unused-disable-directives']);
  await check('prettier', [bin('prettier'), '--check', '--log-level', 'warn', '.']);
  await check('tree', [process.execPath, 'scripts/check-tree.mjs']);
}

async function testTypeScript() {
  const command = [bin('ava'), '--tap', ...(match ? ['--match', `*${match}*`] : [])];
  await tests('ava', command, result => readTap(result.stdout), { name: 'ava', separate: true });
}

async function main() {
  requirePlatform();
  if (!(await prepare(steps.dependencies))) return;
  if (only !== 'ts') {
    await checkRust();
    await testRust();
  }
  if (only !== 'rust') {
    const built = [];
    for (const step of [steps.addon, steps.library, steps.peer, steps.tests]) {
      built.push(await prepare(step));
      if (!built.at(-1)) return;
    }
    await checkTypeScript();
    await testTypeScript();
  }
}

await main();
if (total.skipped.length > 0) {
  process.stdout.write('\nskipped:\n');
  for (const { test, reason } of total.skipped) process.stdout.write(`  ${test}: ${reason}\n`);
}
for (const failure of total.failures) process.stdout.write(`\n--- ${failure}\n`);
if (total.passed + total.failed === 0) {
  process.stdout.write('\nno test ran\n');
  total.failed = 1;
}
process.exitCode = total.failed > 0 ? 1 : 0;
process.stdout.write(`\n${total.passed} passed, ${total.failed} failed, ${total.skipped.length} skipped\n`);
