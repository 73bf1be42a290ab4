import { tellStats } from './diagnostics.js';
import { emitting } from './emitting.js';
import { LONGEST_TIMEOUT } from './limits.js';
import type { Session } from './session.js';
import type { SessionStats } from './stats.js';
import { validateInteger } from './validate.js';

/** @hidden */
export function readStatsInterval(interval: unknown): number | undefined {
  if (interval === undefined) return undefined;
  return validateInteger('options.statsInterval', interval, 10, LONGEST_TIMEOUT);
}

/** @hidden Tells the counters of sessions: now and then, and when one has ended. */
export class StatsReports {
  readonly #tell: (session: Session, stats: SessionStats) => void;
  readonly #timer: NodeJS.Timeout | undefined;

  /** Without an interval it tells nothing. Does not keep the process alive. */
  constructor(
    interval: number | undefined,
    sessions: () => Iterable<Session>,
    emit: (session: Session, stats: SessionStats) => void,
  ) {
    this.#tell = emit;
    if (interval === undefined) return;
    this.#timer = setInterval(() => {
      for (const session of sessions()) this.#report(session);
    }, interval).unref();
  }

  /** The last counters of a session. */
  ended(session: Session): void {
    if (this.#timer !== undefined) this.#report(session);
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  #report(session: Session): void {
    const stats = session.stats();
    tellStats(session, stats);
    emitting(() => this.#tell(session, stats));
  }
}
