/**
 * A compressed file as memory: blocks of 64 KiB, each decompressed when one of its pages is first touched.
 *
 *     node out/examples/lazy-file.js
 */

import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { promisify } from 'node:util';
import { deflateSync, inflate } from 'node:zlib';

import { KiB, MemoryMapping, MiB, Userfaultfd } from 'userfaultfd';

const BLOCK = 64 * KiB;
const SIZE = 8 * MiB;

/** Writes the blocks one behind the other; where each begins. */
function compress(path: string, bytes: Buffer): number[] {
  const blocks = Array.from({ length: SIZE / BLOCK }, (_, index) =>
    deflateSync(bytes.subarray(index * BLOCK, (index + 1) * BLOCK)),
  );
  writeFileSync(path, Buffer.concat(blocks));
  const starts = [0];
  for (const block of blocks) starts.push((starts.at(-1) ?? 0) + block.length);
  return starts;
}

async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  const path = join(folder, 'file');
  const text = 'every block of this file is another one, and is only read when it is wanted; ';
  const bytes = Buffer.alloc(SIZE, text);
  for (let at = 0; at < SIZE; at += BLOCK) bytes.writeUInt32LE(at, at);
  const starts = compress(path, bytes);
  const file = await open(path);

  const uffd = Userfaultfd.create();
  const mapping = MemoryMapping.anonymous(SIZE, { pages: 'small' });
  uffd.register(mapping.range(), { modes: ['missing'] });
  let decompressed = 0;
  const handler = uffd.createHandler({
    async fault(fault) {
      const { offset = 0 } = fault;
      const block = Math.floor(offset / BLOCK);
      const [start = 0, end = 0] = starts.slice(block, block + 2);
      const { buffer } = await file.read(Buffer.alloc(end - start), 0, end - start, start);
      decompressed += 1;
      // The page that is waited for, and those behind it.
      const plain = await promisify(inflate)(buffer);
      return fault.copy(plain.subarray(offset % BLOCK));
    },
  });

  const some = await mapping.read(3 * BLOCK, 4);
  process.stdout.write(
    `block 3 begins with ${some.readUInt32LE()}, ${decompressed} of ${SIZE / BLOCK} are there\n`,
  );
  const all = await mapping.read(0, SIZE);
  const same = createHash('sha256').update(all).digest().equals(createHash('sha256').update(bytes).digest());
  process.stdout.write(
    `all of it was decompressed from ${statSync(path).size} bytes in ${decompressed} steps\n`,
  );
  process.stdout.write(`it is ${same ? 'the same' : 'NOT the same'}\n`);
  await handler.close();
  mapping.close();
  await file.close();
  rmSync(folder, { recursive: true });
}

await main();
