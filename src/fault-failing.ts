// Faults that a handler's callback has not answered: the failure policy, or whoever is asked for it.

import process from 'node:process';

import { messageOf, UffdError } from './errors.js';
import type { Fault } from './fault.js';
import type { DecideFault } from './handler-options.js';
import { FAILURE_POLICIES, type FailurePolicy } from './policy.js';
import { validateOneOf } from './validate.js';

/** @hidden Puts faults through the policy, and remembers those that are held. */
export class FailingFaults {
  readonly #onFailure: FailurePolicy | DecideFault;
  readonly #report: (error: UffdError, fault: Fault) => void;
  readonly #settled: () => void;
  /** Those that are held, or asked about, by name. */
  readonly #kept = new Map<number, Fault>();

  constructor(
    onFailure: FailurePolicy | DecideFault,
    report: (error: UffdError, fault: Fault) => void,
    settled: () => void,
  ) {
    this.#onFailure = onFailure;
    this.#report = report;
    this.#settled = settled;
  }

  /** Nobody has answered it; `cause` is what was thrown. */
  add(fault: Fault, cause: unknown): void {
    const address = `0x${fault.address.toString(16)}`;
    const error =
      cause === undefined
        ? new UffdError('ERR_UFFD_UNANSWERED', `the handler has not answered the fault at ${address}`, {
            hint: 'Call one of copy, zero, continue, poison, unprotect, wake or defer.',
          })
        : new UffdError('ERR_UFFD_UNANSWERED', `the handler of the fault at ${address} has failed`, {
            cause,
          });
    if (typeof this.#onFailure === 'function') {
      this.#kept.set(fault.id(), fault);
      void this.#decide(this.#onFailure, fault, error);
    } else {
      this.#apply(this.#onFailure, fault, error);
    }
  }

  async #decide(decide: DecideFault, fault: Fault, error: UffdError): Promise<void> {
    let policy: FailurePolicy = 'poison';
    try {
      policy = validateOneOf('the answer of options.onFailure', await decide(error, fault), FAILURE_POLICIES);
    } catch (cause) {
      process.emitWarning(`onFailure of a handler failed, the page is poisoned: ${messageOf(cause)}`, {
        type: 'UffdWarning',
        code: error.code,
      });
    }
    if (!fault.settled) this.#apply(policy, fault, error);
    this.#settled();
  }

  #apply(policy: FailurePolicy, fault: Fault, error: UffdError): void {
    if (policy === 'hold') {
      this.#kept.set(fault.id(), fault);
      this.#report(error, fault);
      return;
    }
    this.#kept.delete(fault.id());
    const because = error.cause instanceof Error ? `: ${error.cause.message}` : '';
    if (fault.fail(`${error.message}${because}`, policy === 'kill')) this.#report(error, fault);
  }

  /** One that is nobody's to answer any more. */
  expire(id: number): Fault | undefined {
    const fault = this.#kept.get(id);
    this.#kept.delete(id);
    return fault;
  }

  /** Forgets those that were answered. */
  sweep(): void {
    for (const [id, fault] of this.#kept) if (fault.settled) this.#kept.delete(id);
  }

  /** None can be answered any more. */
  end(error: UffdError): void {
    for (const fault of this.#kept.values()) fault.expire(error);
    this.#kept.clear();
  }
}
