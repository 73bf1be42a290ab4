// Everything `npm start` and `npm test` need, made where it is missing or out of date: on a fresh clone all
// of it, afterwards what changed. Plain Node without dependencies, because it runs before there are any.

import { readdirSync, rmSync, statSync } from 'node:fs';
import { join, relative } from 'node:path';
import { adviceFor } from './hints.mjs';
import { bin, dist, out, peer, root } from './paths.mjs';
import { run, seconds, tail } from './run.mjs';
import { forget, isCurrent, record, stateOf } from './stamp.mjs';

export { dist, logs, out, peer, root, targetDir } from './paths.mjs';

const LOCK = 'package-lock.json';
const INSTALLED = 'node_modules/.package-lock.json';

/** Milliseconds since the epoch, 0 where the file does not exist. */
const changed = path => statSync(join(root, path), { throwIfNoEntry: false })?.mtimeMs ?? 0;

/** The crates' folders, without the crate that only the tests' other process is made of. */
const addonCrates = () =>
  readdirSync(join(root, 'crates'))
    .filter(name => name !== 'peer')
    .flatMap(name => ['Cargo.toml', 'build.rs', 'src'].map(part => `crates/${name}/${part}`));

/** The binaries in the root that the loader would take on this machine. */
const addons = () =>
  readdirSync(root).filter(
    name => name.startsWith(`userfaultfd.linux-${process.arch}-`) && name.endsWith('.node'),
  );

const exists = path => changed(path) > 0;

/**
 * A thing that is made by a command from files. `inputs` and `outputs` are paths relative to the root;
 * `complete` says whether all that must be there is there.
 */
const built = ({ id, inputs, outputs, complete = () => outputs().every(exists), ...step }) => ({
  ...step,
  id,
  isCurrent: () => complete() && isCurrent(id, { inputs: stateOf(inputs()), outputs: stateOf(outputs()) }),
  begin() {
    const state = stateOf(inputs());
    forget(id);
    return state;
  },
  finish: state => record(id, { inputs: state, outputs: stateOf(outputs()) }),
});

const TOOLCHAIN = ['package.json', INSTALLED];
const RUST = ['Cargo.toml', 'Cargo.lock', '.cargo/config.toml', 'rust-toolchain.toml'];

/** What can be made, in the order in which each needs those before it. */
export const steps = {
  dependencies: {
    id: 'npm-install',
    name: 'npm packages',
    // Not `npm ci`: it refuses a lock file in which an optional binary of another platform has no entry, which is what
    // npm writes where that binary could not be had. Versions are the lock file's all the same; nothing is saved.
    command: ['npm', 'install', '--no-save', '--no-audit', '--no-fund'],
    isCurrent: () => exists(INSTALLED) && changed(INSTALLED) >= changed(LOCK),
  },
  addon: built({
    id: 'addon',
    name: 'native addon',
    command: ['npm', 'run', '--silent', 'build:native'],
    inputs: () => [...RUST, ...addonCrates(), ...TOOLCHAIN],
    outputs: () => ['native.cjs', 'native.d.cts', 'userfaultfd-pagerd', ...addons()],
    complete: () => ['native.cjs', 'native.d.cts', 'userfaultfd-pagerd'].every(exists) && addons().length > 0,
  }),
  library: built({
    id: 'library',
    name: 'TypeScript library',
    command: ['npm', 'run', '--silent', 'build:ts'],
    clean: [dist],
    inputs: () => [
      'index.ts',
      'src',
      'native.d.cts',
      'tsconfig.json',
      'tsconfig.build.json',
      'scripts/declarations.mjs',
      ...TOOLCHAIN,
    ],
    outputs: () => ['dist'],
    complete: () => exists('dist/index.js') && exists('dist/index.d.ts'),
  }),
  peer: built({
    id: 'peer',
    name: 'peer process',
    command: ['cargo', 'build', '--release', '--package', 'peer'],
    inputs: () => [...RUST, 'crates/peer/Cargo.toml', 'crates/peer/src'],
    outputs: () => [relative(root, peer)],
  }),
  tests: built({
    id: 'tests',
    name: 'tests, benchmarks and examples',
    command: [bin('tsc'), '-p', '__test__/tsconfig.json'],
    // What was compiled from a file that is gone must not run.
    clean: ['__test__', 'benchmark', 'examples'].map(folder => join(out, folder)),
    inputs: () => ['__test__', 'benchmark', 'examples', 'dist', 'tsconfig.json', ...TOOLCHAIN],
    outputs: () => ['out/__test__', 'out/benchmark', 'out/examples'],
    complete: () => exists('out/__test__'),
  }),
};

/**
 * Makes one of `steps`, where it is not current.
 * Gives how the command went (as `run` does), or `undefined` where none was needed.
 */
export async function make(step) {
  if (step.isCurrent()) return undefined;
  const state = step.begin?.();
  for (const folder of step.clean ?? []) rmSync(folder, { force: true, recursive: true });
  const result = await run(step.command, { name: step.id });
  if (result.ok) step.finish?.(state);
  if (result.ok && !step.isCurrent()) {
    return { ...result, ok: false, ending: 'it succeeded without leaving what it should' };
  }
  return result;
}

/** What a reader needs who was not there: the command, how it ended, what it said, what to do. */
export function explain(result) {
  const output = `${result.stdout}${result.stderr}`;
  const advice = adviceFor(`${result.ending}\n${output}`);
  return [
    `command: ${result.command.join(' ').replaceAll(root, '')}`,
    `ended:   ${result.ending}`,
    tail(output, 80),
    `whole output: ${result.log}`,
    ...(advice ? [`what to do: ${advice}`] : []),
  ].join('\n');
}

/**
 * Makes whatever is missing, with a line for each thing that had to be made. Where one fails, says why and
 * ends the process with status 1.
 *
 * @param {object} [options]
 * @param {boolean} [options.peer] Also the peer executable (`peer`). Default: `false`.
 * @param {boolean} [options.tests] Also the compiled tests, benchmarks and examples under `out`. Default: `false`.
 * @param {NodeJS.WritableStream} [options.output] Where the lines go. Default: standard output.
 */
export async function ensure({ peer: withPeer = false, tests = false, output = process.stdout } = {}) {
  requirePlatform();
  const wanted = [steps.dependencies, steps.addon, steps.library];
  if (withPeer) wanted.push(steps.peer);
  if (tests) wanted.push(steps.tests);
  for (const step of wanted) {
    if (step.isCurrent()) continue;
    output.write(`${step.name} … `);
    const result = await make(step);
    output.write(`${result.ok ? '' : 'FAILED, '}${seconds(result.milliseconds)}\n`);
    if (!result.ok) {
      output.write(`${explain(result)}\n`);
      process.exit(1);
    }
  }
}

/** Ends the process where nothing here can work, with the reason. */
export function requirePlatform() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  const supported = major === 20 ? minor >= 19 : major === 22 ? minor >= 12 : major > 22;
  if (supported && process.platform === 'linux') return;
  process.stdout.write(
    process.platform === 'linux'
      ? `Node ${process.versions.node} is too old: ^20.19.0 || >=22.12.0 is needed.\n`
      : `userfaultfd(2) exists on Linux only; this is ${process.platform}.\n`,
  );
  process.exit(1);
}
