import type { NativePolicy } from '#native';

import type { UffdError } from './errors.js';
import { LONGEST_TIMEOUT } from './limits.js';
import type { Peer, Session, SessionEndReason } from './session.js';
import { validateInteger, validateOneOf } from './validate.js';

/**
 * What happens to a process whose memory cannot be served (its source failed, it did something that cannot be
 * followed, a limit was reached):
 *
 * - `'poison'`: every page still missing is poisoned; touching one is SIGBUS. On kernels that cannot poison (before
 *   6.6) the process is killed.
 * - `'kill'`: the process is killed with SIGKILL, through its pidfd.
 * - `'hold'`: its faults are kept, without an answer, until {@link Session.resume} or {@link Session.close}; nobody gets poison,
 *   zeros or a signal, and what the process does to its memory is followed. `'held'` tells. Where nobody could go on (the session
 *   was not there yet, or the program ends), it is `'poison'`.
 *
 * Zero pages are never given unasked.
 */
export type FailurePolicy = 'poison' | 'kill' | 'hold';

/** The policies there are. */
export const FAILURE_POLICIES: readonly FailurePolicy[] = ['poison', 'kill', 'hold'];

/** Memory that cannot be served, before anything is done about it. Its faults are kept meanwhile. */
export interface SessionFailure {
  /** Absent where the session was not there yet (`mode: 'fill'`); it cannot be held then. */
  readonly session?: Session;
  /** Whose memory it is. */
  readonly peer: Peer;
  /** What the session ends with, if it does. */
  readonly reason: SessionEndReason;
  /** Why. */
  readonly error: UffdError;
  /** Aborts when the answer comes too late. */
  readonly signal: AbortSignal;
}

/** Says what happens. One that throws, or gives something else, is told by a warning, and `'poison'` is applied. */
export type DecideFailure = (failure: SessionFailure) => FailurePolicy | Promise<FailurePolicy>;

/** What happens when memory cannot be served. */
export interface FailureOptions {
  /** A policy, or a function that says which for each failure. Default: `'poison'`. */
  onFailure?: FailurePolicy | DecideFailure;
  /** Milliseconds a function may take; then `'poison'` is applied. Default: 5000. */
  decisionTimeout?: number;
  /** Milliseconds a failed session is held at most; then `'poison'` is applied. Default: as long as it takes. */
  holdTimeout?: number;
}

/** @hidden The options of {@link FailureOptions}. */
export const FAILURE_OPTIONS = ['onFailure', 'decisionTimeout', 'holdTimeout'] as const;

/** @hidden As {@link FailureOptions}, checked. */
export interface OnFailure {
  native: NativePolicy;
  decide: DecideFailure | undefined;
  /** Of what is held because of an answer. */
  holdTimeout: number | undefined;
}

/** @hidden */
export function readFailureOptions(
  name: string,
  {
    onFailure = 'poison',
    decisionTimeout = 5000,
    holdTimeout,
  }: { [option in keyof FailureOptions]?: unknown },
): OnFailure {
  const forAnswer = validateInteger(`${name}.decisionTimeout`, decisionTimeout, 1, LONGEST_TIMEOUT);
  const forHold =
    holdTimeout === undefined
      ? undefined
      : validateInteger(`${name}.holdTimeout`, holdTimeout, 1, LONGEST_TIMEOUT);
  if (typeof onFailure === 'function') {
    const decide = onFailure as DecideFailure;
    return { native: { kind: 'ask', timeout: forAnswer }, decide, holdTimeout: forHold };
  }
  const kind = validateOneOf(`${name}.onFailure`, onFailure, FAILURE_POLICIES);
  return { native: policyOf(kind, forHold), decide: undefined, holdTimeout: forHold };
}

/** @hidden */
export function policyOf(kind: FailurePolicy, holdTimeout: number | undefined): NativePolicy {
  return kind === 'hold' && holdTimeout !== undefined ? { kind, timeout: holdTimeout } : { kind };
}

/**
 * What a session that is closed on purpose does with pages that are still missing:
 *
 * - `'poison'`: touching one is SIGBUS from then on.
 * - `'populate'`: all of them are installed from the source first; what the source cannot give is poisoned.
 * - `'zero'`: they read zero.
 */
export type Rest = 'poison' | 'populate' | 'zero';

/** The ways to close there are. */
export const RESTS: readonly Rest[] = ['poison', 'populate', 'zero'];
