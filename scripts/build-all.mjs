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
import { binariesOf, DAEMON, TARGETS } from './build-all/targets.mjs';
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

/** Where a platform package has a binary. */
const packaged = (platform, name) => join(root, 'npm', platform, name);

/** Builds both binaries of a target; where they are. */
function build(target) {
  const { platform, libc } = TARGETS[target];
  const output = join(prefix, 'out', platform);
  mkdirSync(output, { recursive: true });
  const folder = join(prefix, 'target');
  const linker = { [linkerVariable(target)]: linkers[target] };
  const common = ['build', '--release', '--target', target, '--target-dir', folder, '--manifest-path'];
  call(
    bin('napi'),
    [...common, 'crates/binding/Cargo.toml', '--platform', '--output-dir', output, '--no-js'],
    { env: { ...linker, ...env } },
  );
  // As napi has it for the addon, and as the standard library here was compiled. zig links musl into an executable all the same.
  const dynamic = libc === 'musl' ? '-C target-feature=-crt-static' : '';
  const RUSTFLAGS = `${env.RUSTFLAGS ?? ''} ${dynamic}`.trim();
  call('cargo', [...common, 'crates/pagerd/Cargo.toml'], { env: { ...linker, ...env, RUSTFLAGS } });
  copyFileSync(join(folder, target, 'release', DAEMON), join(output, DAEMON));
  return name => join(output, name);
}

/** A Node on which this machine's kernel serves faults: that for another CPU is emulated, and has no userfaultfd. */
function nodeFor(platform) {
  if (platform === 'linux-x64-gnu') return [process.execPath];
  return platform === 'linux-x64-musl' ? muslNode() : undefined;
}

/** What is wrong with a binary, after saying what it is. */
function look(target, name, file, built) {
  const { platform } = TARGETS[target];
  if (!existsSync(file)) throw new Error(`${file} is missing`);
  const found = inspect(file);
  const problems = problemsOf(target, found);
  let loaded = 'not loaded';
  try {
    loaded = `loaded by ${load(target, file, { prefix, nodeArm64, loader: loaderFor(target) })}`;
  } catch (error) {
    problems.push(`does not load: ${error.message}`);
  }
  if (name !== DAEMON) {
    try {
      const node = nodeFor(platform);
      loaded += node === undefined ? ', no faults' : `, ${faults(file, node)} faults served`;
    } catch (error) {
      problems.push(`does not serve: ${error.message}`);
    }
  }
  const facts = [
    (name === DAEMON ? DAEMON : platform).padEnd(18),
    `${(found.bytes / 1000).toFixed(0)} kB`.padStart(8),
    found.glibc === '0' ? 'no glibc    ' : `glibc ${found.glibc}`.padEnd(12),
    loaded.padEnd(42),
    built,
  ];
  process.stdout.write(`${facts.join('  ').trimEnd()}\n`);
  process.stdout.write(`${' '.repeat(20)}needs ${found.needed.join(', ') || 'nothing'}\n`);
  for (const problem of problems) process.stdout.write(`${' '.repeat(20)}FAILED: ${problem}\n`);
  return problems.length;
}

/** Builds a target's binaries and looks at them; `false` where one is not fit to be published. */
function make(target) {
  const { platform } = TARGETS[target];
  const started = performance.now();
  const place = values.check ? name => packaged(platform, name) : build(target);
  const names = binariesOf(platform);
  const problems = names.map(name =>
    look(target, name, place(name), name === DAEMON ? '' : seconds(performance.now() - started)),
  );
  if (problems.some(count => count > 0)) return false;
  if (!values.check) for (const name of names) copyFileSync(place(name), packaged(platform, name));
  return true;
}

const passed = wanted.filter(target => make(target)).length;
process.stdout.write(`\nthe binaries of ${passed} of ${wanted.length} packages are fit to be published\n`);
process.exitCode = passed === wanted.length ? 0 : 1;
