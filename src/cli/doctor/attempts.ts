/**
 * What is tried, each in the same words whether it worked or not. Tried in a process of its own: a seccomp filter may kill
 * whoever makes the call.
 */

import { spawnSync } from 'node:child_process';
import process from 'node:process';
import { fileURLToPath } from 'node:url';

import { UffdError } from '../../errors.js';
import { UserfaultfdFactory } from '../../factory.js';
import { native } from '../../native.js';
import { exhausted } from './exhaustion.js';

/**
 * - `device`: a userfaultfd that sees all faults, through /dev/userfaultfd.
 * - `syscall`: the same by userfaultfd(2).
 * - `user`: one that sees faults of user mode only, by userfaultfd(2).
 * - `pidfd`: watching and killing a process without mistaking it (pidfd_open(2)).
 */
export const ATTEMPTS = ['device', 'syscall', 'user', 'pidfd'] as const;
export type Attempt = (typeof ATTEMPTS)[number];

/** How it went: it worked; errno; or the signal that ended the process that tried. */
export type Outcome = { ok: true } | { ok: false; errno?: number; signal?: string };

/** What came of each. */
export type Outcomes = { [name in Attempt]: Outcome };

const TRIES: { [name in Attempt]: () => Outcome } = {
  device() {
    using factory = UserfaultfdFactory.open();
    const errno = factory.deviceErrno;
    return errno === undefined ? created(factory, 'all') : { ok: false, errno };
  },
  syscall() {
    using factory = UserfaultfdFactory.syscallOnly();
    return created(factory, 'all');
  },
  user() {
    using factory = UserfaultfdFactory.syscallOnly();
    return created(factory, 'user');
  },
  pidfd() {
    const { error } = native().NativeProcess.open(process.pid);
    return error ? failed(error.errno) : { ok: true };
  },
};

function created(factory: UserfaultfdFactory, faults: 'all' | 'user'): Outcome {
  try {
    factory.create({ faults }).close();
    return { ok: true };
  } catch (error) {
    if (error instanceof UffdError) return failed(error.errno);
    throw error;
  }
}

function failed(errno: number | undefined): Outcome {
  return errno === undefined ? { ok: false } : { ok: false, errno };
}

/** Tries these, and tells of each as soon as it is known. The program of the process that tries. */
export function attempt(names: readonly string[], tell: (line: string) => void): void {
  for (const name of ATTEMPTS) {
    if (names.includes(name)) tell(`${JSON.stringify({ name, outcome: TRIES[name]() })}\n`);
  }
}

const PROGRAM = fileURLToPath(new URL('attempt.js', import.meta.url));

/** Tries everything. */
export function attemptAll(): Outcomes {
  const outcomes: Partial<Outcomes> = {};
  let left = ATTEMPTS.filter(() => true);
  while (left.length > 0) {
    const { stdout, signal, error, status, stderr } = spawnSync(process.execPath, [PROGRAM, ...left], {
      encoding: 'utf8',
      timeout: 30_000,
    });
    if (error) return exhausted(error);
    for (const line of stdout.split('\n').filter(Boolean)) {
      const { name, outcome } = JSON.parse(line) as { name: Attempt; outcome: Outcome };
      outcomes[name] = outcome;
    }
    left = left.filter(name => outcomes[name] === undefined);
    const [culprit] = left;
    if (culprit === undefined) break;
    // It could be started, but could not read its program.
    if (signal === null) return exhausted(new Error(`trying ended with status ${status}: ${stderr}`));
    // Without a word about it: this was the one that it did not survive.
    outcomes[culprit] = { ok: false, signal };
    left = left.slice(1);
  }
  return outcomes as Outcomes;
}
