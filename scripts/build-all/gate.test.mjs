import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { root } from '../paths.mjs';
import { hostPlatform } from '../release/stage.mjs';
import { inspect, problemsOf } from './gate.mjs';
import { TARGETS } from './targets.mjs';

const GNU = 'aarch64-unknown-linux-gnu';
const MUSL = 'x86_64-unknown-linux-musl';
const FIT = {
  [GNU]: {
    bytes: 1e6,
    machine: 'AArch64',
    needed: ['libc.so.6', 'libdl.so.2'],
    glibc: '2.17',
    unversioned: [],
  },
  [MUSL]: {
    bytes: 1e6,
    machine: 'Advanced Micro Devices X86-64',
    needed: ['libc.so'],
    glibc: '0',
    unversioned: ['malloc'],
  },
};

test('a binary that is as it must be passes the gate', () => {
  for (const [target, found] of Object.entries(FIT)) assert.deepEqual(problemsOf(target, found), []);
});

/** @param {string} what @param {string} target @param {object} change @param {RegExp} expected */
function refuses(what, target, change, expected) {
  test(`the gate refuses ${what}`, () => {
    assert.match(problemsOf(target, { ...FIT[target], ...change }).join(), expected);
  });
}

refuses(
  'another machine',
  GNU,
  { machine: 'Advanced Micro Devices X86-64' },
  /is for .*X86-64, not for AArch64/,
);
refuses('a library that not every machine has', GNU, { needed: ['libgcc_s.so.1'] }, /needs libgcc_s/);
refuses('a newer glibc', GNU, { glibc: '2.30' }, /needs glibc 2\.30, newer than 2\.17/);
refuses(
  'a call that the oldest glibc does not have',
  GNU,
  { unversioned: ['gettid'] },
  /does not have: gettid/,
);
refuses('no glibc at all', GNU, { glibc: '0' }, /has no symbol of glibc/);
refuses(
  'glibc on musl',
  MUSL,
  { needed: ['libc.so.6'], glibc: '2.4' },
  /needs libc\.so\.6.*has symbols of glibc/,
);
refuses('too many bytes', MUSL, { bytes: 2_000_001 }, /more than 2000000/);

test('what readelf says of a real binary is understood', { skip: process.platform !== 'linux' }, t => {
  const platform = hostPlatform();
  const file = join(root, `userfaultfd.${platform}.node`);
  if (!existsSync(file)) {
    t.skip('not built yet');
    return;
  }
  const target = Object.keys(TARGETS).find(name => TARGETS[name].platform === platform);
  const found = inspect(file);
  assert.equal(found.machine, TARGETS[target].machine);
  assert.ok(found.needed.length > 0 && found.bytes > 100_000);
  if (platform.endsWith('gnu')) assert.match(found.glibc, /^2\.\d+/);
});
