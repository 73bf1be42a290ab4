import { UffdError } from './errors.js';

/** @hidden */
export function wouldDeadlock(why: string): UffdError {
  return new UffdError('ERR_UFFD_WOULD_DEADLOCK', `${why}, and only this thread could bring its bytes`, {
    hint: 'Use mapping.read() and write(), or give the source a thread of its own (workerSource).',
  });
}

/** @hidden What closing a mapping comes to while a session serves it. */
export function refuseWhileServed(): never {
  throw new UffdError('ERR_UFFD_FAULTS_WAITING', 'the mapping is served by a session', {
    hint: 'Close the session first: `await session.close()`.',
  });
}
