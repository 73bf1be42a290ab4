// The Nodes that the npm registry carries, and whatever else is installed by a lock file into a folder of `.cache`.

import { execFileSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, realpathSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { root } from '../paths.mjs';

/** Node's major versions that are supported. */
export const VERSIONS = ['20', '22', '24', '26'];

/** Where npm itself is: as a program of Node, it needs nothing on PATH. */
export const npm =
  process.env.npm_execpath ??
  [join(dirname(realpathSync(process.execPath)), '../lib/node_modules/npm/bin/npm-cli.js')].find(
    existsSync,
  ) ??
  realpathSync(execFileSync('sh', ['-c', 'command -v npm'], { encoding: 'utf8' }).trim());

/** Installs what the lock file in `source` says into `folder`, unless it is there. */
export function npmCi(source, folder) {
  const lock = 'package-lock.json';
  const current = join(folder, lock);
  const wanted = readFileSync(join(source, lock), 'utf8');
  const done = join(folder, 'node_modules/.package-lock.json');
  if (existsSync(done) && existsSync(current) && readFileSync(current, 'utf8') === wanted) return;
  mkdirSync(folder, { recursive: true });
  for (const file of ['package.json', lock]) copyFileSync(join(source, file), join(folder, file));
  execFileSync(process.execPath, [npm, 'ci', '--ignore-scripts', '--prefer-offline', '--silent'], {
    cwd: folder,
  });
}

/** The executable of a major version; of this process's own where the lock file has none for this machine. */
export function nodeOf(version) {
  if (process.arch !== 'x64') return process.execPath;
  const folder = join(root, '.cache/nodes');
  npmCi(join(root, 'scripts/consumer'), folder);
  return join(folder, 'node_modules', `node-${version}`, 'bin/node');
}
