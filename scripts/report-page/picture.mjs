// Renews `docs/report.png`, the report page in the README, as a browser shows it: a session over a source that takes half a millisecond
// for each request replays what an earlier one wanted, and wants partly other pages. Needs a built library.

import { randomBytes } from 'node:crypto';
import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { call } from '../build-all/prefix.mjs';
import { dist, root } from '../paths.mjs';
import { look } from './browser.mjs';

const { callbackSource, MemoryMapping, MiB, Pager } = await import(
  pathToFileURL(join(dist, 'index.js')).href
);
const PAGE = 4096;
const image = randomBytes(256 * MiB);
const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-report-'));
process.once('exit', () => rmSync(folder, { force: true, recursive: true }));

const source = callbackSource(
  async (offset, length) => {
    await setTimeout(0.5);
    return image.subarray(offset, offset + length);
  },
  { size: image.length },
);

/** As a guest does that wakes up: programs at their own places, one after the other; then its kernel, and other things. */
function* wanted(others) {
  const programs = [17, 90, 133, 201].map((base, place) => [base, place]);
  // Not in the same order each time.
  if (others > 0) programs.reverse();
  for (const [base, place] of programs) {
    for (let index = 0; index < 60; index += 1) yield base * 256 + ((index * 7919 * (place + 3)) % 2500);
  }
  for (let page = 0; page < 48; page += 1) yield page * 64;
  for (let index = 0; index < others; index += 1) yield (index * 40_503 * 17) % (image.length / PAGE);
}

async function run(options, others) {
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(image.length);
  const session = await pager.serve(mapping, { source, ...options });
  for (const page of wanted(others)) await mapping.read(page * PAGE, 64);
  await session.stopRecording();
  await pager.close();
  mapping.close();
}

const [before, after] = ['before.trace', 'after.trace'].map(name => join(folder, name));
await run({ record: before }, 0);
await run({ record: after, replay: before }, 120);
const page = join(folder, 'report.html');
const command = [join(dist, 'src/cli/main.js'), 'report', after, '--replayed', before, '-o', page];
process.stdout.write(call(process.execPath, command));
look(page, folder);
copyFileSync(join(folder, 'desktop.png'), join(root, 'docs/report.png'));
