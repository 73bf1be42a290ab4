// What a person gets who installs the package: the tarballs of the root and of this machine's platform package, installed
// into an empty folder outside the repository, with nothing on PATH but Node; then a real fault from ESM, CommonJS,
// TypeScript and a worker, under each supported Node, as root and as an ordinary user. Needs a built tree (`npm test` has).
//
//   --packaged    the binary that `npm run build:all` has put into its package, not that of the checkout

import { execFileSync, spawnSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  cpSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { nodeOf, npm, VERSIONS } from './consumer/nodes.mjs';
import { bin, root } from './paths.mjs';
import { check, conclude } from './release/checks.mjs';
import { hostPlatform, packPlatform, packRoot } from './release/stage.mjs';
import { checkSizes } from './release/sizes.mjs';
import { seconds } from './run.mjs';

/** From `npm install` to the end of a program that had a fault served. Measured 2 s; the promise is 5 s. */
const LONGEST_INSTALL = 5_000;
const NOBODY = 65_534;
const here = join(root, 'scripts/consumer');
const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-consumer-'));
process.once('exit', () => rmSync(folder, { force: true, recursive: true }));
// The ordinary user has to get in.
chmodSync(folder, 0o755);

/** The supported Nodes, each alone in a folder that serves as PATH. */
function nodes() {
  if (process.arch !== 'x64') process.stdout.write('only this Node: the lock file has those for x64\n');
  const programs = process.arch === 'x64' ? VERSIONS.map(nodeOf) : [process.execPath];
  return programs.map((program, index) => {
    const path = join(folder, `path-${index}`);
    mkdirSync(path);
    try {
      linkSync(program, join(path, 'node'));
    } catch {
      copyFileSync(program, join(path, 'node')); // another file system
    }
    chmodSync(join(path, 'node'), 0o755);
    return path;
  });
}

/** Runs a program of the consumer's under the Node in `path`. */
function run(path, args, { uid, cwd = project } = {}) {
  const user = uid === undefined ? {} : { uid, gid: uid };
  const result = spawnSync(join(path, 'node'), args, {
    cwd,
    encoding: 'utf8',
    env: { PATH: path, HOME: cwd, NAPI_RS_ENFORCE_VERSION_CHECK: '1' },
    timeout: 30_000,
    ...user,
  });
  const output = `${result.stdout}${result.stderr}`;
  return { ok: result.status === 0 && result.stderr === '', stdout: result.stdout, output };
}

function install(where, tarballs, extra = []) {
  mkdirSync(where);
  writeFileSync(join(where, 'package.json'), '{ "private": true, "type": "module" }\n');
  const result = spawnSync(
    process.execPath,
    [npm, 'install', '--no-audit', '--no-fund', '--prefer-offline', ...extra, ...tarballs],
    { cwd: where, encoding: 'utf8', env: { PATH: paths[0], HOME: process.env.HOME } },
  );
  return result.status === 0 ? '' : `${result.stdout}${result.stderr}` || `ended by ${result.signal}`;
}

function faults(path, what, program, user) {
  const { ok, stdout, output } = run(path, [program], user);
  const told = /^\{.*\}$/m.exec(stdout)?.[0];
  const problem = ok && told && JSON.parse(told).faults > 0 ? '' : output || 'no output';
  check(what, problem, told && `${JSON.parse(told).faults} faults, ${JSON.parse(told).kind}`);
}

function answersUnsupported(what, where, args, expected) {
  const { ok, stdout, output } = run(paths[0], [join(where, 'unsupported.mjs'), ...args], { cwd: where });
  const told = ok ? JSON.parse(stdout || '{}') : {};
  const right = told.code === 'ERR_UFFD_UNSUPPORTED_PLATFORM' && expected.test(told.hint);
  check(what, right ? '' : output, told.hint);
}

function tool(name, args, cwd = root) {
  const result = spawnSync(bin(name), args, {
    cwd,
    encoding: 'utf8',
    env: { ...process.env, NO_COLOR: '1' },
  });
  return result.status === 0 ? '' : `${result.stdout}${result.stderr}`;
}

const project = join(folder, 'project');
const platform = hostPlatform();
const rootTarball = packRoot(folder);
const { packaged } = parseArgs({ options: { packaged: { type: 'boolean', default: false } } }).values;
const platformTarball = packPlatform(platform, folder, packaged ? undefined : name => join(root, name));
// A checkout's own binary has more of the standard library in it than what is published (docs/DESIGN.md), and has to be no smaller.
checkSizes(packaged ? [rootTarball, platformTarball] : [rootTarball], check);
if (!packaged)
  process.stdout.write(`the binary of this checkout has ${(platformTarball.largest / 1000).toFixed(0)} kB\n`);
check('publint', tool('publint', ['--strict', rootTarball.folder]));
check('attw', tool('attw', ['--profile', 'esm-only', rootTarball.file]));

const paths = nodes();
const started = performance.now();
check('npm install', install(project, [rootTarball.file, platformTarball.file]));
cpSync(join(here, 'programs'), project, { recursive: true });
faults(paths[0], 'first fault', 'fault.mjs');
const took = performance.now() - started;
const late = took < LONGEST_INSTALL ? '' : `longer than ${seconds(LONGEST_INSTALL)}`;
check('from npm install to a served fault', late, seconds(took));

const types = install(join(folder, 'types'), [`@types/node@${readTypesVersion()}`]);
cpSync(join(folder, 'types/node_modules'), join(project, 'node_modules'), { recursive: true });
check('tsc (nodenext, strict)', types || tool('tsc', ['-p', join(project, 'tsconfig.json')]));

const users = process.getuid() === 0 ? [{}, { uid: NOBODY }] : [{}];
if (users.length === 1) process.stdout.write('only as this user: becoming another one needs root\n');
for (const path of paths) {
  const version = run(path, ['--version']).stdout.trim();
  for (const user of users) {
    const who = user.uid ?? process.getuid();
    for (const [kind, program] of Object.entries({
      ESM: 'fault.mjs',
      CommonJS: 'fault.cjs',
      TypeScript: 'compiled/fault.js',
      worker: 'worker.mjs',
      daemon: 'daemon.mjs',
    })) {
      faults(path, `Node ${version}, uid ${who}, ${kind}`, program, user);
    }
  }
}

// The command as npm has linked it, on what was installed: no repository, no compiler.
for (const [words, expected] of [
  [['doctor', '--role', 'pager'], /^yes +pager/m],
  [['bench', '--quick', '--json'], /"name": "handler"/],
]) {
  const { ok, stdout, output } = run(paths[0], [join(project, 'node_modules/.bin/userfaultfd'), ...words]);
  check(`userfaultfd ${words.join(' ')}`, ok && expected.test(stdout) ? '' : output || 'no output');
}

answersUnsupported('another platform', project, ['darwin'], /on Linux/);
const bare = join(folder, 'bare');
check('npm install without optional packages', install(bare, [rootTarball.file], ['--omit=optional']));
cpSync(join(here, 'programs'), bare, { recursive: true });
answersUnsupported('no binary', bare, [], /optional dependencies/);

function readTypesVersion() {
  return JSON.parse(
    execFileSync(process.execPath, ['-p', 'JSON.stringify(require("@types/node/package.json"))'], {
      cwd: root,
      encoding: 'utf8',
    }),
  ).version;
}

conclude('ok');
