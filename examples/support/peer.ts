/**
 * Drives `userfaultfd-peer`: a separate process that behaves as Firecracker does when it restores a snapshot, and shares
 * no code with the pager.
 */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

/** Where the executable is: cargo's output folder, unless `UFFD_PEER` names another. */
export const PEER: string =
  process.env['UFFD_PEER'] ??
  `${process.env['CARGO_TARGET_DIR'] ?? fileURLToPath(new URL('../../../target', import.meta.url))}/release/userfaultfd-peer`;

/** A region as the peer mapped it. */
export interface PeerRegion {
  base: string;
  size: number;
  offset: number;
  page_size: number;
}

/** The line the peer prints before it hands over its memory. */
export interface Ready {
  pid: number;
  regions: PeerRegion[];
  /** Pages of its regions that are resident. */
  resident: number;
}

/** What the commands answer. Times are nanoseconds, measured in the peer. */
export interface Answers {
  touch: {
    pages: number;
    first_ns: number;
    median_ns: number;
    p99_ns: number;
    max_ns: number;
    total_ns: number;
    bytes: number;
  };
  hash: { sha256: string; bytes: number; ns: number };
  read: { hex: string };
  write: object;
  discard: { ns: number };
  'discard-random': { pages: number; ns: number };
  zeros: { pages: number; nonzero: number; first_bad: number | null };
  resident: { pages: number; rss_kib: number };
  compare: { pages: number; different: number; first_bad: number | null };
  probe: { result: 'ok' | 'efault'; hex?: string };
  fork: { pid: number };
  /** How its child has ended. */
  join: { status?: number; signal?: number };
}

/** How the peer ended. */
export interface PeerEnd {
  status: number | null;
  signal: NodeJS.Signals | null;
  stderr: string;
}

/** A running peer. */
export class Peer {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  /** Resolves when the process has ended. */
  readonly ended: Promise<PeerEnd>;

  /** Starts it with these command-line arguments. */
  constructor(args: readonly string[], executable: string = PEER) {
    this.#child = spawn(executable, args, { stdio: ['pipe', 'pipe', 'pipe'] });
    const { stdout, stderr, stdin } = this.#child;
    if (stdout === null || stderr === null || stdin === null)
      throw new Error('a pipe to the peer is missing');
    // A peer that was killed does not read its commands any more; how it ended is what matters.
    stdin.on('error', () => {});
    let said = '';
    stderr.setEncoding('utf8').on('data', (text: string) => (said += text));
    this.#lines = createInterface({ input: stdout })[Symbol.asyncIterator]();
    this.ended = once(this.#child, 'close').then(([status, signal]) => ({
      status: status as number | null,
      signal: signal as NodeJS.Signals | null,
      stderr: said,
    }));
  }

  get pid(): number {
    return this.#child.pid ?? -1;
  }

  /** The line it prints when its memory is mapped and registered. */
  async ready(): Promise<Ready> {
    return (await this.#line()) as Ready;
  }

  /** Sends one command and waits for its answer. */
  async ask<C extends keyof Answers>(command: C, ...words: (string | number)[]): Promise<Answers[C]> {
    this.send(command, ...words);
    return (await this.#line()) as Answers[C];
  }

  /** Has its forked child carry out a command. */
  async askChild<C extends keyof Answers>(command: C, ...words: (string | number)[]): Promise<Answers[C]> {
    this.send('child', command, ...words);
    return (await this.#line()) as Answers[C];
  }

  /** Sends one command without waiting. */
  send(command: string, ...words: (string | number)[]): void {
    this.#child.stdin?.write(`${[command, ...words].join(' ')}\n`);
  }

  /** The answer to the oldest command that has not been answered. */
  async answer<C extends keyof Answers>(): Promise<Answers[C]> {
    return (await this.#line()) as Answers[C];
  }

  kill(signal: NodeJS.Signals = 'SIGKILL'): void {
    this.#child.kill(signal);
  }

  /** Lets it end by itself. */
  async exit(): Promise<PeerEnd> {
    this.send('exit');
    return this.ended;
  }

  async #line(): Promise<unknown> {
    const next = await this.#lines.next();
    if (next.done === true) {
      const { status, signal, stderr } = await this.ended;
      throw new Error(
        `the peer ended (${signal ?? `status ${status}`}) instead of answering: ${stderr.trim()}`,
      );
    }
    const answer = JSON.parse(next.value) as { error?: string };
    if (answer.error !== undefined) throw new Error(`the peer refused: ${answer.error}`);
    return answer;
  }
}
