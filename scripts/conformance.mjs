// `__test__/conformance.json`: every named case of the kernel's own tests and of other bindings' suites, with the test
// of ours that stands for it, or the reason why none does. A test that is named there has to have run.

import { readdirSync, readFileSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';

/**
 * @typedef {{ file: string, title: string, row?: string } | { reason: string }} Case A test by its file and title (and the
 *   row of the table in it), or why there is none.
 * @typedef {Record<string, Record<string, Case>>} Conformance Cases by their names, by suite.
 */

/**
 * @param {Conformance} conformance
 * @param {import('./results.mjs').Ran[]} ran
 * @param {(file: string) => string} sourceOf The text of a test program.
 * @returns {{ cases: number, reasons: number, problems: string[] }}
 */
export function checkConformance(conformance, ran, sourceOf) {
  const problems = [];
  let cases = 0;
  let reasons = 0;
  for (const [suite, entries] of Object.entries(conformance)) {
    if (Object.keys(entries).length === 0) problems.push(`${suite}: has no cases`);
    for (const [name, entry] of Object.entries(entries)) {
      cases += 1;
      const problem = problemOf(entry, ran, sourceOf);
      if (problem) problems.push(`${suite} › ${name}: ${problem}`);
      if (entry.reason) reasons += 1;
    }
  }
  return { cases, reasons, problems };
}

function problemOf({ file, title, row, reason }, ran, sourceOf) {
  if (reason) return file || title ? 'has a test and a reason for having none' : undefined;
  if (!file || !title) return 'names neither a test nor a reason';
  // What cargo prints is relative to the crate.
  const isIt = test => test.title === title && (file === test.file || file.endsWith(`/${test.file}`));
  if (!ran.some(isIt)) return `no test "${title}" of ${file} has run`;
  if (row !== undefined && !sourceOf(file).includes(row)) return `${file} has no row "${row}"`;
  return undefined;
}

/** Test programs of several files have a folder of their own. */
function readSources(root, file) {
  const path = join(root, file);
  if (!file.endsWith('/main.rs')) return readFileSync(path, 'utf8');
  const folder = dirname(path);
  const files = readdirSync(folder).filter(name => statSync(join(folder, name)).isFile());
  return files.map(name => readFileSync(join(folder, name), 'utf8')).join('\n');
}

/** The check of this tree. */
export function checkTree(root, ran) {
  const conformance = JSON.parse(readFileSync(join(root, '__test__/conformance.json'), 'utf8'));
  return checkConformance(conformance, ran, file => readSources(root, file));
}
