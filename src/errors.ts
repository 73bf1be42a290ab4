import type { NativeError } from '#native';

/**
 * The stable codes of {@link UffdError}; match on these, not on messages.
 *
 * - `ERR_UFFD_CLOSED`: the process whose memory it was is gone.
 * - `ERR_UFFD_EXHAUSTED`: a limit was reached (sessions, descriptors, huge pages); the message names it.
 * - `ERR_UFFD_NOT_REGISTERED`: a range is not registered, or leaves its mapping.
 * - `ERR_UFFD_PAGER_LOST`: the native pager itself ended.
 * - `ERR_UFFD_PEER_NOT_ALLOWED`: a process of another user connected.
 * - `ERR_UFFD_PROTOCOL`: the other side did not keep to the protocol.
 * - `ERR_UFFD_REGION`: a region that was handed over is not acceptable.
 * - `ERR_UFFD_SOCKET`: the listening socket could not be made; `errno` and `syscall` say why.
 * - `ERR_UFFD_SOURCE`: the memory image could not be read, or shrank while it was served.
 * - `ERR_UFFD_SYSTEM`: another system call failed; `errno` and `syscall` name it.
 * - `ERR_UFFD_TIMEOUT`: something did not happen in time.
 * - `ERR_UFFD_UNSUPPORTED`: well-formed, but not served by this version or kernel.
 * - `ERR_UFFD_UNSUPPORTED_PLATFORM`: no Linux, or no binary for this machine.
 * - `ERR_UFFD_USE_AFTER_CLOSE`: the object was closed before.
 */
export type UffdErrorCode =
  | 'ERR_UFFD_CLOSED'
  | 'ERR_UFFD_EXHAUSTED'
  | 'ERR_UFFD_NOT_REGISTERED'
  | 'ERR_UFFD_PAGER_LOST'
  | 'ERR_UFFD_PEER_NOT_ALLOWED'
  | 'ERR_UFFD_PROTOCOL'
  | 'ERR_UFFD_REGION'
  | 'ERR_UFFD_SOCKET'
  | 'ERR_UFFD_SOURCE'
  | 'ERR_UFFD_SYSTEM'
  | 'ERR_UFFD_TIMEOUT'
  | 'ERR_UFFD_UNSUPPORTED'
  | 'ERR_UFFD_UNSUPPORTED_PLATFORM'
  | 'ERR_UFFD_USE_AFTER_CLOSE';

/** Details of a {@link UffdError}. */
export interface UffdErrorDetails {
  /** Number of the system error. */
  errno?: number | undefined;
  /** The system call or ioctl that failed. */
  syscall?: string | undefined;
  /** What to do about it. */
  hint?: string | undefined;
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
  }
}

/** An error of the native side, which crosses as data. */
export function fromNative(error: NativeError): UffdError {
  return new UffdError(error.code as UffdErrorCode, error.message, error);
}
