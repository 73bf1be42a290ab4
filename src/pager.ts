import { EventEmitter } from 'node:events';
import { cpus } from 'node:os';

import type { NativeNotice, NativePager, NativeServed } from '#native';

import { readRegions, refuseMemfd } from './adopting.js';
import { decide } from './deciding.js';
import { tellStarted } from './diagnostics.js';
import { emitting } from './emitting.js';
import { fromNative, UffdError } from './errors.js';
import { abandonAtExit, forgetAtExit } from './exit.js';
import { holdOpen } from './hold-open.js';
import {
  type AcceptOptions,
  LONGEST_TIMEOUT,
  readLimits,
  unlessAborted,
  within,
  withResolvers,
} from './limits.js';
import { MemoryMapping } from './mapping.js';
import { native } from './native.js';
import type { OnFailure } from './policy.js';
import {
  ADOPT,
  type AdoptOptions,
  readServeOptions,
  SERVE,
  type ServeOptions,
  signalOf,
} from './serve-options.js';
import { type CloseOptions, explained, restOf, Session, type SessionHold } from './session.js';
import { overlaid, type PageSource } from './sources.js';
import { readStatsInterval, StatsReports } from './stats-reports.js';
import type { SessionStats } from './stats.js';
import { readTraceOptions, withTraces } from './trace-options.js';
import { KiB, MiB } from './units.js';
import { Userfaultfd } from './userfaultfd.js';
import { validateFd, validateInteger, validateOptions, validatePowerOfTwo, wrongType } from './validate.js';

export type { AdoptOptions, ServeOptions, SessionMode } from './serve-options.js';

/** Options of {@link Pager.create}. */
export interface PagerOptions {
  /**
   * The CPU to pin the pager's thread to; it then has a thread of its own. Worth it only where the faulting threads are
   * pinned as well. Default: not pinned, one thread shared by all pagers and servers of this process.
   */
  cpu?: number;
  /** Milliseconds between `'stats'` events, at least 10. Default: there are none. */
  statsInterval?: number;
}

/** Events of a {@link Pager}. */
export interface PagerEvents {
  /** A session has started: one that was asked for, or that of a process that a served one has forked. */
  session: [session: Session];
  /** The faults of a session are kept from now on, without an answer: {@link Session.resume} and {@link Session.close} end that. */
  held: [session: Session, hold: SessionHold];
  /** Counters of a session: every `statsInterval`, and when it has ended. */
  stats: [session: Session, stats: SessionStats];
  /** The pager is closed: nothing of it is left. */
  close: [];
}

/** A session of which the native side has not told yet. */
interface Starting {
  promise: Promise<Session>;
  resolve: (session: Session) => void;
  reject: (reason: unknown) => void;
  mapping: MemoryMapping | undefined;
  source: PageSource;
  onFailure: OnFailure;
}

/**
 * Answers page faults: of this process's own mappings, and of userfaultfds that came from other processes. One native thread
 * serves any number of sessions; JavaScript is not on the path of a fault unless a source is JavaScript.
 *
 * It keeps the process alive while it serves other processes, unless {@link Pager.unref} was called.
 *
 * @example
 * ```ts
 * await using pager = Pager.create();
 * using mapping = MemoryMapping.anonymous(1 * GiB);
 * await using session = await pager.serve(mapping, { source: fileSource('image') });
 * const bytes = await mapping.read(123 * 4096, 64); // comes from the file
 * ```
 */
export class Pager extends EventEmitter<PagerEvents> {
  readonly #native: NativePager;
  readonly #sessions = new Map<number, Session>();
  readonly #starting = new Map<number, Starting>();
  readonly #foreign = new Set<number>();
  readonly #policies = new Map<number, OnFailure>();
  #keepAlive: NodeJS.Timeout | undefined;
  #mayKeepAlive = true;
  #closing: Promise<void> | undefined;
  #isClosed = false;
  readonly #reports: StatsReports;

  private constructor(cpu: number | undefined, statsInterval: number | undefined) {
    super();
    this.#native = native().createPager(cpu, () => this.#drain());
    const [failed] = this.#native.takeNotices();
    if (failed?.error) {
      this.#native.release();
      throw fromNative(failed.error);
    }
    abandonAtExit(this.#native);
    this.#reports = new StatsReports(
      statsInterval,
      () => this.#sessions.values(),
      (...told) => this.emit('stats', ...told),
    );
  }

