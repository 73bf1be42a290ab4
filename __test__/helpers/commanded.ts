/** A process that obeys lines `ID COMMAND WORDS...` in any order, and answers each with `ID ok WORDS...` or `ID error TEXT`. */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';

/** How it ended. */
export interface Ending {
  status: number | null;
  signal: NodeJS.Signals | null;
}

/** See above. */
export class Commanded {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<
    number,
    { resolve: (words: string[]) => void; reject: (error: Error) => void }
  >();
  #last = 0;
  /** Resolves when the process has ended, after every command that was not answered has been rejected. */
  readonly ended: Promise<Ending>;

  /** Starts it. */
  constructor(executable: string, args: readonly string[]) {
    // Apart, so that a terminal's Ctrl+C is heard by who commands it; that is gone when its input ends.
    const child = spawn(executable, args, { stdio: ['pipe', 'pipe', 'inherit'], detached: true });
    this.#child = child;
    // What was killed does not read its commands any more.
    child.stdin.on('error', () => {});
    createInterface({ input: child.stdout }).on('line', line => {
      const [id, how, ...words] = line.split(' ');
      const one = this.#waiting.get(Number(id));
      this.#waiting.delete(Number(id));
      if (how === 'ok') one?.resolve(words);
      else one?.reject(new Error(words.join(' ')));
    });
    // Everything that it has said has been read then.
    this.ended = once(child, 'close').then(([status, signal]) => {
      for (const one of this.#waiting.values()) one.reject(new Error(`it ended: ${signal ?? status}`));
      this.#waiting.clear();
      return { status: status as number | null, signal: signal as NodeJS.Signals | null };
    });
  }

  get pid(): number {
    return this.#child.pid ?? -1;
  }

  /** Has it do something; the words of its answer. */
  async ask(command: string, ...words: (string | number | bigint)[]): Promise<string[]> {
    this.#last += 1;
    const id = this.#last;
    return new Promise((resolve, reject) => {
      if (this.#child.exitCode !== null || this.#child.signalCode !== null) {
        reject(new Error('it has ended'));
        return;
      }
      this.#waiting.set(id, { resolve, reject });
      this.#child.stdin?.write(`${[id, command, ...words].join(' ')}\n`);
    });
  }

  /** Lets it end by itself: it hears nothing more. */
  letGo(): void {
    this.#child.stdin?.end();
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }
}
