import { EventEmitter } from 'node:events';

import type { NativeNotice, NativePolicy, NativeServed } from '#native';

import { decide } from './deciding.js';
import { tellStarted } from './diagnostics.js';
import { emitting } from './emitting.js';
import { fromNative, UffdError } from './errors.js';
import { abandonAtExit, forgetAtExit, servesOthers } from './exit.js';
import { holdOpen } from './hold-open.js';
import {
  type AcceptOptions,
  LONGEST_TIMEOUT,
  readLimits,
  unlessAborted,
  within,
  withResolvers,
} from './limits.js';
import type { MemoryMapping } from './mapping.js';
import type { OnFailure, Rest } from './policy.js';
import {
  type CloseOptions,
  explained,
  restOf,
  Session,
  type SessionHold,
  type SessionOwner,
} from './session.js';
import type { PageSource } from './sources.js';
import { StatsReports } from './stats-reports.js';
import type { SessionStats } from './stats.js';

/** What drives sessions: the addon, or a connection to a daemon. @hidden */
export interface PagingEngine extends SessionOwner {
  decide(session: number, policy: NativePolicy): void;
  takeNotices(): NativeNotice[];
  abandon(): void;
  release(): void;
  /** Another process serves, and goes on when this one ends. */
  readonly isElsewhere?: true;
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

/** A session of which the engine has not told yet. */
interface Starting {
  promise: Promise<Session>;
  resolve: (session: Session) => void;
  reject: (reason: unknown) => void;
  mapping: MemoryMapping | undefined;
  source: PageSource;
  onFailure: OnFailure;
}

/**
 * What {@link Pager} and {@link PagerClient} have in common: sessions, their beginnings and ends.
 */
export abstract class Paging extends EventEmitter<PagerEvents> {
  /** @hidden */
  protected readonly engine: PagingEngine;
  readonly #sessions = new Map<number, Session>();
  readonly #starting = new Map<number, Starting>();
  readonly #foreign = new Set<number>();
  readonly #policies = new Map<number, OnFailure>();
  #keepAlive: NodeJS.Timeout | undefined;
  #mayKeepAlive = true;
  #closing: Promise<void> | undefined;
  #isClosed = false;
  readonly #reports: StatsReports;

  /** @hidden */
  protected constructor(start: (notify: () => void) => PagingEngine, statsInterval: number | undefined) {
    super();
    this.engine = start(() => this.look());
    abandonAtExit(this.engine);
    this.#reports = new StatsReports(
      statsInterval,
      () => this.#sessions.values(),
      (...told) => this.emit('stats', ...told),
    );
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

  async #close(rest: Rest): Promise<void> {
    await this.closeSessions(rest);
    this.finish();
  }

  /** @hidden */
  protected async closeSessions(rest: Rest): Promise<void> {
    while (this.#sessions.size > 0 || this.#starting.size > 0) {
      for (const id of this.#starting.keys()) this.engine.closeSession(id, rest);
      const starting = Array.from(this.#starting.values(), async ({ promise }) => promise);
      await holdOpen(Promise.allSettled(starting));
      await Promise.all([...this.#sessions.values()].map(async session => session.close({ rest })));
    }
  }

  /** @hidden Nothing of it is left. */
  protected finish(): void {
    if (this.#isClosed) return;
    this.#closing ??= Promise.resolve();
    this.#isClosed = true;
    clearInterval(this.#keepAlive);
    this.#reports.stop();
    forgetAtExit(this.engine);
    this.engine.release();
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

  /** @hidden Gives them to somebody else, who hears of them from now on. */
  protected handOver(ids: readonly number[]): Session[] {
    return ids.flatMap(id => {
      const session = this.#sessions.get(id);
      this.#sessions.delete(id);
      this.#policies.delete(id);
      this.#foreign.delete(id);
      this.#holdOpen();
      return session ?? [];
    });
  }

  #holdOpen(): void {
    if (!this.engine.isElsewhere) servesOthers(this.engine, this.#foreign.size > 0);
    const hold = this.#mayKeepAlive && this.#foreign.size > 0;
    if (!hold) {
      clearInterval(this.#keepAlive);
      this.#keepAlive = undefined;
    } else {
      // Does nothing but hold the event loop open: native wake-ups do not.
      this.#keepAlive ??= setInterval(() => {}, LONGEST_TIMEOUT);
    }
  }

  /** @hidden */
  protected refuseClosed(): void {
    if (this.#closing !== undefined) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the pager is closed');
  }

  /** @hidden Of another process: it keeps this one alive. */
  protected isForeign(id: number): void {
    this.#foreign.add(id);
    this.#holdOpen();
  }

  /** @hidden */
  protected async started(
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
      if (signal?.aborted) this.engine.closeSession(served.id, 'poison');
      throw error;
    }
  }

  /** @hidden Looks at what has happened. */
  protected look(): void {
    for (const notice of this.engine.takeNotices()) this.#take(notice);
  }

  #take(notice: NativeNotice): void {
    if (notice.kind === 'session' && notice.session) {
      const session = new Session(this.engine, notice.session);
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
    } else if (notice.kind === 'resumed') {
      this.#sessions.get(notice.id ?? -1)?.wasResumed();
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
        void decide(this.engine, notice, onFailure, session, session?.source ?? starting?.source);
    } else if (session) {
      const hold = session.wasHeld(notice);
      if (hold) emitting(() => this.emit('held', session, hold));
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
