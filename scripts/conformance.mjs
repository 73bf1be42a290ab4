// `__test__/conformance.json`: every named case of the kernel's own tests and of other bindings' suites, with the test
// of ours that stands for it, or the reason why none does. A test that is named there has to have run, or has to have said
// why it could not here: such cases are counted.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';

/**
 * @typedef {{ file: string, title: string, row?: string } | { reason: string }} Case A test by its file and title (and the
 *   row of the table in it), or why there is none.
 * @typedef {Record<string, Record<string, Case>>} Conformance Cases by their names, by suite.
 */

/**
 * @param {Conformance} conformance
 * @param {import('./results.mjs').Ran[]} ran
 * @returns {{ cases: number, reasons: number, skipped: number, problems: string[] }}
 */
export function checkConformance(conformance, ran) {
  const known = new Map();
  for (const { file, title, row, skipped } of ran) {
    const names = known.get(file) ?? { titles: new Set(), rows: new Set(), skipped: new Set() };
    if (title !== undefined) names.titles.add(title);
    if (skipped) names.skipped.add(title);
    if (row !== undefined) names.rows.add(row);
    known.set(file, names);
  }
  const problems = [];
  let cases = 0;
  let reasons = 0;
  let skipped = 0;
  for (const [suite, entries] of Object.entries(conformance)) {
    if (Object.keys(entries).length === 0) problems.push(`${suite}: has no cases`);
    for (const [name, entry] of Object.entries(entries)) {
      cases += 1;
      const problem = problemOf(entry, known);
      if (problem) problems.push(`${suite} › ${name}: ${problem}`);
      else if (entry.reason) reasons += 1;
      else if (isSkipped(entry, known)) skipped += 1;
    }
  }
  return { cases, reasons, skipped, problems };
}

function problemOf({ file, title, row, reason }, known) {
  if (reason) return file || title ? 'has a test and a reason for having none' : undefined;
  if (!file || !title) return 'names neither a test nor a reason';
  const names = namesOf(file, known);
  if (!names?.titles.has(title)) return `no test "${title}" of ${file} has run`;
  if (row !== undefined && !names.rows.has(row) && !names.skipped.has(title)) {
    return `no row "${row}" of ${file} was answered`;
  }
  return undefined;
}

/** Whether its test said that it could not be carried out, or not all of it. */
function isSkipped({ file, title, row }, known) {
  const names = namesOf(file, known);
  return names.skipped.has(title) && !(row !== undefined && names.rows.has(row));
}

/** What cargo prints is relative to the crate. */
function namesOf(file, known) {
  return known.get(file) ?? known.get(file.replace(/^crates\/[^/]+\//, ''));
}

/** The check of this tree. */
export function checkTree(root, ran) {
  return checkConformance(JSON.parse(readFileSync(join(root, '__test__/conformance.json'), 'utf8')), ran);
}
