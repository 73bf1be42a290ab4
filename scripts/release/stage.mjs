// The packages as they are published, made in folders of their own: the root with its platform packages as optional
// dependencies (which its package.json in the repository does not have, because a checkout builds its own binary), and
// the platform packages with their binaries.

import { execFileSync } from 'node:child_process';
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { binariesOf } from '../build-all/targets.mjs';
import { root } from '../paths.mjs';
import { notices } from './notices.mjs';

const NOTICES = 'THIRD-PARTY-LICENSES';

const readJson = path => JSON.parse(readFileSync(path, 'utf8'));
const writeJson = (path, value) => writeFileSync(path, `${JSON.stringify(value, undefined, 2)}\n`);

/** The platform packages: `linux-x64-gnu` and so on. */
export const platforms = () => readdirSync(join(root, 'npm')).toSorted();

/** The platform of this process. */
export function hostPlatform() {
  const glibc = process.report.getReport().header.glibcVersionRuntime;
  return `linux-${process.arch}-${glibc ? 'gnu' : 'musl'}`;
}

/** `npm pack` of `folder`: what would be in the tarball, which is written to `destination` unless there is none. */
function npmPack(folder, destination) {
  const where = destination ? ['--pack-destination', destination] : ['--dry-run'];
  const output = execFileSync('npm', ['pack', '--json', '--ignore-scripts', '--silent', ...where], {
    cwd: folder,
    encoding: 'utf8',
  });
  return JSON.parse(output)[0];
}

/**
 * A package's tarball.
 * @typedef {object} Tarball
 * @property {string} name The package.
 * @property {string} version
 * @property {string} file The tarball.
 * @property {string} folder What it was made of.
 * @property {number} size Bytes of the tarball.
 * @property {number} unpackedSize Bytes of the files in it.
 * @property {number} largest Bytes of the largest of them.
 * @property {string[]} files Their paths.
 */

/** @returns {Tarball} */
function pack(folder, destination) {
  const { name, version, filename, size, unpackedSize, files } = npmPack(folder, destination);
  return {
    name,
    version,
    file: join(destination, filename),
    folder,
    size,
    unpackedSize,
    largest: Math.max(...files.map(({ size: bytes }) => bytes)),
    files: files.map(({ path }) => path),
  };
}

/** Packs the root package into `destination`. */
export function packRoot(destination) {
  const folder = join(destination, 'stage', 'root');
  for (const { path } of npmPack(root).files) {
    mkdirSync(dirname(join(folder, path)), { recursive: true });
    copyFileSync(join(root, path), join(folder, path));
  }
  const description = readJson(join(root, 'package.json'));
  description.optionalDependencies = Object.fromEntries(
    platforms().map(platform => [`${description.napi.packageName}-${platform}`, description.version]),
  );
  // Of use in a checkout only.
  delete description.devDependencies;
  delete description.ava;
  delete description.scripts;
  writeJson(join(folder, 'package.json'), description);
  return pack(folder, destination);
}

/**
 * Packs a platform package into `destination`.
 * @param {(name: string) => string} [place] Where its binaries are. Default: in the package's folder.
 */
export function packPlatform(platform, destination, place = name => join(root, 'npm', platform, name)) {
  const source = join(root, 'npm', platform);
  const folder = join(destination, 'stage', platform);
  cpSync(source, folder, { recursive: true });
  for (const name of binariesOf(platform)) {
    if (!existsSync(place(name))) throw new Error(`${place(name)} is missing: npm run build:all`);
    copyFileSync(place(name), join(folder, name));
  }
  copyFileSync(join(root, 'LICENSE'), join(folder, 'LICENSE'));
  writeFileSync(join(folder, NOTICES), notices());
  const description = readJson(join(folder, 'package.json'));
  description.files.push(NOTICES);
  writeJson(join(folder, 'package.json'), description);
  return pack(folder, destination);
}
