import { chmod, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { UffdError } from './errors.js';
import { brokeOff, callApi } from './firecracker-api.js';
import { FirecrackerServer } from './firecracker.js';
import { type AcceptOptions, readLimits, withResolvers } from './limits.js';
import { PATIENCE, readRestore, type Restore, type RestoreOptions } from './restore-options.js';
import type { CloseOptions, Session, SessionEnd } from './session.js';

/** Milliseconds from the call of `restoreFirecracker` on. */
export interface RestoreTimings {
  /** Its memory could be asked for. */
  readonly listening: number;
  /** Firecracker had handed over its memory: faults are answered from here on. */
  readonly handshake: number;
  /** All of its memory was there, with a `mode` that fills; else as `handshake`. */
  readonly filled: number;
  /** Firecracker had answered that the snapshot is loaded (and, with `resume`, runs). */
  readonly loaded: number;
  /** Everything. */
  readonly total: number;
}

const noop = (): void => {};
/** How long the end of a process may take to be seen, after its API has broken off: then it is what is told. */
const SEEN_WITHIN = 500;

/**
 * Restores a snapshot into a Firecracker that runs already: listens for its memory, sends `PUT /snapshot/load`, and resolves
 * when both sides say that it is done. Faults are answered from the handshake on, by native threads.
 *
 * Whichever side fails first is the one error told; then nothing is left of it: the socket is removed, and memory that
 * Firecracker had handed over meets the failure policy.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_API` (Firecracker refused; `cause` is what it said), `ERR_UFFD_TIMEOUT`,
 * `ERR_UFFD_CLOSED` (it exited), those of `serveFirecracker`, and those of a rejected handshake or a failed session; the
 * signal's reason; `TypeError` and `RangeError` for options.
 */
export async function restoreFirecracker(options: RestoreOptions): Promise<FirecrackerVm> {
  const restore = readRestore(options);
  restore.signal?.throwIfAborted();
  const began = performance.now();
  const elapsed = (): number => performance.now() - began;
  const stop = new AbortController();
  const failed = withResolvers<never>();
  // It may fail before, or after, anybody waits for it.
  failed.promise.catch(() => {});
  const fail = (error: unknown): void => {
    failed.reject(error);
    stop.abort(error);
  };
  let waitingFor = 'the memory image was not opened';
  const timer = setTimeout(() => {
    fail(new UffdError('ERR_UFFD_TIMEOUT', `${waitingFor} within ${restore.timeout} ms`));
  }, restore.timeout);
  const abort = (): void => fail(restore.signal?.reason);
  restore.signal?.addEventListener('abort', abort, { once: true });
  const folder = await folderOf(restore).catch((error: unknown) => {
    clearTimeout(timer);
    restore.signal?.removeEventListener('abort', abort);
    throw error;
  });
  const socketPath = restore.socketPath ?? join(folder ?? '', 'uffd.sock');
  const starting = (async () => FirecrackerServer.start(restore.start(socketPath)))();
  let server: FirecrackerServer | undefined;
  // A process that ends takes its API with it; why it ended is known a moment later.
  const whyBroken = async <T>(asked: Promise<T>): Promise<T> => {
    try {
      return await asked;
    } catch (error) {
      if (brokeOff(error)) await seen(failed.promise);
      throw error;
    }
  };
  try {
    server = await Promise.race([starting, failed.promise]);
    const listening = elapsed();
    server.once('rejected', ({ error }) => fail(error));
    waitingFor = 'Firecracker did not hand over its memory';
    const handshake = server.accept().then(session => {
      waitingFor = 'Firecracker did not answer PUT /snapshot/load';
      void session.closed.then(end => fail(errorOf(end, session)));
      const filled = elapsed();
      return { session, at: filled - session.filledIn, filled };
    });
    const body = {
      snapshot_path: restore.state,
      mem_backend: { backend_path: restore.asSeen('options.socketPath', socketPath), backend_type: 'Uffd' },
      resume_vm: restore.resume && !restore.fills,
    };
    const asked = callApi(restore.apiSocket, 'PUT', '/snapshot/load', body, stop.signal);
    const loading = whyBroken(asked).then(elapsed);
    const both = Promise.all([handshake, loading]);
    const [{ session, at, filled }, loaded] = await Promise.race([both, failed.promise]);
    if (restore.resume && restore.fills) {
      waitingFor = 'Firecracker did not answer PATCH /vm';
      const resuming = callApi(restore.apiSocket, 'PATCH', '/vm', { state: 'Resumed' }, stop.signal);
      await Promise.race([whyBroken(resuming), failed.promise]);
    }
    // It serves this one VM to its end; nobody else finds it.
    void server.drain();
    await remove(folder);
    const timings = Object.freeze({ listening, handshake: at, filled, loaded, total: elapsed() });
    return new FirecrackerVm(server, session, restore.apiSocket, timings);
  } catch (error) {
    const givenUp = stop.signal.aborted;
    fail(error);
    const cleaned = starting.then(async begun => begun.giveUp(), noop).then(async () => remove(folder));
    // What was given up while it opened its image is cleaned up when that is over; nobody waits for a disk that may never
    // answer.
    if (server === undefined && givenUp) cleaned.catch(noop);
    else await cleaned;
    throw error;
  } finally {
    clearTimeout(timer);
    restore.signal?.removeEventListener('abort', abort);
  }
}

/** A folder that only this user can change, where the caller names no socket. */
async function folderOf({ socketPath, jailRoot, foreign }: Restore): Promise<string | undefined> {
  if (socketPath !== undefined) return undefined;
  const base = jailRoot ?? tmpdir();
  try {
    const folder = await mkdtemp(join(base, 'uffd-'));
    // Another user has to get through to the socket, which is its own.
    if (foreign) await chmod(folder, 0o711);
    return folder;
  } catch (cause) {
    const { errno, syscall, message } = cause as NodeJS.ErrnoException;
    throw new UffdError('ERR_UFFD_SOCKET', `no folder for the socket could be made in ${base}: ${message}`, {
      errno: errno === undefined ? undefined : Math.abs(errno),
      syscall,
      cause,
      hint: 'Give a `socketPath`, or make the folder writable.',
    });
  }
}

async function remove(folder: string | undefined): Promise<void> {
  if (folder !== undefined) await rm(folder, { recursive: true, force: true });
}

/** Rejects as `failed` does, if that is soon. */
async function seen(failed: Promise<never>): Promise<void> {
  const { promise, resolve } = withResolvers<undefined>();
  const timer = setTimeout(resolve, SEEN_WITHIN, undefined);
  try {
    await Promise.race([failed, promise]);
  } finally {
    clearTimeout(timer);
  }
}

function errorOf({ reason, error }: SessionEnd, { peer }: Session): UffdError {
  if (error !== undefined) return error;
  return reason === 'peer-exited'
    ? new UffdError('ERR_UFFD_CLOSED', `Firecracker (process ${peer.pid}) exited while it was being restored`)
    : new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the session was closed while it was being restored');
}

/** A VM that was restored, and whose memory is being served. Made by {@link restoreFirecracker}. */
export class FirecrackerVm {
  readonly #server: FirecrackerServer;
  readonly #apiSocket: string;

  /** Its memory. `session.closed` says when the VM has ended. */
  readonly session: Session;
  /** How long the restore took. */
  readonly timings: RestoreTimings;

  /** @hidden */
  constructor(server: FirecrackerServer, session: Session, apiSocket: string, timings: RestoreTimings) {
    this.#server = server;
    this.#apiSocket = apiSocket;
    this.session = session;
    this.timings = timings;
  }

  /**
   * `PATCH /vm`: its CPUs stop. Its memory is served on.
   *
   * @param options `timeout`: milliseconds, 30 000 where absent.
   * @throws {@linkcode UffdError} `ERR_UFFD_API`, `ERR_UFFD_TIMEOUT`; the signal's reason.
   */
  async pause(options: AcceptOptions = {}): Promise<void> {
    await this.#setState('Paused', options);
  }

  /** `PATCH /vm`: its CPUs run again. As {@link FirecrackerVm.pause}. */
  async resume(options: AcceptOptions = {}): Promise<void> {
    await this.#setState('Resumed', options);
  }

  /**
   * Ends serving its memory ({@link Session.close}). Resolves when nothing is left of it in this process. The VM itself is not
   * stopped; what it still misses is SIGBUS, unless `rest` says otherwise.
   */
  async close(options: CloseOptions = {}): Promise<SessionEnd> {
    await this.#server.close(options);
    return this.session.closed;
  }

  /** {@link FirecrackerVm.close} with its defaults. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #setState(state: 'Paused' | 'Resumed', options: AcceptOptions): Promise<void> {
    const { timeout = PATIENCE, signal } = readLimits(options);
    const stop = new AbortController();
    const abort = (): void => stop.abort(signal?.reason);
    signal?.addEventListener('abort', abort, { once: true });
    const timer = setTimeout(() => {
      stop.abort(
        new UffdError('ERR_UFFD_TIMEOUT', `Firecracker did not answer PATCH /vm within ${timeout} ms`),
      );
    }, timeout);
    try {
      await callApi(this.#apiSocket, 'PATCH', '/vm', { state }, stop.signal);
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', abort);
    }
  }
}
