/**
 * Memory whose bytes a function makes up when they are first wanted: the table of all squares, of which nobody ever computes
 * more than is looked at.
 *
 *     node out/examples/javascript-source.js
 */

import process from 'node:process';

import { callbackSource, GiB, KiB, MemoryMapping, Pager } from 'userfaultfd';

const SIZE = 1 * GiB;
const ENTRY = 8;

let computed = 0;

/** Entry `index` is its square, 8 bytes. */
function squares(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let at = 0; at < length; at += ENTRY) {
    const index = BigInt((offset + at) / ENTRY);
    bytes.writeBigUInt64LE(index * index, at);
    computed += 1;
  }
  return bytes;
}

await using pager = Pager.create();
const mapping = MemoryMapping.anonymous(SIZE);
const source = callbackSource(squares, { size: SIZE, chunk: 64 * KiB });
const session = await pager.serve(mapping, { source });

for (const index of [3, 65_536, 99_999_999]) {
  // The function runs on this thread, so it must not wait here: read() waits elsewhere.
  const entry = await mapping.read(index * ENTRY, ENTRY);
  process.stdout.write(`${index} squared is ${entry.readBigUInt64LE()}\n`);
}
process.stdout.write(`${computed} of ${SIZE / ENTRY} squares were computed\n`);

await session.close({ rest: 'zero' });
source.close();
mapping.close();
