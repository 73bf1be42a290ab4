import { EventEmitter } from 'node:events';
import { cpus } from 'node:os';
import { fileURLToPath } from 'node:url';

import type { NativeNotice, NativeServer, NativeServerOptions } from '#native';

import { fromNative, UffdError } from './errors.js';
import { abandonAtExit, forgetAtExit } from './exit.js';
import { native } from './native.js';
import { FAILURE_POLICIES, type FailurePolicy } from './policy.js';
import { type CloseOptions, type Peer, restOf, Session } from './session.js';
import { KiB, MiB } from './units.js';
import {
  validateInteger,
  validateOneOf,
  validateOptions,
  validatePath,
  validatePowerOfTwo,
} from './validate.js';
import { withResolvers } from './with-resolvers.js';

/** Options of {@link serveFirecracker}. */
export interface FirecrackerServerOptions {
  /**
   * Where to listen: what Firecracker gets as `mem_backend.backend_path`. At most 107 bytes. Nothing may lie there but a
   * socket of the same user that nobody listens on. The directory must not be writable by other users (unless sticky).
   */
  socketPath: string;
  /** The snapshot's memory file. It must not change while it is served. */
  memory: string | URL;
  /** What happens to a process whose memory cannot be served. Default: `'poison'`. */
  onFailure?: FailurePolicy;
  /**
   * Bytes installed around a fault, a power of two from 4 KiB to 2 MiB. More is faster and uses more memory; pages
   * present or discarded are never touched, nor anything outside the region. Default: 64 KiB, and 256 KiB in those
   * stretches of 16 MiB where 32 faults have shown that most of it is wanted.
   */
  window?: number;
  /** Whose processes may connect: those of this user id. Default: this process's own. */
  peer?: { uid: number };
  /** Milliseconds a connection has to complete its handshake. Default: 5000. */
  handshakeTimeout?: number;
  /** Sessions and handshakes at one time; connections beyond are rejected. Default: 1024. */
  maxSessions?: number;
  /**
   * The CPU to pin the pager's thread to; the server then has a pager of its own. Worth it only where the faulting
   * threads are pinned as well. Default: not pinned, one thread shared by all servers of this process.
   */
  cpu?: number;
}

/** A connection that was turned away. */
export interface RejectedConnection {
  /** Why; `error.code` says which kind of mistake it was. */
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
  /** A process handed over its memory and is being served. */
  session: [session: Session];
  /** A connection was turned away; the server goes on. */
  rejected: [rejection: RejectedConnection];
  /** The server is closed: no socket, no descriptor, no thread of it is left. */
  close: [];
}

/** Options of {@link FirecrackerServer.accept}. */
export interface AcceptOptions {
  /** Milliseconds to wait. Default: for ever. */
  timeout?: number;
  /** Ends the wait. */
  signal?: AbortSignal;
}

const OPTIONS = [
  'socketPath',
  'memory',
  'onFailure',
  'window',
  'peer',
  'handshakeTimeout',
  'maxSessions',
  'cpu',
];
const LONGEST_TIMEOUT = 2 ** 31 - 1;
/** Sessions that wait for `accept`; the oldest are dropped from the queue (not from service) beyond it. */
const LONGEST_BACKLOG = 1024;

/**
 * Serves Firecracker snapshots: listens on a Unix socket, takes the handshake of each process that restores one (all
 * versions from 1.1 on), and answers its page faults from the memory file. Nothing of it runs in JavaScript; faults are
 * served before the first event is seen here.
 *
 * Resolves when the socket is listening, which is the moment to send `PUT /snapshot/load`.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_SOURCE` (memory file), `ERR_UFFD_SOCKET` (socket path), `ERR_UFFD_SYSTEM`
 * (no descriptors or threads left, or no such `cpu`), `ERR_UFFD_UNSUPPORTED_PLATFORM`; `TypeError` and `RangeError`
 * for options.
 */
export async function serveFirecracker(options: FirecrackerServerOptions): Promise<FirecrackerServer> {
  return FirecrackerServer.start(readOptions(options));
}

