// Reading what test programs print. The rule in all of them: nothing that went wrong may look like nothing,
// so output that stops early counts as a failure, and a test that printed `skipped: <reason>` counts as
// skipped, not as passed.

/**
 * @typedef {object} Results
 * @property {number} passed
 * @property {number} failed
 * @property {{ test: string, reason: string }[]} skipped One entry for each test; its reasons are joined.
 * @property {string[]} failures What the failed ones printed, ready to be shown.
 * @property {Ran[]} ran Every test that ran, whatever came of it.
 * @property {boolean} [cut] The output stops before its end, so that what went wrong may stand elsewhere.
 */

/**
 * @typedef {{ file: string, title?: string, row?: string, skipped?: boolean }} Ran A test, or a row of a table: its file, as
 *   far as the output tells it, and its title, or what it printed as `row: <name>`; whether it said that it skipped something.
 */

// With one test at a time, what its children write to fd 2 lands behind the harness's `test <name> ... `.
const SKIPPED = /^(?:test \S+ \.\.\. )?\s*skipped: (.+)$/;

const ROW = /^(?:test \S+ \.\.\. )?row: (.+)$/;

/** Cargo's heading of a test program's output. As narrow as it is, because tests print too. */
const PROGRAM = /^ {5}(?=Running .+-[0-9a-f]{16}\)$)|^ {3}(?=Doc-tests \S+$)/m;

/**
 * Reads the output of `cargo test --no-fail-fast -- --show-output`, stdout and stderr in one text. With that option
 * the harness keeps each test's output apart, so that a reason can be told to belong to a test that passed.
 *
 * @param {string} text
 * @returns {Results}
 */
export function readCargoTest(text) {
  const results = { passed: 0, failed: 0, skipped: [], failures: [], ran: [] };
  // One part for each test program; what stands before the first is the compiler's.
  const [, ...programs] = text.split(PROGRAM);
  for (const program of programs) readTestProgram(program, results);
  return results;
}

/** What one test program, named in the first line of `text`, adds to `results`. */
function readTestProgram(text, results) {
  const [title, ...lines] = text.split('\n');
  const name = title.replace(/^Running (.+) \((?:.*\/)?([^/]+)-[0-9a-f]{16}\)$/, '$2 ($1)');
  const file = /^Running (?:unittests )?(\S+) /.exec(title)?.[1] ?? title;
  let passed = 0;
  let failed = 0;
  let finished = false;
  let section;
  let test;
  const reasons = new Map();
  for (const line of lines) {
    const heading = /^(successes|failures):$/.exec(line);
    const owner = /^---- (.+) stdout ----$/.exec(line);
    const ignored = /^test (.+) \.\.\. ignored(?:, (.+))?$/.exec(line);
    const result = /^test result: \w+\. (\d+) passed; (\d+) failed;/.exec(line);
    const reason = SKIPPED.exec(line);
    const started = ignored ? undefined : /^test (\S+) \.\.\. /.exec(line)?.[1];
    if (started) results.ran.push({ file, title: started });
    const row = ROW.exec(line)?.[1];
    if (row) results.ran.push({ file, row });
    if (heading) {
      section = heading[1];
      test = undefined;
    } else if (owner) {
      test = owner[1].replace(/ - should panic$/, '');
    } else if (ignored) {
      results.skipped.push({ test: `${name}: ${ignored[1]}`, reason: ignored[2] ?? 'ignored' });
    } else if (result) {
      passed += Number(result[1]);
      failed += Number(result[2]);
      finished = true;
      section = undefined;
      test = undefined;
    } else if (reason && section !== 'failures') {
      // Outside a section it came from a process that the test started: the harness cannot say whose.
      const key = test ?? 'a process that a test started';
      reasons.set(key, [...(reasons.get(key) ?? []), reason[1]]);
    }
  }
  for (const [key, texts] of reasons) {
    results.skipped.push({ test: `${name}: ${key}`, reason: texts.join('; ') });
    results.ran.push({ file, title: key, skipped: true });
  }
  results.passed += Math.max(0, passed - reasons.size);
  results.failed += failed;
  if (failed > 0) results.failures.push(`${name}\n${failureSections(text)}`);
  if (!finished) {
    results.failed += 1;
    results.failures.push(`${name}: ended without a result\n${lastLines(text, 60)}`);
  }
}

/** The part of a test program's output that is about its failed tests. */
function failureSections(text) {
  return text
    .split(/^(?=successes:$|failures:$)/m)
    .filter(part => part.startsWith('failures:'))
    .join('')
    .trimEnd();
}

/**
 * Reads TAP as ava writes it: a line for each test, its log as comments under it, its error as indented YAML.
 * @param {string} text
 * @returns {Results}
 */
export function readTap(text) {
  const results = { passed: 0, failed: 0, skipped: [], failures: [], ran: [] };
  let todo = 0;
  for (const block of text.split(/^(?=(?:not )?ok\b|1\.\.|# tests )/m)) {
    const [, not, test, directive] =
      /^(not )?ok\b(?: \d+)?(?: - )?(.*?)(?: # (SKIP|TODO)\b.*)?$/m.exec(block) ?? [];
    if (test === undefined || !/^(?:not )?ok\b/.test(block)) continue;
    const [, spec, title] = /^(\S+) › (.*)$/.exec(test) ?? [undefined, '', test];
    const reasons = block
      .split('\n')
      .flatMap(line => SKIPPED.exec(/^#\s+(?:ℹ\s+)?(.*)$/.exec(line)?.[1] ?? '')?.[1] ?? []);
    if (!directive) {
      const skipped = reasons.length > 0;
      results.ran.push({ file: `__test__/${spec}.spec.ts`, title, ...(skipped ? { skipped } : {}) });
    }
    if (directive) {
      if (directive === 'TODO') todo += 1;
      results.skipped.push({ test, reason: directive === 'TODO' ? 'not written' : 'marked as skipped' });
    } else if (not) {
      results.failed += 1;
      results.failures.push(block.trimEnd());
    } else if (reasons.length > 0) {
      results.skipped.push({ test, reason: reasons.join('; ') });
    } else {
      results.passed += 1;
    }
  }
  // Tests that a dead process took with it have no line of their own: only the sum at the end knows them.
  const failedInSum = Number(/^# fail (\d+)$/m.exec(text)?.[1] ?? 0) - todo;
  if (failedInSum > results.failed) {
    results.failures.push(`${failedInSum - results.failed} tests were never run to an end`);
    results.failed = failedInSum;
  }
  if (!/^1\.\.\d+$/m.test(text)) {
    results.failed += 1;
    results.cut = true;
    results.failures.push('the output stops before its end');
  }
  return results;
}

const lastLines = (text, count) => text.trimEnd().split('\n').slice(-count).join('\n');
