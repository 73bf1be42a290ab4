// The sum at the end of `npm test` is only as good as the reading of what the test programs print.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readCargoTest, readTap } from './results.mjs';

const program = (name, lines) =>
  [`     Running tests/${name}.rs (target/debug/deps/${name}-0123456789abcdef)`, '', ...lines, ''].join('\n');

const summary = (passed, failed, ignored = 0) =>
  `test result: ${failed ? 'FAILED' : 'ok'}. ${passed} passed; ${failed} failed; ${ignored} ignored; 0 measured; 0 filtered out; finished in 0.01s`;

test('the programs of a cargo run are added up', () => {
  const text = `   Compiling uffd v0.1.0\n${program('one', [summary(3, 0)])}\n${program('two', [summary(2, 0)])}`;

  const { passed, failed, skipped } = readCargoTest(text);

  assert.deepEqual([passed, failed, skipped], [5, 0, []]);
});

test('what a Rust test prints is not taken for a heading or a reason', () => {
  const text = program('prints', [
    'successes:',
    '',
    '---- prints stdout ----',
    '     Running away (fast)',
    'a line, skipped: 5 of them',
    '',
    'successes:',
    '    prints',
    '',
    summary(1, 0),
  ]);

  const { passed, failed, skipped } = readCargoTest(text);

  assert.deepEqual([passed, failed, skipped], [1, 0, []]);
});

test('a Rust test that gave reasons while passing is one skipped test', () => {
  const text = program('pool', [
    'successes:',
    '',
    '---- empty_pool stdout ----',
    'skipped: no huge pages',
    'skipped: no THP',
    '',
    '',
    'successes:',
    '    empty_pool',
    '    other',
    '',
    summary(2, 0),
  ]);

  const { passed, skipped } = readCargoTest(text);

  assert.equal(passed, 1);
  assert.deepEqual(skipped, [{ test: 'pool (tests/pool.rs): empty_pool', reason: 'no huge pages; no THP' }]);
});

test('a reason from a process that a Rust test started is not lost', () => {
  const { passed, skipped } = readCargoTest(
    program('child', ['test spawns ... skipped: not permitted', 'ok', summary(2, 0)]),
  );

  assert.deepEqual([passed, skipped.map(({ reason }) => reason)], [1, ['not permitted']]);
});

test('a reason of a Rust test that failed does not make it skipped', () => {
  const text = program('bad', [
    'failures:',
    '',
    '---- breaks stdout ----',
    'skipped: half of it',
    'thread panicked at x:1',
    '',
    '',
    'failures:',
    '    breaks',
    '',
    summary(0, 1),
  ]);

  const { failed, skipped, failures } = readCargoTest(text);

  assert.deepEqual([failed, skipped], [1, []]);
  assert.match(failures[0], /thread panicked at x:1/);
});

test('an ignored Rust test is skipped, with its reason', () => {
  const { passed, skipped } = readCargoTest(
    program('slow', ['test takes_long ... ignored, needs an hour', summary(1, 0, 1)]),
  );

  assert.equal(passed, 1);
  assert.deepEqual(skipped, [{ test: 'slow (tests/slow.rs): takes_long', reason: 'needs an hour' }]);
});

test('a Rust test program that dies before its result is a failure', () => {
  const text = `${program('dies', ['running 4 tests', 'test first ... ok'])}error: test failed (signal: 7, SIGBUS)\n${program('next', [summary(1, 0)])}`;

  const { passed, failed, failures } = readCargoTest(text);

  assert.deepEqual([passed, failed], [1, 1]);
  assert.match(failures[0], /^dies \(tests\/dies\.rs\): ended without a result[^]*SIGBUS/);
});

test('a cargo run that did not compile has no tests', () => {
  const { passed, failed } = readCargoTest('error[E0425]: cannot find value `x`\n');

  assert.deepEqual([passed, failed], [0, 0]);
});

test('each kind of TAP line is counted once', () => {
  const text = [
    'TAP version 13',
    'ok 1 - fault › a',
    'ok 2 - fault › b',
    '#   skipped: no device',
    '#   another word',
    'not ok 3 - fault › c',
    '  ---',
    "    message: 'ok 9 - not a test'",
    '  ...',
    'ok 4 - fault › d # SKIP',
    'not ok 5 - fault › e # TODO',
    '',
    '1..5',
    '# tests 4',
    '# pass 2',
    '# skip 1',
    '# fail 2',
    '',
  ].join('\n');

  const { passed, failed, skipped, failures } = readTap(text);

  assert.deepEqual([passed, failed], [1, 1]);
  assert.deepEqual(skipped, [
    { test: 'fault › b', reason: 'no device' },
    { test: 'fault › d', reason: 'marked as skipped' },
    { test: 'fault › e', reason: 'not written' },
  ]);
  assert.match(failures[0], /^not ok 3 - fault › c\n {2}---\n.*message/);
});

test('tests that a dead process took with it are failures', () => {
  const text =
    'TAP version 13\nok 1 - a\nnot ok 2 - x.spec.js exited due to SIGBUS\n\n1..4\n# tests 4\n# pass 1\n# fail 4\n';

  const { passed, failed } = readTap(text);

  assert.deepEqual([passed, failed], [1, 4]);
});

test('a TAP report without its end is a failure', () => {
  const { passed, failed } = readTap('TAP version 13\nok 1 - a\n');

  assert.deepEqual([passed, failed], [1, 1]);
});

test('which tests ran is told with their files, as far as they are known', () => {
  const rust = readCargoTest(
    [
      '     Running unittests src/lib.rs (target/debug/deps/uffd-0123456789abcdef)',
      'test error::partial ... ok',
      '     Running tests/a/main.rs (target/debug/deps/a-0123456789abcdef)',
      'test copy::rows ... FAILED',
      'test slow ... ignored',
      'test result: FAILED. 0 passed; 1 failed; 1 ignored',
    ].join('\n'),
  );
  assert.deepEqual(rust.ran, [
    { file: 'src/lib.rs', title: 'error::partial' },
    { file: 'tests/a/main.rs', title: 'copy::rows' },
  ]);
  const { ran } = readTap('TAP version 13\nok 1 - 40-x › pages › whole\nnot ok 2 - 41-y › b\n1..2\n');
  assert.deepEqual(ran, [
    { file: '__test__/40-x.spec.ts', title: 'pages › whole' },
    { file: '__test__/41-y.spec.ts', title: 'b' },
  ]);
});
