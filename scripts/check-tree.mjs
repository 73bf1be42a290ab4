// What may not be in the tree: paths of somebody's machine, binaries, source files that hold two concerns.

import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { root } from './paths.mjs';

/** Lines; a file above it is split by concern. */
const LONGEST_SOURCE = 450;
/** Pictures of the documents, which cannot be text; bytes. */
const PICTURE = /^docs\/[\w-]+\.png$/;
const LARGEST_PICTURE = 150_000;
const MACHINE_PATH = /(?:^|[\s"'`(=:])\/(?:home|root|work|Users)\/[\w.]/;
const SOURCE = /^(?:src\/.*\.ts|crates\/[^/]+\/src\/.*\.rs)$/;
const LOCK = /(?:^|\/)(?:package-lock\.json|Cargo\.lock)$/;

const problems = [];
const files = execFileSync('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], {
  cwd: root,
  encoding: 'utf8',
});
for (const file of files.split('\0').filter(Boolean)) {
  let text;
  try {
    text = readFileSync(join(root, file));
  } catch {
    continue; // removed, and git does not know it yet
  }
  if (PICTURE.test(file)) {
    if (text.length > LARGEST_PICTURE)
      problems.push(`${file}: ${text.length} bytes, more than ${LARGEST_PICTURE}`);
    continue;
  }
  if (text.includes(0)) {
    problems.push(`${file}: a binary file`);
    continue;
  }
  const lines = text.toString('utf8').split('\n');
  const at = LOCK.test(file) ? -1 : lines.findIndex(line => MACHINE_PATH.test(line));
  if (at !== -1) problems.push(`${file}:${at + 1}: a path of one machine`);
  if (SOURCE.test(file) && lines.length > LONGEST_SOURCE)
    problems.push(`${file}: ${lines.length} lines, more than ${LONGEST_SOURCE}`);
}
for (const problem of problems) process.stdout.write(`${problem}\n`);
process.exitCode = problems.length > 0 ? 1 : 0;
