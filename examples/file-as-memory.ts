/**
 * A file as memory: nothing of it is read until it is touched, and only what lies around that. (Where the file is local and this
 * program alone wants it, `MemoryMapping.file()` is the faster way: the kernel has it in its cache. This one works for whatever
 * a source can be.)
 *
 *     node out/examples/file-as-memory.js [FILE]
 */

import { statSync } from 'node:fs';
import process from 'node:process';

import { fileSource, MemoryMapping, Pager } from 'userfaultfd';

const [path = process.execPath] = process.argv.slice(2);
const PAGE = 4096;
// Whole pages: what is behind the last one is not served.
const size = Math.floor(statSync(path).size / PAGE) * PAGE;

await using pager = Pager.create();
const mapping = MemoryMapping.anonymous(size);
const session = await pager.serve(mapping, { source: fileSource(path) });

// A native thread answers, so that this one may touch the memory itself.
const bytes = mapping.view(0, size);
const some = [0, Math.floor(size / 2), size - 1].map(offset => bytes[offset]);

const { faults, bytesInstalled } = session.stats();
process.stdout.write(`the first, the middle and the last byte are ${some.join(', ')}\n`);
process.stdout.write(`${faults} faults brought ${bytesInstalled >> 10} of ${size >> 10} KiB\n`);

await session.close({ rest: 'zero' });
mapping.close();