  /**
   * Starts a pager.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`: no descriptors or threads left, or no such `cpu`.
   */
  static create(options: PagerOptions = {}): Pager {
    validateOptions('options', options, ['cpu', 'statsInterval']);
    const { cpu } = options;
    if (cpu !== undefined) validateInteger('options.cpu', cpu, 0, Math.max(cpus().length, 1024) - 1);
    return new Pager(cpu, readStatsInterval(options.statsInterval));
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
   * Serves a mapping of this process: from now on its missing pages come from the source, whoever touches them. What is
   * given back ({@link MemoryMapping.discard}) reads zero, never the source again.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SOURCE` (it cannot be opened), `ERR_UFFD_PROTOCOL` (it is shorter than the
   *   mapping), `ERR_UFFD_WOULD_DEADLOCK` (the mapping has a buffer, and only this thread could bring the bytes),
   *   `ERR_UFFD_NOT_PERMITTED`, `ERR_UFFD_UNSUPPORTED` (also for the mode `'minor'` of memory that is no shared memfd of
   *   ordinary pages), `ERR_UFFD_SYSTEM`
   */
  async serve(mapping: MemoryMapping, options: ServeOptions): Promise<Session> {
    if (!(mapping instanceof MemoryMapping)) throw wrongType('mapping', 'a MemoryMapping', mapping);
    const { settings, onFailure } = readServeOptions(options, SERVE);
    const signal = signalOf(options);
    const traces = readTraceOptions('options', options);
    const source = overlaid(options.source, options.overlays);
    const handle = mapping.nativeHandle();
    mapping.refuseDeadlock(source.needsThisThread);
    this.#refuseClosed();
    const opened = await source.handle();
    const served = await withTraces(traces, opened, given => {
      this.#refuseClosed();
      mapping.refuseDeadlock(source.needsThisThread);
      return this.#native.serve(handle, { ...settings, ...given, source: opened });
    });
    return this.#started(served, { source, mapping, onFailure }, signal);
  }

  /**
   * Serves memory that is registered with a userfaultfd: of another process that sent it, or of a forked child. Its events
   * are the pager's to read from now on, and the object is closed.
   *
   * If it has `event-fork` in use, each child that its process forks gets a session of its own, which begins with its
   * parent's pages as they are ({@link Session.parent}; the event `'session'`), from the same source, with the same options.
   *
   * @throws {@linkcode UffdError} as {@link Pager.serve}; `ERR_UFFD_REGION` and `ERR_UFFD_PROTOCOL` (a region that cannot
   *   be, or that the source or the memfd does not cover; a memfd that is none, or cannot be written to), `ERR_UFFD_CLONE`
   *   (it has a clone)
   */
  async adopt(uffd: Userfaultfd, options: AdoptOptions): Promise<Session> {
    if (!(uffd instanceof Userfaultfd)) throw wrongType('uffd', 'a Userfaultfd', uffd);
    const { settings, onFailure } = readServeOptions(options, ADOPT);
    const signal = signalOf(options);
    const traces = readTraceOptions('options', options);
    const source = overlaid(options.source, options.overlays);
    const { regions, memfd, pageSize = 4 * KiB, pidfd } = options;
    const checked = readRegions(regions);
    validatePowerOfTwo('options.pageSize', pageSize, 4 * KiB, 1024 * MiB);
    if (pidfd !== undefined) validateFd('options.pidfd', pidfd);
    refuseMemfd(settings.minor, memfd, checked);
    this.#refuseClosed();
    const opened = await source.handle();
    const served = await withTraces(traces, opened, given => {
      this.#refuseClosed();
      const all = { ...settings, ...given, source: opened };
      const adopted = this.#native.adopt(uffd.handle(), checked, pageSize, pidfd, memfd, all);
      if (!adopted.error) {
        uffd.taken();
        this.#foreign.add(adopted.id);
        this.#holdOpen();
      }
      return adopted;
    });
    return this.#started(served, { source, mapping: undefined, onFailure }, signal);
  }

  /**
   * Waits until every session has ended by itself.
   *
   * @param options `timeout`: milliseconds (default: for ever); `signal`: ends the wait with its reason. The sessions go on.
   * @throws {@linkcode UffdError} `ERR_UFFD_TIMEOUT`
   */
  async drain(options: AcceptOptions = {}): Promise<void> {
    const limits = readLimits(options);
    const ended = Promise.all([...this.#sessions.values()].map(async session => session.closed));
    const late = (timeout: number): UffdError =>
      new UffdError('ERR_UFFD_TIMEOUT', `${this.#sessions.size} sessions were alive after ${timeout} ms`);
    await holdOpen(within(ended, limits, late));
  }

  /**
   * Closes every session, then the pager. Resolves when nothing is left. Idempotent: the first call decides.
   *
   * @param options `rest`: what becomes of pages still missing. Default: `'poison'`.
   */
  async close(options: CloseOptions = {}): Promise<void> {
    const rest = restOf(options);
    this.#closing ??= this.#close(rest);
    return this.#closing;
  }

  async #close(rest: NonNullable<CloseOptions['rest']>): Promise<void> {
    while (this.#sessions.size > 0 || this.#starting.size > 0) {
      for (const id of this.#starting.keys()) this.#native.closeSession(id, rest);
      const starting = Array.from(this.#starting.values(), async ({ promise }) => promise);
      await holdOpen(Promise.allSettled(starting));
      await Promise.all([...this.#sessions.values()].map(async session => session.close({ rest })));
    }
    this.#isClosed = true;
    clearInterval(this.#keepAlive);
    this.#reports.stop();
    forgetAtExit(this.#native);
    this.#native.release();
    emitting(() => this.emit('close'));
  }

  /** {@link Pager.close} with its defaults. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Keeps the process alive while other processes are served (the default). */
  ref(): this {
    this.#mayKeepAlive = true;
    this.#holdOpen();
    return this;
  }

  /** Lets the process end although other processes are served. */
  unref(): this {
    this.#mayKeepAlive = false;
    this.#holdOpen();
    return this;
  }

  #holdOpen(): void {
    const hold = this.#mayKeepAlive && this.#foreign.size > 0;
    if (!hold) {
      clearInterval(this.#keepAlive);
      this.#keepAlive = undefined;
    } else {
      // Does nothing but hold the event loop open: native wake-ups do not.
      this.#keepAlive ??= setInterval(() => {}, LONGEST_TIMEOUT);
    }
  }

  #refuseClosed(): void {
    if (this.#closing !== undefined) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the pager is closed');
  }

  async #started(
    served: NativeServed,
    given: Pick<Starting, 'source' | 'mapping' | 'onFailure'>,
    signal: AbortSignal | undefined,
  ): Promise<Session> {
    if (served.error) throw fromNative(served.error);
    const starting = { ...withResolvers<Session>(), ...given };
    this.#starting.set(served.id, starting);
    try {
      return await holdOpen(unlessAborted(starting.promise, signal));
    } catch (error) {
      if (signal?.aborted) this.#native.closeSession(served.id, 'poison');
      throw error;
    }
  }

  #drain(): void {
    for (const notice of this.#native.takeNotices()) this.#take(notice);
  }

  #take(notice: NativeNotice): void {
    if (notice.kind === 'session' && notice.session) {
      const session = new Session(this.#native, notice.session);
      const starting = this.#starting.get(session.id);
      this.#sessions.set(session.id, session);
      this.#starting.delete(session.id);
      if (starting) {
        const { mapping, source } = starting;
        session.fedBy(source, other => mapping?.refuseDeadlock(other.needsThisThread));
        mapping?.servedBy(session);
        this.#policies.set(session.id, starting.onFailure);
        starting.resolve(session);
      } else {
        // A child of a process that is served; of this process's own memory no forks are followed.
        const parent = session.parent ?? -1;
        this.#sessions.get(parent)?.hasForked(session);
        const onFailure = this.#policies.get(parent);
        if (onFailure) this.#policies.set(session.id, onFailure);
        this.#foreign.add(session.id);
        this.#holdOpen();
      }
      tellStarted(session);
      emitting(() => this.emit('session', session));
    } else if (notice.kind === 'held') {
      this.#held(notice);
    } else if (notice.kind === 'ended') {
      const id = notice.id ?? -1;
      const session = this.#sessions.get(id);
      const starting = this.#starting.get(id);
      this.#sessions.delete(id);
      this.#starting.delete(id);
      this.#policies.delete(id);
      this.#foreign.delete(id);
      this.#holdOpen();
      starting?.reject(neverStarted(notice, starting.source));
      if (!session) return;
      session.ended(notice);
      this.#reports.ended(session);
    }
  }

  #held(notice: NativeNotice): void {
    const id = notice.id ?? -1;
    const session = this.#sessions.get(id);
    const starting = this.#starting.get(id);
    const onFailure = this.#policies.get(id) ?? starting?.onFailure;
    if (notice.asks) {
      if (onFailure)
        void decide(this.#native, notice, onFailure, session, session?.source ?? starting?.source);
    } else if (session) {
      const hold = session.wasHeld(notice);
      emitting(() => this.emit('held', session, hold));
    }
  }
}

/** Why there is no session: it has ended before it was full. */
function neverStarted({ error, reason }: NativeNotice, source: PageSource): UffdError {
  if (error) return explained(error, source);
  return reason === 'peer-exited'
    ? new UffdError('ERR_UFFD_CLOSED', 'the process exited before all of its memory was there')
    : new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the pager was closed before all of the memory was there');
}
