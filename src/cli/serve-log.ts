/** What `serve` says: to a person at a terminal, or to a program that reads lines. */

import process from 'node:process';
import type { Writable } from 'node:stream';
import type { WriteStream } from 'node:tty';

import colors from 'picocolors';

import type { RejectedConnection } from '../firecracker-events.js';
import type { Session, SessionEnd, SessionHold } from '../session.js';
import type { RecordingStats } from '../trace-options.js';
import { MiB } from '../units.js';

/** Where news of a server goes. */
export interface Log {
  listening(socket: string, memory: string, pager: Daemon | undefined): void;
  started(session: Session): void;
  finished(session: Session, end: SessionEnd): void;
  held(session: Session, hold: SessionHold): void;
  resumed(session: Session): void;
  rejected(rejection: RejectedConnection): void;
  /** Once a second. */
  progress(sessions: readonly Session[]): void;
  /** `how`: what becomes of them. */
  ending(signal: string, sessions: number, how: 'poison' | 'kill'): void;
  /** This ends, and nothing of what the daemon serves. */
  left(signal: string, sessions: number): void;
  ended(): void;
}

/** The pager in a process of its own. */
export interface Daemon {
  /** Where it listens. */
  readonly socketPath: string;
  readonly daemonPid: number;
}

interface Totals {
  sessions: number;
  faults: number;
  bytesInstalled: number;
  pagesMissing: number;
}

function totals(sessions: readonly Session[]): Totals {
  const sum = { sessions: sessions.length, faults: 0, bytesInstalled: 0, pagesMissing: 0 };
  for (const session of sessions) {
    const stats = session.stats();
    const pages = session.regions.reduce((all, { length }) => all + length / session.pageSize, 0);
    sum.faults += stats.faults;
    sum.bytesInstalled += stats.bytesInstalled;
    sum.pagesMissing += Math.max(0, pages - stats.pagesInstalled - stats.pagesZero - stats.pagesZeroed);
  }
  return sum;
}

/** Bytes that wait for a reader who has stopped to read; what comes then is not told. */
const MOST_WAITING = 1 * MiB;

/** One JSON object a line; `event` says which. Of a reader who is too slow it tells how much was `dropped`: progress at once, else at a limit. */
export class JsonLog implements Log {
  readonly #out: Writable;
  #dropped = 0;

  constructor(out: Writable) {
    this.#out = out;
  }

  listening(socket: string, memory: string, pager: Daemon | undefined): void {
    const daemon = pager && { pager: pager.socketPath, daemon: pager.daemonPid };
    this.#write('listening', { socket, memory, pid: process.pid, ...daemon });
  }

  started({ id, peer, regions }: Session): void {
    const bytes = regions.reduce((sum, { length }) => sum + length, 0);
    this.#write('session', { session: id, peer, bytes });
  }

  finished(session: Session, { reason, error }: SessionEnd): void {
    const { faults, bytesInstalled, pagesPoisoned, pagesRemoved, recording, replay } = session.stats();
    this.#write('end', {
      session: session.id,
      peer: session.peer,
      reason,
      ...(error ? { code: error.code, message: error.message } : {}),
      faults,
      bytesInstalled,
      pagesPoisoned,
      pagesRemoved,
      ...(recording ? { recording: told(recording) } : {}),
      ...(replay ? { replay } : {}),
    });
  }

  held({ id, peer }: Session, { reason, error, until }: SessionHold): void {
    this.#write('held', {
      session: id,
      peer,
      reason,
      ...(error ? { code: error.code, message: error.message } : {}),
      ...(until ? { until: until.toISOString() } : {}),
    });
  }

  resumed({ id, peer }: Session): void {
    this.#write('resumed', { session: id, peer });
  }

  rejected({ error, peer }: RejectedConnection): void {
    this.#write('rejected', { code: error.code, message: error.message, ...(peer ? { peer } : {}) });
  }

  progress(sessions: readonly Session[]): void {
    this.#write('progress', totals(sessions));
  }

  ending(signal: string, sessions: number, how: 'poison' | 'kill'): void {
    this.#write('ending', { signal, sessions, onFailure: how });
  }

  left(signal: string, sessions: number): void {
    this.#write('left', { signal, sessions });
  }

  ended(): void {
    this.#write('closed', {});
  }

  #write(event: string, details: object): void {
    const { writableLength } = this.#out;
    if (writableLength > (event === 'progress' ? 0 : MOST_WAITING)) {
      this.#dropped += 1;
      return;
    }
    if (this.#dropped > 0 && writableLength === 0) {
      this.#put('dropped', { lines: this.#dropped });
      this.#dropped = 0;
    }
    this.#put(event, details);
  }

  #put(event: string, details: object): void {
    this.#out.write(`${JSON.stringify({ at: new Date().toISOString(), event, ...details })}\n`);
  }
}

