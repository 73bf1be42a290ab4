// A list of checks that all run, whatever comes of one: a line each, and the sum at the end.

let failures = 0;

/**
 * Prints what came of a check.
 *
 * @param {string} what
 * @param {string} problem Empty where there is none.
 * @param {string} [detail] Printed either way.
 */
export function check(what, problem, detail = '') {
  process.stdout.write(`${what.padEnd(46)} ${problem ? 'FAILED' : 'ok'}${detail && `, ${detail}`}\n`);
  if (!problem) return;
  failures += 1;
  process.stdout.write(`${problem.trimEnd().replaceAll(/^/gm, '    ')}\n`);
}

/** Prints `good`, or how many failed, and sets the exit status. */
export function conclude(good) {
  process.stdout.write(`\n${failures === 0 ? good : `${failures} FAILED`}\n`);
  process.exitCode = failures === 0 ? 0 : 1;
}