function readOptions(options: FirecrackerServerOptions): NativeServerOptions {
  validateOptions('options', options, OPTIONS);
  const {
    memory,
    onFailure = 'poison',
    window,
    peer,
    handshakeTimeout = 5000,
    maxSessions = 1024,
    cpu,
  } = options;
  const read: NativeServerOptions = {
    socketPath: validatePath('options.socketPath', options.socketPath),
    memory: validatePath('options.memory', memory instanceof URL ? fileURLToPath(memory) : memory),
    kill: validateOneOf('options.onFailure', onFailure, FAILURE_POLICIES) === 'kill',
    handshakeTimeout: validateInteger('options.handshakeTimeout', handshakeTimeout, 1, LONGEST_TIMEOUT),
    maxSessions: validateInteger('options.maxSessions', maxSessions, 1, 1_000_000),
  };
  if (window !== undefined) read.window = validatePowerOfTwo('options.window', window, 4 * KiB, 2 * MiB);
  if (peer !== undefined) {
    validateOptions('options.peer', peer, ['uid']);
    read.peerUid = validateInteger('options.peer.uid', peer.uid, 0, 2 ** 32 - 2);
  }
  if (cpu !== undefined) read.cpu = validateInteger('options.cpu', cpu, 0, Math.max(cpus().length, 1024) - 1);
  return read;
}

/**
 * A socket that turns connections into sessions. Made by {@link serveFirecracker}.
 *
 * Like a `net.Server`, it keeps the process alive until it is closed or {@link FirecrackerServer.unref | unref'd}. If
 * the process or worker ends without closing it, its sessions meet their failure policy.
 */
export class FirecrackerServer extends EventEmitter<FirecrackerServerEvents> {
  readonly #native: NativeServer;
  readonly #sessions = new Map<number, Session>();
  readonly #backlog: Session[] = [];
  readonly #waiting = new Set<{ resolve: (session: Session) => void; reject: (reason: unknown) => void }>();
  readonly #keepAlive: NodeJS.Timeout;
  #start: { resolve: () => void; reject: (error: UffdError) => void } | undefined;
  #closing: Promise<void> | undefined;
  #closed: (() => void) | undefined;
  #isClosed = false;

  /** Where it listens. */
  readonly socketPath: string;

  /** @hidden */
  static async start(options: NativeServerOptions): Promise<FirecrackerServer> {
    const { promise, ...settle } = withResolvers<void>();
    const server = new FirecrackerServer(options, settle);
    try {
      await promise;
      return server;
    } catch (error) {
      server.#release();
      throw error;
    }
  }

