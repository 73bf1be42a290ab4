import type { NativeHandlerOptions } from '#native';

import { validateSignal } from './exited.js';
import type { Fault } from './fault.js';
import type { FaultBatch } from './fault-batch.js';
import type { UffdError } from './errors.js';
import { LONGEST_TIMEOUT } from './limits.js';
import { FAILURE_POLICIES, type FailurePolicy } from './policy.js';
import type { MemoryRange } from './range.js';
import type { Userfaultfd } from './userfaultfd.js';
import {
  argumentError,
  validateFd,
  validateInteger,
  validateOneOf,
  validateOptions,
  wrongType,
} from './validate.js';

/**
 * Why a handler is over:
 *
 * - `'closed'`: by {@link FaultHandler.close}.
 * - `'aborted'`: its signal was; `error` is the reason.
 * - `'peer-exited'`: the process whose memory it is has exited or called exec.
 * - `'protocol'`: the descriptor has become something else; `error` says what.
 */
export type HandlerEndReason = 'closed' | 'aborted' | 'peer-exited' | 'protocol';

/** How a handler ended. */
export interface HandlerEnd {
  /** Why. */
  readonly reason: HandlerEndReason;
  /** What led to it; absent when nothing did. */
  readonly error?: unknown;
  /** When. */
  readonly at: Date;
}

/**
 * What a {@link FaultHandler} calls, on its thread. Of one delivery everything else comes before its faults. `fault` or
 * `faults` is needed, not both.
 */
export interface FaultCallbacks {
  /**
   * A fault to answer: before it returns, or before the promise that it returns is settled. One that is neither answered nor
   * put off by then (`ERR_UFFD_UNANSWERED`), and one whose callback throws or rejects, meets the failure policy.
   */
  fault?: (fault: Fault) => unknown;
  /** The same for all faults of a delivery together: no object for each, and one call can answer all of them. */
  faults?: (batch: FaultBatch) => unknown;
  /** Memory was given back (`event-remove`): it reads zero from now on. */
  removed?: (range: MemoryRange) => void;
  /** Memory is not mapped any more (`event-unmap`). */
  unmapped?: (range: MemoryRange) => void;
  /** Memory was moved (`event-remap`). */
  remapped?: (move: { readonly from: bigint; readonly to: bigint; readonly length: number }) => void;
  /**
   * The process has forked (`event-fork`; needed with that): its child's userfaultfd, registered like this one. It belongs to
   * the callback; a handler of its own can be made of it at once.
   */
  forked?: (child: Userfaultfd) => void;
  /**
   * A fault was not answered, and met the failure policy: `error` says why (`cause` is what was thrown). Default: a warning
   * of the process. Faults of this very thread that were answered with zeros are told here, too.
   */
  failed?: (error: UffdError, fault: Fault) => void;
  /** It is over. The last call, and the only one. */
  closed?: (end: HandlerEnd) => void;
}

/**
 * Says what becomes of a fault that a callback has not answered; it can still be answered meanwhile, until its deadline. One that
 * throws, or gives something else, is told by a warning, and the page is poisoned.
 */
export type DecideFault = (error: UffdError, fault: Fault) => FailurePolicy | Promise<FailurePolicy>;

/** How faults are handled. */
export interface FaultHandlerOptions {
  /** Milliseconds for a fault, from the moment when it is read, however often it is put off. Default: 30,000. */
  faultDeadline?: number;
  /**
   * What becomes of a fault that is not answered. `'kill'`, and writes to protected pages, end this process, if it is its. `'hold'`
   * keeps it until its deadline: `failed` is told, and whoever has it can still answer it. Or a function that says which of
   * these. By its deadline a fault is poisoned, unless it is `'kill'`. Default: `'poison'`.
   */
  onFailure?: FailurePolicy | DecideFault;
  /**
   * What becomes of a fault of this very thread, which it could never answer: `'abort'` ends the program with an explanation,
   * `'zero'` fills the page with zeros and tells `failed`. Default: `'abort'`.
   */
  onSelfFault?: 'abort' | 'zero';
  /** Closes the handler. */
  signal?: AbortSignal;
  /** A pidfd of the other process, for the policy `'kill'`; it stays the caller's. */
  pidfd?: number;
  /**
   * How this thread is told of messages: `'loop'`, by its event loop; `'thread'`, by a thread that only notifies, which is
   * what runtimes get that do not export libuv. Default: `'loop'`.
   */
  notifyBy?: 'loop' | 'thread';
}

/** How a handler is closed. */
export interface HandlerCloseOptions {
  /** What becomes of pages still missing: touching one is SIGBUS from then on, or they read zero. Default: `'poison'`. */
  rest?: 'poison' | 'zero';
}

const CALLBACKS = [
  'fault',
  'faults',
  'removed',
  'unmapped',
  'remapped',
  'forked',
  'failed',
  'closed',
] as const;
const OPTIONS = ['faultDeadline', 'onFailure', 'onSelfFault', 'signal', 'pidfd', 'notifyBy'] as const;

/** @hidden */
export function readCallbacks(callbacks: FaultCallbacks, needsForked: boolean): FaultCallbacks {
  validateOptions('callbacks', callbacks, CALLBACKS);
  for (const name of CALLBACKS) {
    const callback: unknown = callbacks[name];
    if (callback !== undefined && typeof callback !== 'function') {
      throw wrongType(`callbacks.${name}`, 'a function', callback);
    }
  }
  if ((callbacks.fault === undefined) === (callbacks.faults === undefined)) {
    throw refused('Expected `callbacks` to have either `fault` or `faults`: somebody has to answer');
  }
  if (needsForked && callbacks.forked === undefined) {
    throw refused(
      'Expected `callbacks.forked`: the userfaultfd has event-fork in use, and what is missing in a child would read zero',
    );
  }
  return { ...callbacks };
}

/** @hidden */
export function readHandlerOptions(
  options: FaultHandlerOptions,
  own: boolean,
): {
  native: NativeHandlerOptions;
  signal: AbortSignal | undefined;
  onFailure: FailurePolicy | DecideFault;
} {
  validateOptions('options', options, OPTIONS);
  const { faultDeadline = 30_000, onFailure = 'poison', onSelfFault = 'abort', pidfd } = options;
  const deadline = validateInteger('options.faultDeadline', faultDeadline, 1, LONGEST_TIMEOUT);
  const policy =
    typeof onFailure === 'function'
      ? onFailure
      : validateOneOf('options.onFailure', onFailure, FAILURE_POLICIES);
  const kill = policy === 'kill';
  const zeroSelfFaults =
    validateOneOf('options.onSelfFault', onSelfFault, ['abort', 'zero'] as const) === 'zero';
  const byThread =
    validateOneOf('options.notifyBy', options.notifyBy ?? 'loop', ['loop', 'thread'] as const) === 'thread';
  if (pidfd !== undefined) validateFd('options.pidfd', pidfd);
  if (kill && !own && pidfd === undefined) {
    throw refused("Expected `options.pidfd`: by `onFailure: 'kill'` another process would have to be killed");
  }
  return {
    native: { deadline, kill, zeroSelfFaults, byThread, ...(pidfd === undefined ? {} : { pidfd }) },
    signal: validateSignal(options.signal),
    onFailure: policy,
  };
}

function refused(message: string): Error {
  return argumentError(TypeError, 'ERR_INVALID_ARG_VALUE', message);
}
