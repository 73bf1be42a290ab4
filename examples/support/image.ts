/** A memory image of real bytes: the programs and libraries of this machine, one behind the other. */

import { createHash } from 'node:crypto';
import {
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  realpathSync,
  renameSync,
  statSync,
  writeSync,
} from 'node:fs';
import { dirname, join } from 'node:path';

const CHUNK = 1 << 20;
const FOLDERS = ['/usr/bin', '/usr/lib', '/usr/sbin', '/usr/share', '/etc'];

/**
 * Makes `path` a file of exactly `size` bytes, unless it is one already. Written aside and renamed: an interrupted run
 * leaves nothing that looks complete.
 */
export function makeImage(path: string, size: number): void {
  if (statSync(path, { throwIfNoEntry: false })?.size === size) return;
  mkdirSync(dirname(path), { recursive: true });
  const unfinished = `${path}.${process.pid}`;
  const out = openSync(unfinished, 'w');
  const buffer = Buffer.alloc(CHUNK);
  let left = size;
  try {
    // As often as it takes on a small machine; each round starts at another byte, so that no two are alike.
    for (let round = 0; left > 0; round += 1) {
      const before = left;
      for (const file of files()) {
        left -= append(out, file, buffer, left, round);
        if (left === 0) break;
      }
      if (left === before) throw new Error(`no file of this machine could be read for ${path}`);
    }
  } finally {
    closeSync(out);
  }
  renameSync(unfinished, path);
}

function append(out: number, file: string, buffer: Buffer, most: number, skip: number): number {
  let input;
  try {
    input = openSync(file, 'r');
  } catch {
    return 0; // not ours to read
  }
  let written = 0;
  try {
    for (let at = skip; written < most;) {
      const read = readSync(input, buffer, 0, Math.min(buffer.length, most - written), at);
      if (read === 0) break;
      writeSync(out, buffer, 0, read);
      written += read;
      at += read;
    }
  } finally {
    closeSync(input);
  }
  return written;
}

/** This program, then the regular files below the system's folders. */
function* files(): Generator<string> {
  yield realpathSync(process.execPath);
  const folders = [...FOLDERS];
  for (let folder = folders.shift(); folder !== undefined; folder = folders.shift()) {
    let entries;
    try {
      entries = readdirSync(folder, { withFileTypes: true });
    } catch {
      continue; // not ours to list, or not there
    }
    for (const entry of entries) {
      const path = join(folder, entry.name);
      if (entry.isFile()) yield path;
      else if (entry.isDirectory()) folders.push(path);
    }
  }
}

/** SHA-256 of a file, in hexadecimal digits. */
export function sha256(path: string): string {
  return createHash('sha256').update(readFileSync(path)).digest('hex');
}
