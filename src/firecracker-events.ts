import type { NativeNotice } from '#native';

import { fromNative, UffdError } from './errors.js';
import type { Peer, Session, SessionHold } from './session.js';
import type { SessionStats } from './stats.js';

/**
 * A connection that was turned away. If it had handed over memory, that was put through the failure policy before: poisoned,
 * or its process killed; killed also where it never said which memory it was.
 */
export interface RejectedConnection {
  /** Why; `error.code` says which kind of mistake it was, `error.cause` what a function of `memory` has thrown. */
  readonly error: UffdError;
  /** Who it was, where the kernel told. */
  readonly peer?: Peer;
  /** When. */
  readonly at: Date;
  /** Rejections before this one that were too many to keep. */
  readonly dropped: number;
}

/** Events of a {@link FirecrackerServer}. */
export interface FirecrackerServerEvents {
  /** A process handed over its memory and is being served: all of it is there already, with a `mode` that fills. */
  session: [session: Session];
  /** The faults of a session are kept from now on, without an answer: {@link Session.resume} and {@link Session.close} end that. */
  held: [session: Session, hold: SessionHold];
  /** Counters of a session: every `statsInterval`, and when it has ended. */
  stats: [session: Session, stats: SessionStats];
  /** A connection was turned away; the server goes on. */
  rejected: [rejection: RejectedConnection];
  /** The server is closed: no socket, no descriptor, no thread of it is left. */
  close: [];
}

/** @hidden */
export function rejectionOf(notice: NativeNotice, cause: unknown): RejectedConnection {
  const error = notice.error
    ? fromNative(notice.error, cause)
    : new UffdError('ERR_UFFD_PROTOCOL', 'a connection was turned away');
  const rejection = { error, at: new Date(notice.at), dropped: notice.dropped ?? 0 };
  return notice.peer ? { ...rejection, peer: notice.peer } : rejection;
}
