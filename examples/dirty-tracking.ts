/**
 * Snapshots of running memory, each with what has changed since the one before: writes are tracked by write-protection, and
 * a sparse diff is written for each snapshot. In the end the diffs are layered over the first image and compared.
 *
 *     node out/examples/dirty-tracking.js
 */

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';

import { fileSource, layeredSource, MemoryMapping, MiB, Pager, type Session } from 'userfaultfd';

const PAGE = 4096;
const SIZE = 4 * MiB;
const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
const base = join(folder, 'base');
writeFileSync(base, Buffer.alloc(SIZE, 'as it was in the beginning; '));

/** Writes what has changed to a sparse file; how many pages that is. */
async function snapshot(session: Session, memory: MemoryMapping, path: string): Promise<number> {
  const file = await open(path, 'w');
  await file.truncate(SIZE);
  let pages = 0;
  for (let more = true; more;) {
    const dirty = await session.takeDirty({ maxRanges: 1024 });
    for (const { sourceOffset = 0, length } of dirty.ranges) {
      await file.write(await memory.read(sourceOffset, length), 0, length, sourceOffset);
      pages += length / PAGE;
    }
    more = dirty.more;
  }
  await file.close();
  return pages;
}

await using pager = Pager.create();
const memory = MemoryMapping.anonymous(SIZE, { pages: 'small' });
const session = await pager.serve(memory, { source: fileSource(base), modes: ['missing', 'write-protect'] });
const diffs: string[] = [];
for (const [round, offsets] of [[3, 700 * PAGE], [3, 5, 6], []].entries()) {
  for (const at of offsets) await memory.write(at < PAGE ? at * PAGE : at, Buffer.from(`round ${round}`));
  const path = join(folder, `diff-${round}`);
  const pages = await snapshot(session, memory, path);
  diffs.push(path);
  process.stdout.write(`snapshot ${round}: ${pages} pages were written to\n`);
}
const now = await memory.read(0, SIZE);
await session.close({ rest: 'zero' });
memory.close();

const restored = MemoryMapping.anonymous(SIZE);
const again = await pager.serve(restored, { source: layeredSource(fileSource(base), diffs) });
const same = (await restored.read(0, SIZE)).equals(now);
process.stdout.write(`the base with its diffs is ${same ? 'the same' : 'NOT the same'}\n`);
await again.close({ rest: 'zero' });
restored.close();
rmSync(folder, { recursive: true });
