// Channels of node:diagnostics_channel: what a program's monitoring hears of every pager and server, without being handed them.

import { channel } from 'node:diagnostics_channel';

import type { RejectedConnection } from './firecracker-events.js';
import type { Session, SessionEnd, SessionHold } from './session.js';
import type { SessionStats } from './stats.js';

const started = channel('userfaultfd:session:start');
const held = channel('userfaultfd:session:held');
const ended = channel('userfaultfd:session:end');
const counted = channel('userfaultfd:session:stats');
const rejected = channel('userfaultfd:peer:rejected');

/** @hidden */
export function tellStarted(session: Session): void {
  if (started.hasSubscribers) started.publish({ session });
}

/** @hidden */
export function tellHeld(session: Session, hold: SessionHold): void {
  if (held.hasSubscribers) held.publish({ session, hold });
}

/** @hidden */
export function tellEnded(session: Session, end: SessionEnd): void {
  if (ended.hasSubscribers) ended.publish({ session, end, stats: session.stats() });
}

/** @hidden */
export function tellStats(session: Session, stats: SessionStats): void {
  if (counted.hasSubscribers) counted.publish({ session, stats });
}

/** @hidden */
export function tellRejected(socketPath: string, rejection: RejectedConnection): void {
  if (rejected.hasSubscribers) rejected.publish({ socketPath, rejection });
}
