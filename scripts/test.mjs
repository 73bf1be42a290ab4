// `npm test`: everything that is checked, Rust and TypeScript, on a fresh clone as well as on a built tree.
//
//   --only rust|ts    for developers: one half of it
//   --match PATTERN   for developers: only tests whose name has PATTERN in it
//
// All steps run even when one fails. The last line sums them up: tests one by one, every other step as one.

import { parseArgs } from 'node:util';
import { checkTree } from './conformance.mjs';
import { explain, make, requirePlatform, steps } from './ensure.mjs';
import { bin, root } from './paths.mjs';
import { readCargoTest, readTap } from './results.mjs';
import { run, seconds } from './run.mjs';

/** The command line; one that cannot be understood ends the process before anything runs. */
function readArguments() {
  try {
    const { values } = parseArgs({ options: { only: { type: 'string' }, match: { type: 'string' } } });
    if (values.only === undefined || values.only === 'rust' || values.only === 'ts') return values;
    process.stdout.write(`--only takes rust or ts, not ${values.only}\n`);
  } catch (error) {
    process.stdout.write(`${error.message}\n`);
  }
  return process.exit(2);
}

const { only, match } = readArguments();

/** @type {import('./results.mjs').Results} */
const total = { passed: 0, failed: 0, skipped: [], failures: [], ran: [] };

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

/** `prepare` for steps of which each needs those before it; `false` from the first that failed. */
async function prepareAll(wanted) {
  for (const step of wanted) {
    if (!(await prepare(step))) return false;
  }
  return true;
}

/** A command that prints the results of many tests. */
async function tests(name, command, read, options) {
  const result = await run(command, options);
  const results = read(result);
  // ava fails where no name matches; with a pattern given, the other half may have what was meant.
  const noneMatched = match !== undefined && /^1\.\.0$/m.test(result.stdout);
  if (!result.ok && !noneMatched && (results.failed === 0 || results.cut)) {
    results.failed = Math.max(1, results.failed);
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
  total.ran.push(...results.ran);
  total.failures.push(...results.failures.map(text => `${name}: ${text}`));
}

async function checkRust() {
  await check('rustfmt', ['cargo', 'fmt', '--all', '--check', '--', '--color', 'never']);
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
  // The sum at the end is only as good as the reading of what the test programs print.
  await check('scripts', [
    process.execPath,
    '--test',
    'scripts/results.test.mjs',
    'scripts/conformance.test.mjs',
    'scripts/build-all/gate.test.mjs',
    'scripts/release/release.test.mjs',
  ]);
}

async function testTypeScript() {
  const command = [bin('ava'), '--tap', ...(match ? ['--match', `*${match}*`] : [])];
  await tests('ava', command, result => readTap(result.stdout), { name: 'ava', separate: true });
}

/** Whether every test that stands for a case of another suite has run. Only when everything was to run. */
function checkSuites() {
  const start = performance.now();
  const { cases, reasons, skipped, problems } = checkTree(root, total.ran);
  const outcome = problems.length === 0 ? 'ok' : 'FAILED';
  report(
    `conformance`,
    `${outcome}: ${cases} cases, ${reasons} do not apply, ${skipped} skipped`,
    performance.now() - start,
  );
  if (problems.length === 0) total.passed += 1;
  else total.failed += 1;
  if (problems.length > 0) total.failures.push(`conformance\n${problems.join('\n')}`);
}

async function main() {
  requirePlatform();
  if (!(await prepare(steps.dependencies))) return;
  if (only !== 'ts') {
    await checkRust();
    await testRust();
  }
  if (only !== 'rust') {
    const ready = await prepareAll([steps.addon, steps.library, steps.peer, steps.tests]);
    // These say what they find without a build, too; only the tests need all of it.
    await checkTypeScript();
    if (ready) {
      // Warnings are failures: what is public is documented, and no link leads nowhere.
      await check('typedoc', [bin('typedoc')]);
      await testTypeScript();
      if (match === undefined) {
        await check('consumer', [process.execPath, 'scripts/consumer.mjs']);
        await check('report page', [process.execPath, 'scripts/report-page.mjs']);
      }
    } else process.stdout.write('ava                          not run: what it needs could not be built\n');
  }
  if (only === undefined && match === undefined) checkSuites();
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
