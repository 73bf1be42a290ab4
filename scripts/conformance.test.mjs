import assert from 'node:assert/strict';
import { test } from 'node:test';

import { checkConformance } from './conformance.mjs';

const ran = [
  { file: 'tests/a/main.rs', title: 'copy::rows' },
  { file: 'tests/a/main.rs', row: 'a row' },
  { file: '__test__/40-x.spec.ts', title: 'pages are copied' },
];
const check = entry => checkConformance({ suite: { one: entry } }, ran).problems;

test('cases that have run, or have a reason, are right', () => {
  assert.deepEqual(check({ file: 'crates/uffd/tests/a/main.rs', title: 'copy::rows', row: 'a row' }), []);
  assert.deepEqual(check({ file: '__test__/40-x.spec.ts', title: 'pages are copied' }), []);
  assert.deepEqual(check({ reason: 'there is no such thing here' }), []);
});

test('everything else is a problem', () => {
  assert.match(
    check({ file: 'crates/uffd/tests/a/main.rs', title: 'copy' })[0],
    /suite › one: no test "copy"/,
  );
  assert.match(check({ file: 'crates/uffd/tests/b/main.rs', title: 'copy::rows' })[0], /has run/);
  assert.match(check({ file: 'xtests/a/main.rs', title: 'copy::rows' })[0], /has run/);
  assert.match(check({ file: 'tests/a/main.rs', title: 'copy::rows', row: 'none' })[0], /no row "none"/);
  assert.match(check({ file: 'tests/a/main.rs', title: 'a row' })[0], /has run/);
  assert.match(check({})[0], /neither/);
  assert.match(check({ file: 'a', title: 'b', reason: 'c' })[0], /and a reason/);
  assert.match(checkConformance({ empty: {} }, ran).problems[0], /no cases/);
});

test('cases and reasons are counted', () => {
  const two = {
    a: { one: { reason: 'none' } },
    b: { two: { file: 'tests/a/main.rs', title: 'copy::rows' } },
  };
  assert.deepEqual(checkConformance(two, ran), { cases: 2, reasons: 1, skipped: 0, problems: [] });
});

test('rows of a test that said why it could not run are counted as skipped, all others are missed', () => {
  const some = [
    { file: 'tests/a/main.rs', title: 'huge' },
    { file: 'tests/a/main.rs', title: 'huge', skipped: true },
    { file: 'tests/a/main.rs', row: 'small' },
  ];
  const suite = rows => ({
    suite: Object.fromEntries(rows.map(([row, title]) => [row, { file: 'tests/a/main.rs', title, row }])),
  });

  assert.deepEqual(
    checkConformance(
      suite([
        ['small', 'huge'],
        ['large', 'huge'],
      ]),
      some,
    ),
    {
      cases: 2,
      reasons: 0,
      skipped: 1,
      problems: [],
    },
  );
  assert.match(checkConformance(suite([['large', 'other']]), some).problems[0], /has run/);
});