  private constructor(
    options: NativeServerOptions,
    start: { resolve: () => void; reject: (error: UffdError) => void },
  ) {
    super();
    this.socketPath = options.socketPath;
    this.#start = start;
    // Does nothing but hold the event loop open: native wake-ups do not.
    this.#keepAlive = setInterval(() => {}, LONGEST_TIMEOUT);
    try {
      this.#native = native().startFirecrackerServer(options, () => this.#drain());
    } catch (error) {
      clearInterval(this.#keepAlive);
      throw error;
    }
    abandonAtExit(this.#native);
  }

  /** The sessions that are alive. */
  get sessions(): readonly Session[] {
    return [...this.#sessions.values()];
  }

  /** Whether it has been closed. */
  get closed(): boolean {
    return this.#isClosed;
  }

  /**
   * The next session: one that no earlier `accept` has taken, or that starts from now on.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TIMEOUT` when nobody comes in time, `ERR_UFFD_USE_AFTER_CLOSE` when the server is or gets
   * closed; the signal's reason when it aborts.
   */
  async accept(options: AcceptOptions = {}): Promise<Session> {
    validateOptions('options', options, ['timeout', 'signal']);
    const { timeout, signal } = options;
    if (timeout !== undefined) validateInteger('options.timeout', timeout, 0, LONGEST_TIMEOUT);
    signal?.throwIfAborted();
    const ready = this.#backlog.shift();
    if (ready !== undefined) return ready;
    if (this.#closing !== undefined) throw this.#closedError();
    const { promise, ...waiting } = withResolvers<Session>();
    this.#waiting.add(waiting);
    const abort = (): void => waiting.reject(signal?.reason);
    signal?.addEventListener('abort', abort, { once: true });
    const timer =
      timeout === undefined ? undefined : setTimeout(() => waiting.reject(timedOut(timeout)), timeout);
    try {
      return await promise;
    } finally {
      this.#waiting.delete(waiting);
      clearTimeout(timer);
      signal?.removeEventListener('abort', abort);
    }
  }

  /** The sessions as they start, until the server is closed. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Session, void, undefined> {
    while (true) {
      try {
        yield await this.accept();
      } catch (error) {
        if (error instanceof UffdError && error.code === 'ERR_UFFD_USE_AFTER_CLOSE') return;
        throw error;
      }
    }
  }

  /**
   * Stops listening, removes the socket, and closes every session. Resolves when nothing is left: no socket, no
   * descriptor, no thread. Idempotent: the first call decides.
   *
   * @throws `TypeError` for options that do not exist.
   */
  async close(options: CloseOptions = {}): Promise<void> {
    const rest = restOf(options);
    // Claimed before anything is awaited: a second close must not decide anew.
    this.#closing ??= new Promise<void>(resolve => {
      this.#closed = resolve;
      this.#native.close(rest);
      for (const waiting of this.#waiting) waiting.reject(this.#closedError());
    });
    return this.#closing;
  }

  /** {@link FirecrackerServer.close} with its defaults. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Keeps the process alive while the server is open (the default). */
  ref(): this {
    this.#keepAlive.ref();
    return this;
  }

  /** Lets the process end although the server is open. */
  unref(): this {
    this.#keepAlive.unref();
    return this;
  }

  #closedError(): UffdError {
    return new UffdError('ERR_UFFD_USE_AFTER_CLOSE', `the server at ${this.socketPath} is closed`);
  }

  #drain(): void {
    for (const notice of this.#native.takeNotices()) this.#take(notice);
  }

  #take(notice: NativeNotice): void {
    switch (notice.kind) {
      case 'listening':
        this.#start?.resolve();
        return;
      case 'failed':
        if (notice.error) this.#start?.reject(fromNative(notice.error));
        return;
      case 'session':
        if (notice.session) this.#started(new Session(this.#native, notice.session));
        return;
      case 'ended': {
        const session = this.#sessions.get(notice.id ?? -1);
        this.#sessions.delete(notice.id ?? -1);
        session?.ended(notice);
        return;
      }
      case 'rejected':
        this.#emit(() => this.emit('rejected', rejectionOf(notice)));
        return;
      case 'closed':
        this.#release();
        this.#closed?.();
        this.#emit(() => this.emit('close'));
    }
  }

  #started(session: Session): void {
    this.#sessions.set(session.id, session);
    const [waiting] = this.#waiting;
    if (waiting !== undefined) {
      this.#waiting.delete(waiting);
      waiting.resolve(session);
    } else {
      if (this.#backlog.length >= LONGEST_BACKLOG) this.#backlog.shift();
      this.#backlog.push(session);
    }
    this.#emit(() => this.emit('session', session));
  }

  /** A listener that throws must not swallow the notices behind it. */
  #emit(emit: () => void): void {
    try {
      emit();
    } catch (error) {
      queueMicrotask(() => {
        throw error;
      });
    }
  }

  #release(): void {
    this.#isClosed = true;
    clearInterval(this.#keepAlive);
    forgetAtExit(this.#native);
    this.#native.release();
  }
}

function rejectionOf(notice: NativeNotice): RejectedConnection {
  const error = notice.error
    ? fromNative(notice.error)
    : new UffdError('ERR_UFFD_PROTOCOL', 'a connection was turned away');
  const rejection = { error, at: new Date(notice.at), dropped: notice.dropped ?? 0 };
  return notice.peer ? { ...rejection, peer: notice.peer } : rejection;
}

function timedOut(timeout: number): UffdError {
  return new UffdError('ERR_UFFD_TIMEOUT', `nobody connected within ${timeout} ms`);
}
