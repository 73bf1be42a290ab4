import { EventEmitter, once } from 'node:events';

import type { NativeNotice, NativeSession } from '#native';

import { decide } from './deciding.js';
import { tellRejected, tellStarted } from './diagnostics.js';
import { emitting } from './emitting.js';
import { fromNative, messageOf, UffdError } from './errors.js';
import { type FirecrackerServerEvents, rejectionOf } from './firecracker-events.js';
import { abandonAtExit, forgetAtExit, servesOthers } from './exit.js';
import { type FirecrackerServerOptions, readOptions, type Start } from './firecracker-options.js';
import {
  type ChooseImage,
  type ImageDefaults,
  type OpenMemory,
  type Served,
  readChoice,
  requestOf,
  sourceOf,
} from './images.js';
import { type AcceptOptions, LONGEST_TIMEOUT, readLimits, within, withResolvers } from './limits.js';
import type { OnFailure } from './policy.js';
import type { ServerEngine, ServerNotice } from './remote-server.js';
import { type CloseOptions, restOf, Session } from './session.js';
import { type PageSource, release } from './sources.js';
import { StatsReports } from './stats-reports.js';

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

/** A process about which a function was asked. */
interface Question {
  readonly controller: AbortController;
  /** What the function has thrown. */
  cause?: unknown;
  /** Says (again) what it has come to. */
  answer?: () => void;
}

/**
 * A socket that turns connections into sessions. Made by {@link serveFirecracker}.
 *
 * Like a `net.Server`, it keeps the process alive until it is closed or {@link FirecrackerServer.unref | unref'd}. If
 * the process or worker ends without closing it, its sessions meet their failure policy.
 */
export class FirecrackerServer extends EventEmitter<FirecrackerServerEvents> {
  readonly #native: ServerEngine;
  readonly #open: OpenMemory;
  readonly #choose: ChooseImage | undefined;
  readonly #defaults: Served<ImageDefaults>;
  /** Of sessions whose image has said it. */
  readonly #policies = new Map<number, OnFailure>();
  /** Of processes that have an image of their own, and are no sessions yet. */
  readonly #sources = new Map<number, PageSource>();
  /** What the others have: who is served from JavaScript holds what answers. */
  readonly #source: PageSource | undefined;
  readonly #questions = new Map<number, Question>();
  readonly #sessions = new Map<number, Session>();
  /** Alive, and not taken by `accept`. */
  readonly #backlog = new Set<Session>();
  readonly #waiting = new Set<{ resolve: (session: Session) => void; reject: (reason: unknown) => void }>();
  readonly #keepAlive: NodeJS.Timeout;
  readonly #reports: StatsReports;
  #start: { resolve: () => void; reject: (error: UffdError) => void } | undefined;
  #closing: Promise<void> | undefined;
  #closed: (() => void) | undefined;
  #isClosed = false;
  /** What has happened and was not looked at. */
  readonly #notices: ServerNotice[] = [];
  #introduced = false;
  #socketPath = '';
  #draining: Promise<void> | undefined;

  /** @hidden */
  static async start(options: Start): Promise<FirecrackerServer> {
    const { image } = options;
    const { promise, ...settle } = withResolvers<void>();
    let server: FirecrackerServer | undefined;
    try {
      if (image !== undefined) Object.assign(options.native, await options.open(image));
      server = new FirecrackerServer(options, settle);
      await promise;
      return server;
    } catch (error) {
      if (server) server.#release();
      throw error;
    } finally {
      release(image);
    }
  }

