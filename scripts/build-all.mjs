// `npm run build:all`: the binaries of all platform packages, on one x64 machine. Each passes a gate before it
// is put into its package (`npm/<platform>/`). Needs a built library (`npm run build:ts`), which serves faults with them.
//
//   --check        only the gate, for binaries that are there
//   --target NAME  only this one, by Rust's name or by that of its folder

import { copyFileSync, existsSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { faults, inspect, load, problemsOf } from './build-all/gate.mjs';
import { muslNode } from './build-all/musl-node.mjs';
import { call, linkerVariable, loaderFor, nodeArm64, prefix, prepare } from './build-all/prefix.mjs';
import { TARGETS } from './build-all/targets.mjs';
import { bin, root } from './paths.mjs';
import { seconds } from './run.mjs';

const { values } = parseArgs({
  options: { check: { type: 'boolean', default: false }, target: { type: 'string' } },
});
const wanted = Object.keys(TARGETS).filter(
  target => values.target === undefined || [target, TARGETS[target].platform].includes(values.target),
);
if (wanted.length === 0) throw new Error(`no such target: ${values.target}`);
const { env, linkers } = prepare();

/** Where a platform package has its binary. */
const packaged = platform => join(root, 'npm', platform, `userfaultfd.${platform}.node`);

function build(target) {
  const { platform } = TARGETS[target];
  const output = join(prefix, 'out', platform);
  mkdirSync(output, { recursive: true });
  call(
    bin('napi'),
    [
      'build',
      '--platform',
      '--release',
      '--target',
      target,
      '--target-dir',
      join(prefix, 'target'),
      '--manifest-path',
      'crates/binding/Cargo.toml',
      '--output-dir',
      output,
      '--no-js',
    ],
    { env: { [linkerVariable(target)]: linkers[target], ...env } },
  );
  return join(output, `userfaultfd.${platform}.node`);
}

/** A Node on which this machine's kernel serves faults: that for another CPU is emulated, and has no userfaultfd. */
function nodeFor(platform) {
  if (platform === 'linux-x64-gnu') return [process.execPath];
  return platform === 'linux-x64-musl' ? muslNode() : undefined;
}

/** Builds one and looks at it; `false` where it is not fit to be published. */
function make(target) {
  const { platform } = TARGETS[target];
  const started = performance.now();
  const file = values.check ? packaged(platform) : build(target);
  if (!existsSync(file)) throw new Error(`${file} is missing`);
  const found = inspect(file);
  const problems = problemsOf(target, found);
  let loaded = 'not loaded';
  try {
    loaded = `loaded by ${load(target, file, { prefix, nodeArm64, loader: loaderFor(target) })}`;
  } catch (error) {
    problems.push(`does not load: ${error.message}`);
  }
  try {
    const node = nodeFor(platform);
    loaded += node === undefined ? ', no faults' : `, ${faults(file, node)} faults served`;
  } catch (error) {
    problems.push(`does not serve: ${error.message}`);
  }
  const facts = [
    platform.padEnd(17),
    `${(found.bytes / 1000).toFixed(0)} kB`.padStart(8),
    found.glibc === '0' ? 'no glibc    ' : `glibc ${found.glibc}`.padEnd(12),
    loaded.padEnd(42),
    seconds(performance.now() - started),
  ];
  process.stdout.write(`${facts.join('  ')}\n`);
  process.stdout.write(`${' '.repeat(19)}needs ${found.needed.join(', ') || 'nothing'}\n`);
  for (const problem of problems) process.stdout.write(`${' '.repeat(19)}FAILED: ${problem}\n`);
  if (problems.length > 0) return false;
  if (!values.check) copyFileSync(file, packaged(platform));
  return true;
}

const passed = wanted.filter(target => make(target)).length;
process.stdout.write(`\n${passed} of ${wanted.length} binaries are fit to be published\n`);
process.exitCode = passed === wanted.length ? 0 : 1;