/** An error's message is not among what JSON takes of it. */
function told({ error, ...recording }: RecordingStats): object {
  if (error === undefined) return recording;
  const { code, message, errno, syscall } = error;
  return { ...recording, error: { code, message, errno, syscall } };
}

/** Lines for what happens, and below them one that is written over as memory arrives. */
export class TerminalLog implements Log {
  readonly #out: WriteStream;
  #last = { at: performance.now(), faults: 0 };

  constructor(out: WriteStream) {
    this.#out = out;
  }

  listening(socket: string, memory: string, pager: Daemon | undefined): void {
    const by = pager ? ` by the daemon at ${pager.socketPath}` : '';
    this.#line(`${colors.green('listening')} on ${colors.bold(socket)}, serving ${memory}${by}`);
  }

  started({ id, peer, regions }: Session): void {
    const bytes = regions.reduce((sum, { length }) => sum + length, 0);
    this.#line(`${colors.green('session')} ${id}: process ${peer.pid}, ${(bytes / MiB).toFixed(0)} MiB`);
  }

  finished(session: Session, { reason, error }: SessionEnd): void {
    const { faults, bytesInstalled } = session.stats();
    const why = error ? colors.red(`${reason} (${error.code}: ${error.message})`) : reason;
    this.#line(
      `${colors.dim('end')} of session ${session.id}: ${why}, ${faults} faults, ${(bytesInstalled / MiB).toFixed(1)} MiB`,
    );
  }

  held({ id, peer }: Session, { reason, error }: SessionHold): void {
    const why = error ? `${reason} (${error.code}: ${error.message})` : reason;
    this.#line(`${colors.yellow('held')} session ${id}, process ${peer.pid}: ${why}; SIGUSR2 resumes it`);
  }

  resumed({ id }: Session): void {
    this.#line(`${colors.green('resumed')} session ${id}`);
  }

  rejected({ error, peer }: RejectedConnection): void {
    const who = peer ? `process ${peer.pid}` : 'a connection';
    this.#line(`${colors.red('rejected')} ${who}: ${error.code}: ${error.message}`);
  }

  progress(sessions: readonly Session[]): void {
    const { faults, bytesInstalled, pagesMissing } = totals(sessions);
    const now = performance.now();
    const rate = Math.max(0, faults - this.#last.faults) / ((now - this.#last.at) / 1000);
    this.#last = { at: now, faults };
    const line = `${sessions.length} sessions, ${(bytesInstalled / MiB).toFixed(1)} MiB, ${rate.toFixed(0)} faults/s, ${pagesMissing} pages missing`;
    this.#out.clearLine(0);
    this.#out.cursorTo(0);
    this.#out.write(colors.dim(line.slice(0, (this.#out.columns || 80) - 1)));
  }

  ending(signal: string, sessions: number, how: 'poison' | 'kill'): void {
    this.#line(`${signal}: ending ${sessions} sessions (${how})`);
  }

  left(signal: string, sessions: number): void {
    this.#line(`${signal}: ${sessions} sessions are left to the daemon`);
  }

  ended(): void {
    this.#line('closed');
  }

  #line(text: string): void {
    this.#out.clearLine(0);
    this.#out.cursorTo(0);
    this.#out.write(`${text}\n`);
  }
}
