// Examples of pagers and sources, each run as a person would.

import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import test from 'ava';

import { canRun } from './helpers/serving.js';

/** What each of them says. */
const SAYS: Record<string, RegExp[]> = {
  'file-as-memory': [
    /^the first, the middle and the last byte are 127, \d+, \d+$/m,
    /^3 faults brought \d+ of \d+ KiB$/m,
  ],
  'javascript-source': [
    /^3 squared is 9$/m,
    /^65536 squared is 4294967296$/m,
    /^99999999 squared is 9999999800000001$/m,
    /^24576 of 134217728 squares/m,
  ],
  'http-source': [
    /^at 5 MiB there is 5242880, after 1 request$/m,
    /^all of it is the same$/m,
    /^32 chunks took 35 requests$/m,
  ],
  swap: [
    /^256 pages are in memory$/m,
    /^25[56] pages are out, [01] in memory, \d{4,5} bytes instead of 104\d+$/m,
    /^page 100 says "this is page 100", after 1 fault$/m,
    /^page 7 says "this was page 7;", the last one "THIS is page 255"$/m,
    /^253 pages are still out$/m,
  ],
  'dirty-tracking': [
    /^snapshot 0: 2 pages/m,
    /^snapshot 1: 3 pages/m,
    /^snapshot 2: 0 pages/m,
    /^the base with its diffs is the same$/m,
  ],
  'pager-in-worker': [/^the first words of 64 chunks come to 2016$/m, /^the worker answered \d+ faults$/m],
};

for (const [name, says] of Object.entries(SAYS)) {
  test(`examples/${name}.ts does what it says`, async t => {
    if (!canRun(t)) return;
    const path = fileURLToPath(new URL(`../examples/${name}.js`, import.meta.url));
    const { stdout } = await promisify(execFile)(process.execPath, [path], { timeout: 60_000 });
    for (const line of says) t.regex(stdout, line);
  });
}
