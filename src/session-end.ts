import type { UffdError } from './errors.js';

/** The process that is served, as the kernel told when it connected. */
export interface Peer {
  /** 0 for a forked child, which the kernel names by its memory only. */
  readonly pid: number;
  /** Its user. */
  readonly uid: number;
  /** Its group. */
  readonly gid: number;
}

/** A stretch of the served process's memory. */
export interface SessionRegion {
  /** Its first address in that process. */
  readonly address: bigint;
  /** Bytes. */
  readonly length: number;
  /** Where its first byte is in the memory image. */
  readonly sourceOffset: number;
}

/**
 * Why a session is over:
 *
 * - `'closed'`: by {@link Session.close}, or with its server.
 * - `'detached'`: by {@link Session.detach}: all of its memory is there, and its process goes on without a pager.
 * - `'peer-exited'`: the served process is gone.
 * - `'source-failed'`: the memory image could not be read any more; the failure policy was applied.
 * - `'stalled'`: the source did not answer in time; the failure policy was applied.
 * - `'protocol'`: the served process did something that cannot be followed; the failure policy was applied.
 * - `'exhausted'`: a limit of the machine was reached; the failure policy was applied.
 * - `'pager-lost'`: the pager itself ended; the failure policy was applied.
 */
export type SessionEndReason =
  | 'closed'
  | 'detached'
  | 'peer-exited'
  | 'source-failed'
  | 'stalled'
  | 'protocol'
  | 'exhausted'
  | 'pager-lost';

/** How a session ended. */
export interface SessionEnd {
  /** Why. */
  readonly reason: SessionEndReason;
  /** What went wrong; absent when nothing did. */
  readonly error?: UffdError;
  /** When. */
  readonly at: Date;
}

/** Why a session is held, and for how long. */
export interface SessionHold {
  /** What has failed, as {@link SessionEnd} would name it; `'asked'`: by {@link Session.hold}. */
  readonly reason: SessionEndReason | 'asked';
  /** What went wrong; absent when nothing did. */
  readonly error?: UffdError;
  /** Since when. */
  readonly at: Date;
  /** When what is missing is poisoned, unless the session goes on before. */
  readonly until?: Date;
}

/** Moments that are told as what is left until then differ by what the telling takes. */
const NEAR = 1_000;

/** @hidden Whether a hold was told before, by another daemon. */
export function isSameHold(one: SessionHold, other: SessionHold): boolean {
  const [first, second] = [one, other].map(({ until }) => until?.getTime() ?? -NEAR);
  return (
    one.reason === other.reason &&
    one.error?.message === other.error?.message &&
    Math.abs((first ?? 0) - (second ?? 0)) < NEAR
  );
}