  private constructor(
    { native: options, image: source, choose, onFailure, open, engine, statsInterval }: Start,
    start: { resolve: () => void; reject: (error: UffdError) => void },
  ) {
    super();
    this.#choose = choose;
    this.#source = sourceOf(source);
    this.#open = open;
    const image = {
      onFailure: options.onFailure,
      mode: options.mode,
      collapse: options.collapse,
      sourceTimeout: options.sourceTimeout,
      ...(options.window === undefined ? {} : { window: options.window }),
      ...(options.record === undefined ? {} : { record: options.record }),
      ...(options.replay === undefined ? {} : { replay: options.replay }),
    };
    this.#defaults = { image, onFailure };
    this.#start = start;
    // Does nothing but hold the event loop open: native wake-ups do not.
    this.#keepAlive = setInterval(() => {}, LONGEST_TIMEOUT);
    try {
      this.#native = engine(options, () => this.#drain());
    } catch (error) {
      clearInterval(this.#keepAlive);
      throw error;
    }
    abandonAtExit(this.#native);
    servesOthers(this.#native, !this.#native.isElsewhere);
    this.#reports = new StatsReports(
      statsInterval,
      () => this.#sessions.values(),
      (...told) => this.emit('stats', ...told),
    );
  }

  /** Where it listens, or listened; empty for an inherited socket without a path. */
  get socketPath(): string {
    return this.#socketPath;
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
   * The next session: one that is alive and that no earlier `accept` has taken, or that starts from now on.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TIMEOUT` when nobody comes in time, `ERR_UFFD_USE_AFTER_CLOSE` when the server is or gets
   * closed; the signal's reason when it aborts.
   */
  async accept(options: AcceptOptions = {}): Promise<Session> {
    const limits = readLimits(options);
    if (this.#closing !== undefined || this.#isClosed) throw this.#closedError();
    const [ready] = this.#backlog;
    if (ready !== undefined) {
      this.#backlog.delete(ready);
      return ready;
    }
    const { promise, ...waiting } = withResolvers<Session>();
    this.#waiting.add(waiting);
    try {
      return await within(promise, limits, timedOut);
    } finally {
      this.#waiting.delete(waiting);
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
    if (this.#isClosed) return;
    // Claimed before anything is awaited: a second close must not decide anew.
    this.#closing ??= new Promise<void>(resolve => {
      this.#closed = resolve;
      this.#native.close(rest);
      this.#refuseWaiting();
    });
    return this.#closing;
  }

  /**
   * Stops listening, removes the socket, and lets the sessions go on. Resolves when the last one has ended by itself, and
   * nothing of the server is left. Who has connected before is still served.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TIMEOUT` when sessions are still running then, the signal's reason when it
   * aborts: they go on all the same, and the server stays closed to others. Wait again, or close it.
   */
  async drain(options: AcceptOptions = {}): Promise<void> {
    const limits = readLimits(options);
    if (this.#isClosed) return;
    if (this.#draining === undefined) {
      this.#draining = once(this, 'close').then(() => {});
      this.#native.drain();
    }
    const late = (timeout: number): UffdError =>
      new UffdError('ERR_UFFD_TIMEOUT', `${this.#sessions.size} sessions did not end within ${timeout} ms`);
    await within(this.#draining, limits, late);
  }

  /** @hidden Closes it by the failure policy: what has begun cannot go on. */
  async giveUp(): Promise<void> {
    if (this.#isClosed) return;
    this.#closing ??= new Promise<void>(resolve => {
      this.#closed = resolve;
      this.#native.giveUp();
      this.#refuseWaiting();
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

  #refuseWaiting(): void {
    for (const waiting of this.#waiting) waiting.reject(this.#closedError());
  }

  #closedError(): UffdError {
    return new UffdError('ERR_UFFD_USE_AFTER_CLOSE', `the server at ${this.socketPath} is closed`);
  }

  #drain(): void {
    for (const notice of this.#native.takeNotices()) {
      if (notice.kind === 'listening') {
        this.#take(notice);
        // Whoever started it gets it, and can listen to its events, before the first of them: on a socket that was
        // inherited somebody may have waited.
        setImmediate(() => {
          this.#introduced = true;
          this.#takeAll();
        });
      } else if (notice.kind === 'failed') {
        this.#take(notice);
      } else {
        this.#notices.push(notice);
      }
    }
    if (this.#introduced) this.#takeAll();
  }

  #takeAll(): void {
    for (const notice of this.#notices.splice(0)) this.#take(notice);
  }

  #take(notice: ServerNotice): void {
    switch (notice.kind) {
      case 'found':
        this.#found(notice.found);
        return;
      case 'listening':
        this.#socketPath = notice.path ?? '';
        this.#start?.resolve();
        return;
      case 'failed':
        if (notice.error) this.#start?.reject(fromNative(notice.error));
        return;
      case 'asking':
        if (notice.session) void this.#ask(notice.session);
        return;
      case 'session':
        if (notice.session) this.#started(new Session(this.#native, notice.session));
        return;
      case 'resumed':
        this.#sessions.get(notice.id ?? -1)?.wasResumed();
        return;
      case 'held':
        this.#held(notice);
        return;
      case 'ended': {
        const session = this.#sessions.get(notice.id ?? -1);
        this.#sessions.delete(notice.id ?? -1);
        this.#policies.delete(notice.id ?? -1);
        if (!session) return;
        this.#backlog.delete(session);
        session.ended(notice);
        this.#reports.ended(session);
        return;
      }
      case 'rejected':
        this.#rejected(notice);
        return;
      case 'closed':
        this.#release();
        this.#refuseWaiting();
        this.#closed?.();
        emitting(() => this.emit('close'));
    }
  }

  /** Never rejects: what goes wrong is told by the process being turned away. */
  async #ask(asked: NativeSession): Promise<void> {
    const known = this.#questions.get(asked.id);
    if (known) {
      // By the next daemon: the last may have died before it heard.
      known.answer?.();
      return;
    }
    const question: Question = { controller: new AbortController() };
    this.#questions.set(asked.id, question);
    const { signal } = question.controller;
    try {
      const choice = await this.#choose?.(requestOf(asked, signal));
      const { image, onFailure, source } = await readChoice(choice, this.#defaults, this.#open);
      if (signal.aborted) {
        this.#native.unused?.(image);
        release(source);
        return;
      }
      this.#policies.set(asked.id, onFailure);
      if (source) this.#sources.set(asked.id, source);
      question.answer = () => {
        this.#native.answer(asked.id, image);
        // A daemon says itself when it has it.
        if (!this.#native.isElsewhere) release(source);
      };
    } catch (cause) {
      if (signal.aborted) return;
      question.cause = cause;
      const reason = `no memory image for process ${asked.peer.pid}: ${messageOf(cause)}`;
      question.answer = () => this.#native.refuse(asked.id, reason);
    }
    question.answer();
  }

  #held(notice: NativeNotice): void {
    const id = notice.id ?? -1;
    const session = this.#sessions.get(id);
    if (notice.asks) {
      void decide(
        this.#native,
        notice,
        this.#policies.get(id) ?? this.#defaults.onFailure,
        session,
        undefined,
      );
    } else if (session) {
      const hold = session.wasHeld(notice);
      if (hold) emitting(() => this.emit('held', session, hold));
    }
  }

  #rejected(notice: NativeNotice): void {
    const question = this.#questions.get(notice.id ?? -1);
    this.#questions.delete(notice.id ?? -1);
    this.#sources.delete(notice.id ?? -1);
    this.#policies.delete(notice.id ?? -1);
    const rejection = rejectionOf(notice, question?.cause);
    question?.controller.abort(rejection.error);
    tellRejected(this.#socketPath, rejection);
    emitting(() => this.emit('rejected', rejection));
  }

  #started(session: Session): void {
    this.#questions.delete(session.id);
    const source = this.#sources.get(session.id) ?? this.#source;
    this.#sources.delete(session.id);
    if (source) session.fedBy(source);
    this.#sessions.get(session.parent ?? -1)?.hasForked(session);
    tellStarted(session);
    this.#has(session);
  }

  /** Its socket was there before it, and so was the session. */
  #found(session: Session): void {
    this.#has(session);
    const { held } = session;
    if (held) emitting(() => this.emit('held', session, held));
  }

  #has(session: Session): void {
    this.#sessions.set(session.id, session);
    const [waiting] = this.#waiting;
    if (waiting !== undefined) {
      this.#waiting.delete(waiting);
      waiting.resolve(session);
    } else {
      const [oldest] = this.#backlog;
      if (oldest && this.#backlog.size >= LONGEST_BACKLOG) this.#backlog.delete(oldest);
      this.#backlog.add(session);
    }
    emitting(() => this.emit('session', session));
  }

  #release(): void {
    this.#isClosed = true;
    clearInterval(this.#keepAlive);
    this.#reports.stop();
    forgetAtExit(this.#native);
    this.#native.release();
  }
}

function timedOut(timeout: number): UffdError {
  return new UffdError('ERR_UFFD_TIMEOUT', `nobody connected within ${timeout} ms`);
}
