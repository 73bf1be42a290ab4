import { inspect } from 'node:util';

import type { NativeCause, NativeError } from '#native';

/**
 * The stable codes of {@link UffdError}; match on these, not on messages.
 *
 * - `ERR_UFFD_API`: Firecracker's API refused a request (`cause` is what it said), or could not be reached (`errno`).
 * - `ERR_UFFD_CHANGING`: the address space is changing; read the events, then try again.
 * - `ERR_UFFD_CLONE`: another descriptor of the same object could not be had.
 * - `ERR_UFFD_CLOSED`: the process whose memory it was is gone.
 * - `ERR_UFFD_EXHAUSTED`: a limit was reached (sessions, descriptors, huge pages); the message names it.
 * - `ERR_UFFD_FAULTS_WAITING`: closing now would give zeros to threads that wait; `waiting` says what they are to get.
 * - `ERR_UFFD_IN_USE`: a fault handler has the messages of this userfaultfd.
 * - `ERR_UFFD_NOT_PERMITTED`: this process lacks a right; the message says which.
 * - `ERR_UFFD_NOT_REGISTERED`: a range is not registered, or leaves its mapping.
 * - `ERR_UFFD_PAGE_EXIST`: a page is present already.
 * - `ERR_UFFD_PAGER_LOST`: the native pager itself ended.
 * - `ERR_UFFD_PAGES_MISSING`: not all of a session's memory is there; the message says how much is not.
 * - `ERR_UFFD_PARTIALLY_COPIED`: only the first `done` bytes were done.
 * - `ERR_UFFD_PEER_NOT_ALLOWED`: a process of another user connected.
 * - `ERR_UFFD_PROTOCOL`: the other side did not keep to the protocol.
 * - `ERR_UFFD_REGION`: a region that was handed over is not acceptable.
 * - `ERR_UFFD_SOCKET`: the listening socket could not be made; `errno` and `syscall` say why.
 * - `ERR_UFFD_SOURCE`: the memory image could not be read, or shrank while it was served.
 * - `ERR_UFFD_STALE`: a fault cannot be answered any more: it was answered, its memory went, or its time is up.
 * - `ERR_UFFD_SYSTEM`: another system call failed; `errno` and `syscall` name it.
 * - `ERR_UFFD_TIMEOUT`: something did not happen in time.
 * - `ERR_UFFD_TRACE`: a recording could not be read or written, or is none; `errno` and `syscall` say why where there are any.
 * - `ERR_UFFD_TRACE_IMAGE`: a recording is of another image.
 * - `ERR_UFFD_UNANSWERED`: a handler has ended without answering its fault or putting it off.
 * - `ERR_UFFD_UNSUPPORTED`: well-formed, but not served by this version or kernel.
 * - `ERR_UFFD_UNSUPPORTED_PLATFORM`: no Linux, or no binary for this machine.
 * - `ERR_UFFD_USE_AFTER_CLOSE`: the object was closed before.
 * - `ERR_UFFD_WOULD_DEADLOCK`: this thread would wait for bytes that only it could bring.
 */
export type UffdErrorCode =
  | 'ERR_UFFD_API'
  | 'ERR_UFFD_CHANGING'
  | 'ERR_UFFD_CLONE'
  | 'ERR_UFFD_CLOSED'
  | 'ERR_UFFD_EXHAUSTED'
  | 'ERR_UFFD_FAULTS_WAITING'
  | 'ERR_UFFD_IN_USE'
  | 'ERR_UFFD_NOT_PERMITTED'
  | 'ERR_UFFD_NOT_REGISTERED'
  | 'ERR_UFFD_PAGE_EXIST'
  | 'ERR_UFFD_PAGER_LOST'
  | 'ERR_UFFD_PAGES_MISSING'
  | 'ERR_UFFD_PARTIALLY_COPIED'
  | 'ERR_UFFD_PEER_NOT_ALLOWED'
  | 'ERR_UFFD_PROTOCOL'
  | 'ERR_UFFD_REGION'
  | 'ERR_UFFD_SOCKET'
  | 'ERR_UFFD_SOURCE'
  | 'ERR_UFFD_STALE'
  | 'ERR_UFFD_SYSTEM'
  | 'ERR_UFFD_TIMEOUT'
  | 'ERR_UFFD_TRACE'
  | 'ERR_UFFD_TRACE_IMAGE'
  | 'ERR_UFFD_UNANSWERED'
  | 'ERR_UFFD_UNSUPPORTED'
  | 'ERR_UFFD_UNSUPPORTED_PLATFORM'
  | 'ERR_UFFD_USE_AFTER_CLOSE'
  | 'ERR_UFFD_WOULD_DEADLOCK';

