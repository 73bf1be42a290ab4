// Asking what is to become of memory that cannot be served.

import process from 'node:process';

import type { NativeNotice, NativePolicy } from '#native';

import { messageOf } from './errors.js';
import { FAILURE_POLICIES, type FailurePolicy, type OnFailure, policyOf } from './policy.js';
import { explained, type Session, type SessionEndReason } from './session.js';
import type { PageSource } from './sources.js';
import { validateOneOf } from './validate.js';

/** Sessions about which a function was asked that has not answered yet: another daemon asks again. */
const asked = new WeakMap<object, Set<number>>();

/** Asks a function of the user, and passes its answer on. Never rejects. */
export async function decide(
  native: { decide: (session: number, policy: NativePolicy) => void },
  notice: NativeNotice,
  { decide: ask, holdTimeout }: OnFailure,
  session: Session | undefined,
  source: PageSource | undefined,
): Promise<void> {
  const { id, peer, error, reason, until } = notice;
  if (id === undefined || !peer || !error) return;
  const pending = asked.get(native) ?? new Set();
  asked.set(native, pending);
  if (pending.has(id)) return;
  pending.add(id);
  const left = Math.max(0, Math.floor((until ?? notice.at) - Date.now()));
  const failure = {
    ...(session ? { session } : {}),
    peer: Object.freeze(peer),
    reason: reason as SessionEndReason,
    error: explained(error, source),
    signal: AbortSignal.timeout(left),
  };
  let policy: FailurePolicy = 'poison';
  try {
    const answer: unknown = await ask?.(Object.freeze(failure));
    policy = validateOneOf('the answer of options.onFailure', answer, FAILURE_POLICIES);
  } catch (cause) {
    process.emitWarning(
      `onFailure of session ${id} failed, what is missing is poisoned: ${messageOf(cause)}`,
      {
        type: 'UffdWarning',
        code: error.code,
      },
    );
  }
  pending.delete(id);
  native.decide(id, policyOf(policy, holdTimeout));
}
