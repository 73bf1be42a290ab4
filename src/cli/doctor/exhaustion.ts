/** Where no descriptor is free nothing can be tried: that is what came of each attempt. */

import { constants } from 'node:os';

import type { Outcome, Outcomes } from './attempts.js';

const CODES = ['EMFILE', 'ENFILE'] as const;

/** What is left of an error, or of a program's last words, for the doctor; other errors are thrown again. */
export function exhausted(error: unknown): Outcomes {
  const words = error instanceof Error ? error.message : String(error);
  const code = CODES.find(name => words.includes(name));
  if (code === undefined) throw error;
  const outcome: Outcome = { ok: false, errno: constants.errno[code] };
  return { device: outcome, syscall: outcome, user: outcome, pidfd: outcome };
}
