// Whether a build's result still fits its sources. Sizes and times of every input are compared with those
// seen when the last build *began*: an edit made during a build, a file that went away and a checkout of
// something older all count, which "newer than the result" would miss.

import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { root, stamps } from './paths.mjs';

/** Every file under the given files and folders; what does not exist is left out. */
function filesUnder(path) {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (stat === undefined) return [];
  if (!stat.isDirectory()) return [{ path, stat }];
  return readdirSync(path)
    .toSorted()
    .flatMap(name => filesUnder(join(path, name)));
}

/**
 * A digest of the state of `paths`, relative to the root; a folder stands for all files under it.
 * @param {string[]} paths
 */
export function stateOf(paths) {
  const hash = createHash('sha256');
  for (const { path, stat } of paths.flatMap(input => filesUnder(join(root, input)))) {
    hash.update(`${path}\0${stat.size}\0${stat.mtimeMs}\n`);
  }
  return hash.digest('hex');
}

const stampFile = id => join(stamps, `${id}.stamp`);

/**
 * Whether the last build called `id` saw `inputs` as they are now, and left `outputs` as they are now.
 * @param {string} id
 * @param {{ inputs: string, outputs: string }} states From `stateOf`.
 */
export function isCurrent(id, { inputs, outputs }) {
  try {
    return readFileSync(stampFile(id), 'utf8') === `${inputs} ${outputs}\n`;
  } catch (error) {
    if (error.code === 'ENOENT') return false;
    throw error;
  }
}

/** Remembers a build that succeeded. */
export function record(id, { inputs, outputs }) {
  mkdirSync(dirname(stampFile(id)), { recursive: true });
  writeFileSync(stampFile(id), `${inputs} ${outputs}\n`);
}

/** Forgets the last build: an interrupted one must not pass for it. */
export function forget(id) {
  rmSync(stampFile(id), { force: true });
}
