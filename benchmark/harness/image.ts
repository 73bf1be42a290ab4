/** Memory images, made once. */

import { closeSync, ftruncateSync, openSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { makeImage, sha256 } from '../../examples/support/image.js';
import { CACHE } from './tools.js';

/** A file, and the checksum that whoever has read it must come to. */
export interface Image {
  readonly path: string;
  readonly size: number;
  readonly sha256: string;
}

const known = new Map<string, Image>();

function remembered(path: string, size: number, make: () => void): Image {
  const before = known.get(path);
  if (before !== undefined) return before;
  make();
  const made = { path, size, sha256: sha256(path) };
  known.set(path, made);
  return made;
}

/** So many bytes of this machine's programs. */
export function image(size: number): Image {
  const path = join(CACHE, `image-${size >> 20}MiB.bin`);
  return remembered(path, size, () => makeImage(path, size));
}

/** A file with nothing in it but its size. */
export function sparseImage(size: number): Image {
  const path = join(CACHE, `sparse-${size >> 20}MiB.bin`);
  return remembered(path, size, () => {
    if (statSync(path, { throwIfNoEntry: false })?.size === size) return;
    const file = openSync(path, 'w');
    ftruncateSync(file, size);
    closeSync(file);
  });
}

/** A file of ones: each of its pages is the same. */
export function uniformImage(size: number): Image {
  const path = join(CACHE, `ones-${size >> 20}MiB.bin`);
  return remembered(path, size, () => {
    if (statSync(path, { throwIfNoEntry: false })?.size !== size) writeFileSync(path, Buffer.alloc(size, 1));
  });
}
