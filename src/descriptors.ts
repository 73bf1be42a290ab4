import { fromNative } from './errors.js';
import { LONGEST_TIMEOUT } from './limits.js';
import { native } from './native.js';
import type { Peer } from './session.js';
import { validateFd, validateInteger, validateOptions, validateView, wrongType } from './validate.js';

/** What the kernel lets ride with one message (`SCM_MAX_FD`). */
const MOST_FDS = 253;
const MOST_BYTES = 2 ** 30;

/** What {@link receiveFds} received. */
export interface ReceivedFds {
  /** As many bytes as were asked for. */
  bytes: Buffer;
  /** Descriptors, close-on-exec: the caller's. */
  fds: number[];
}

/**
 * Sends descriptors over a connected Unix socket (sendmsg(2), `SCM_RIGHTS`), riding with the first byte of a payload.
 *
 * @param socket Descriptor of the socket; it may be nonblocking.
 * @param fds 1 to 253; they stay the caller's.
 * @param payload At least one byte.
 * @param options `timeout`: milliseconds for all of it. Default: 5000.
 * @throws {@linkcode UffdError} `ERR_UFFD_TIMEOUT`, `ERR_UFFD_PROTOCOL` (the other end is gone), `ERR_UFFD_SYSTEM`
 */
export async function sendFds(
  socket: number,
  fds: readonly number[],
  payload: ArrayBufferView,
  options: { timeout?: number } = {},
): Promise<void> {
  validateFd('socket', socket);
  if (!Array.isArray(fds)) {
    throw wrongType('fds', 'an array', fds);
  }
  validateInteger('fds.length', fds.length, 1, MOST_FDS);
  const numbers = fds.map((fd: unknown, index) => validateFd(`fds[${index}]`, fd));
  const bytes = validateView('payload', payload);
  validateInteger('payload.byteLength', bytes.byteLength, 1, MOST_BYTES);
  const { error } = await native().sendDescriptors(socket, numbers, bytes, timeoutOf(options, ['timeout']));
  if (error) throw fromNative(error);
}

/**
 * Receives a payload of a known length over a connected Unix socket, and the descriptors that ride with it (recvmsg(2)).
 * More descriptors than accepted are refused and closed, never cut off silently.
 *
 * @param socket Descriptor of the socket; it may be nonblocking.
 * @param options `length`: bytes (default: 1); `maxFds` (default: 1); `timeout`: milliseconds (default: 5000).
 * @throws {@linkcode UffdError} `ERR_UFFD_TIMEOUT`, `ERR_UFFD_PROTOCOL` (too many descriptors, or the stream ended first),
 *   `ERR_UFFD_SYSTEM`
 */
export async function receiveFds(
  socket: number,
  options: { length?: number; maxFds?: number; timeout?: number } = {},
): Promise<ReceivedFds> {
  validateFd('socket', socket);
  const timeout = timeoutOf(options, ['length', 'maxFds', 'timeout']);
  const { length = 1, maxFds = 1 } = options;
  validateInteger('options.length', length, 1, MOST_BYTES);
  validateInteger('options.maxFds', maxFds, 0, MOST_FDS);
  const { error, bytes, fds } = await native().receiveDescriptors(socket, length, maxFds, timeout);
  if (error) throw fromNative(error);
  return { bytes: bytes ?? Buffer.alloc(0), fds: fds ?? [] };
}

/**
 * Who connected a Unix socket, as of that moment (`SO_PEERCRED`).
 *
 * @param socket Descriptor of the socket.
 * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`: it is no connected Unix socket.
 */
export function peerOf(socket: number): Peer {
  validateFd('socket', socket);
  const { error, peer } = native().credentialsOfPeer(socket);
  if (error || !peer) throw fromNative(error ?? NO_ANSWER);
  return peer;
}

/**
 * A pidfd of the process that connected a Unix socket: `SO_PEERPIDFD` (Linux 6.5), which a reused number cannot deceive, else
 * `SO_PEERCRED` and pidfd_open(2). For {@link onExit}, or to be sent on.
 *
 * @param socket Descriptor of the socket.
 * @returns A descriptor, close-on-exec: the caller's.
 * @throws {@linkcode UffdError} `ERR_UFFD_CLOSED` (the process is gone), `ERR_UFFD_SYSTEM` (no connected Unix socket)
 */
export function pidfdOf(socket: number): number {
  validateFd('socket', socket);
  const { error, pidfd } = native().pidfdOfPeer(socket);
  if (error || pidfd === undefined) throw fromNative(error ?? NO_ANSWER);
  return pidfd;
}

const NO_ANSWER = { code: 'ERR_UFFD_SYSTEM', message: 'the kernel gave no answer' };

function timeoutOf(options: { timeout?: number }, known: readonly string[]): number {
  validateOptions('options', options, known);
  return validateInteger('options.timeout', options.timeout ?? 5000, 0, LONGEST_TIMEOUT);
}