/**
 * What a {@link UffdError} of an operation means for the caller: crosvm's names for those it has, `Userfaultfd` being
 * everything that only `errno` tells apart.
 */
export type UffdErrorKind =
  | 'PageExist'
  | 'UffdClosed'
  | 'PartiallyCopied'
  | 'Clone'
  | 'Userfaultfd'
  | 'Changing'
  | 'NotRegistered'
  | 'NotPermitted'
  | 'Unsupported'
  | 'UseAfterClose';

const KINDS: { [code in UffdErrorCode]?: UffdErrorKind } = {
  ERR_UFFD_CHANGING: 'Changing',
  ERR_UFFD_CLONE: 'Clone',
  ERR_UFFD_CLOSED: 'UffdClosed',
  ERR_UFFD_NOT_PERMITTED: 'NotPermitted',
  ERR_UFFD_NOT_REGISTERED: 'NotRegistered',
  ERR_UFFD_PAGE_EXIST: 'PageExist',
  ERR_UFFD_PARTIALLY_COPIED: 'PartiallyCopied',
  ERR_UFFD_SYSTEM: 'Userfaultfd',
  ERR_UFFD_UNSUPPORTED: 'Unsupported',
  ERR_UFFD_USE_AFTER_CLOSE: 'UseAfterClose',
};

/** Details of a {@link UffdError}. */
export interface UffdErrorDetails {
  /** Number of the system error. */
  errno?: number | undefined;
  /** The system call or ioctl that failed. */
  syscall?: string | undefined;
  /** What to do about it. */
  hint?: string | undefined;
  /** Bytes done before it failed. */
  done?: number | undefined;
  /** What caused it. */
  cause?: unknown;
}

/**
 * Everything that the kernel, the pager or the other process can cause. (Wrong arguments are `TypeError` and
 * `RangeError` with Node's own codes.)
 */
export class UffdError extends Error {
  /** Stable; see {@link UffdErrorCode}. */
  readonly code: UffdErrorCode;
  /** Number of the system error, where one is behind it. */
  readonly errno?: number;
  /** The system call or ioctl that failed, where one is behind it. */
  readonly syscall?: string;
  /** What to do about it, where that is known. */
  readonly hint?: string;
  /** Bytes done before it failed; of the operations that fill pages. */
  readonly done?: number;

  static {
    // On the prototype, as Node's own errors have it: not a property of each instance.
    Object.defineProperty(this.prototype, 'name', { value: 'UffdError', writable: true, configurable: true });
  }

  /** @hidden */
  constructor(code: UffdErrorCode, message: string, details: UffdErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    if (details.errno !== undefined) this.errno = details.errno;
    if (details.syscall !== undefined) this.syscall = details.syscall;
    if (details.hint !== undefined) this.hint = details.hint;
    if (details.done !== undefined) this.done = details.done;
  }

  /** What it means for the caller; `undefined` for errors of servers and sessions. */
  get kind(): UffdErrorKind | undefined {
    return KINDS[this.code];
  }
}

/** @hidden What was thrown, whatever it is, in words. */
export function messageOf(cause: unknown): string {
  return cause instanceof Error ? cause.message : inspect(cause, { depth: 0 });
}

/** An error of the native side, which crosses as data; what JavaScript did to cause it does not, and comes last of its causes. */
export function fromNative(error: NativeError, cause?: unknown): UffdError {
  const behind = (error.causes ?? []).reduceRight(linked, cause);
  return new UffdError(error.code as UffdErrorCode, error.message, { ...error, cause: behind });
}

/** One link of what is behind an error. What has no code of this package is the kernel's answer, as Node's own errors tell it. */
function linked(cause: unknown, link: NativeCause): Error {
  if (link.code.startsWith('ERR_UFFD_')) {
    return new UffdError(link.code as UffdErrorCode, link.message, { ...link, cause });
  }
  const { message, ...details } = link;
  return Object.assign(new Error(message, cause === undefined ? undefined : { cause }), details);
}

/** The same, the other way: as the native side would tell it. */
export function toNative({ code, message, errno, syscall, hint, cause }: UffdError): NativeError {
  const causes = causesOf(cause);
  return {
    code,
    message,
    ...(errno === undefined ? {} : { errno }),
    ...(syscall === undefined ? {} : { syscall }),
    ...(hint === undefined ? {} : { hint }),
    ...(causes.length === 0 ? {} : { causes }),
  };
}

function causesOf(cause: unknown): NativeCause[] {
  if (!(cause instanceof Error) || !('code' in cause)) return [];
  const { code, message, errno, syscall } = cause as NodeJS.ErrnoException;
  const link = {
    code: String(code),
    message,
    ...(errno === undefined ? {} : { errno }),
    ...(syscall === undefined ? {} : { syscall }),
  };
  return [link, ...causesOf(cause.cause)];
}
