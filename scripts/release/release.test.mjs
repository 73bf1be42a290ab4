import assert from 'node:assert/strict';
import { test } from 'node:test';
import { contentsOf } from './contents.mjs';
import { linkedCrates, notices } from './notices.mjs';
import { checkSizes } from './sizes.mjs';

const ROOT_FILES = [
  'CHANGELOG.md',
  'LICENSE',
  'README.md',
  'dist/index.d.ts',
  'dist/index.js',
  'dist/src/cli/bench/measure.js',
  'dist/src/cli/doctor/attempt.js',
  'dist/src/cli/main.js',
  'dist/src/worker-source-thread.js',
  'index.ts',
  'native.cjs',
  'native.d.cts',
  'package.json',
  'src/pager.ts',
];
const PLATFORM_FILES = [
  'LICENSE',
  'README.md',
  'THIRD-PARTY-LICENSES',
  'package.json',
  'userfaultfd-pagerd',
  'userfaultfd.linux-x64-musl.node',
];

test('tarballs with the files that belong there are accepted', () => {
  assert.equal(contentsOf({ name: 'userfaultfd', files: ROOT_FILES }), '');
  assert.equal(contentsOf({ name: '@userfaultfd/binding-linux-x64-musl', files: PLATFORM_FILES }), '');
});

test('what is missing from a tarball, and what does not belong there, is named', () => {
  const files = [
    ...ROOT_FILES.filter(name => name !== 'native.cjs'),
    'userfaultfd.linux-x64-gnu.node',
    '__test__/x.ts',
  ];

  assert.match(
    contentsOf({ name: 'userfaultfd', files }),
    /native\.cjs is missing\nuserfaultfd\.linux-x64-gnu\.node does not belong there\n__test__\/x\.ts does not/,
  );
  assert.match(
    contentsOf({ name: '@userfaultfd/binding-linux-x64-gnu', files: PLATFORM_FILES }),
    /instead of .*x64-gnu/,
  );
});

test('packages that are too large are named with their size', () => {
  const problems = [];
  checkSizes(
    [
      { name: 'userfaultfd', size: 300_000, unpackedSize: 900_000, largest: 9e4, files: ROOT_FILES },
      {
        name: '@userfaultfd/binding-linux-x64-musl',
        size: 900_000,
        unpackedSize: 2_100_000,
        largest: 1_999_999,
        files: PLATFORM_FILES,
      },
      {
        name: '@userfaultfd/binding-linux-x64-musl',
        size: 900_000,
        unpackedSize: 2_100_000,
        largest: 2_000_000,
        files: PLATFORM_FILES,
      },
    ],
    (_what, problem) => problems.push(problem),
  );

  assert.deepEqual(problems, [
    '300 kB, and less than 300 kB is promised',
    '',
    '2000 kB, and less than 2000 kB is promised',
  ]);
});

test('the notices name what is linked into the binary, with the text of its licence', () => {
  const names = linkedCrates().map(({ name }) => name);

  for (const name of ['libc', 'napi', 'nix', 'userfaultfd']) assert.ok(names.includes(name), name);
  for (const name of ['napi-derive', 'syn', 'shuttle', 'tempfile']) assert.ok(!names.includes(name), name);
  assert.match(notices(), /Permission is hereby granted, free of charge/);
});
