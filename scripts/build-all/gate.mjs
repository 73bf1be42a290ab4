// What a binary must be before it is published: of its machine, in need of nothing but the C library, no newer than the
// oldest one promised, small, and loadable.

import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { out, root } from '../paths.mjs';
import { LARGEST_BINARY } from '../release/sizes.mjs';
import { GLIBC_FLOOR, TARGETS } from './targets.mjs';

const readelf = (...args) => execFileSync('readelf', args, { encoding: 'utf8', maxBuffer: 64 * 1024 * 1024 });

const newer = (a, b) => {
  const [left, right] = [a, b].map(version => version.split('.').map(Number));
  for (let i = 0; i < Math.max(left.length, right.length); i += 1) {
    const difference = (left[i] ?? 0) - (right[i] ?? 0);
    if (difference !== 0) return difference > 0;
  }
  return false;
};

/**
 * What `readelf` says of a binary.
 * @param {string} file
 */
export function inspect(file) {
  const versions = [...readelf('-WV', file).matchAll(/Name: GLIBC_([\d.]+)/g)].map(([, version]) => version);
  // Name last, its version after an `@`. Strong without a version: the loader would have to find it by luck.
  const undefinedSymbols = readelf('-W', '--dyn-syms', file)
    .split('\n')
    .filter(line => / UND \S/.test(line) && !/ WEAK /.test(line))
    .map(line => line.slice(line.indexOf(' UND ') + 5).trim());
  return {
    bytes: statSync(file).size,
    machine: /Machine:\s+(.*)/.exec(readelf('-h', file))?.[1]?.trim(),
    needed: [...readelf('-d', file).matchAll(/\(NEEDED\).*\[(.*)\]/g)].map(([, name]) => name),
    glibc: versions.reduce((highest, version) => (newer(version, highest) ? version : highest), '0'),
    unversioned: undefinedSymbols.filter(name => !name.includes('@')),
  };
}

/**
 * What is wrong with the binary of `target`, except for loading it.
 * @param {ReturnType<typeof inspect>} found
 * @returns {string[]}
 */
export function problemsOf(target, found) {
  const { machine, needed, libc } = TARGETS[target];
  const problems = [];
  if (found.machine !== machine) problems.push(`is for ${found.machine}, not for ${machine}`);
  for (const name of found.needed) {
    if (!needed.test(name)) problems.push(`needs ${name}`);
  }
  if (libc === 'gnu' && found.glibc === '0') problems.push('has no symbol of glibc');
  if (libc === 'gnu' && newer(found.glibc, GLIBC_FLOOR)) {
    problems.push(`needs glibc ${found.glibc}, newer than ${GLIBC_FLOOR}`);
  }
  if (libc === 'gnu' && found.unversioned.length > 0) {
    problems.push(`symbols that glibc ${GLIBC_FLOOR} does not have: ${found.unversioned.join(', ')}`);
  }
  if (libc === 'musl' && found.glibc !== '0') problems.push(`has symbols of glibc ${found.glibc}`);
  if (found.bytes > LARGEST_BINARY) problems.push(`has ${found.bytes} bytes, more than ${LARGEST_BINARY}`);
  return problems;
}

/**
 * Has real faults served by the binary, and gives how many; fails where they are not, or not right.
 *
 * @param {string} file
 * @param {string[]} node The Node for its libc.
 */
export function faults(file, node) {
  // Inside of the package, so that it is reached by its own name.
  const program = join(out, 'fault.mjs');
  mkdirSync(out, { recursive: true });
  copyFileSync(join(root, 'scripts/consumer/programs/fault.mjs'), program);
  const [command, ...args] = [...node, program];
  const env = { ...process.env, NAPI_RS_NATIVE_LIBRARY_PATH: file };
  return JSON.parse(execFileSync(command, args, { encoding: 'utf8', env, timeout: 60_000 })).faults;
}

/**
 * Loads an addon, or starts the executable, of `target` in the nearest thing to its home that this machine can run, and gives what that was.
 * Fails where it does not load.
 *
 * @param {object} tools
 * @param {string} tools.prefix The folder of `prefix.mjs`.
 * @param {string} tools.nodeArm64 A Node for arm64.
 * @param {string} tools.loader A program that loads an addon, for this target.
 */
export function load(target, file, { prefix, nodeArm64, loader }) {
  const { platform } = TARGETS[target];
  const isAddon = file.endsWith('.node');
  const qemu = join(prefix, 'usr/bin/qemu-aarch64-static');
  const musl = machine =>
    join(prefix, `musl-${machine === 'x86_64' ? 'x64' : 'arm64'}`, `lib/ld-musl-${machine}.so.1`);
  const script = `process.stdout.write(String(require(${JSON.stringify(file)}).pageSize()))`;
  // The executable is started, and says its version; for musl it has its libc in it.
  const started = /^userfaultfd-pagerd \d/;
  const ways = isAddon
    ? {
        'linux-x64-gnu': ['Node', [process.execPath, '-e', script], /^4096$/],
        'linux-arm64-gnu': [
          'Node, emulated',
          [qemu, '-L', join(prefix, 'arm64'), nodeArm64, '-e', script],
          /^4096$/,
        ],
        'linux-x64-musl': ['musl', [musl('x86_64'), loader, file], /^loaded$/],
        'linux-arm64-musl': ['musl, emulated', [qemu, musl('aarch64'), loader, file], /^loaded$/],
      }
    : {
        'linux-x64-gnu': ['this machine', [file, '--version'], started],
        'linux-arm64-gnu': ['emulation', [qemu, '-L', join(prefix, 'arm64'), file, '--version'], started],
        'linux-x64-musl': ['this machine', [file, '--version'], started],
        'linux-arm64-musl': ['emulation', [qemu, file, '--version'], started],
      };
  const [name, [program, ...args], expected] = ways[platform];
  const output = execFileSync(program, args, { encoding: 'utf8', timeout: 120_000 }).trim();
  if (!expected.test(output)) throw new Error(`loading it in ${name} gave ${JSON.stringify(output)}`);
  return name;
}
