/** `userfaultfd serve`, running; it is ended with the test. */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import type { ExecutionContext } from 'ava';

/** The command line. */
export const MAIN: string = fileURLToPath(new URL('../../../dist/src/cli/main.js', import.meta.url));

/** What it says. */
export interface Line {
  event: string;
  [detail: string]: unknown;
}

/** The command. */
export class Serve {
  readonly child: ChildProcess;
  readonly ended: Promise<unknown[]>;
  readonly lines: Line[] = [];
  readonly #reader: AsyncIterator<string>;

  constructor(t: ExecutionContext, args: string[]) {
    this.child = spawn(process.execPath, [MAIN, 'serve', ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
    this.ended = once(this.child, 'close');
    if (this.child.stdout === null) throw new Error('a pipe is missing');
    this.#reader = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
    t.teardown(async () => {
      this.child.kill('SIGKILL');
      await this.ended;
    });
  }

  /** The next line of this kind. */
  async next(event: string): Promise<Line> {
    for (;;) {
      const next = await this.#reader.next();
      if (next.done === true) throw new Error(`no line '${event}' in ${JSON.stringify(this.lines)}`);
      const line = JSON.parse(next.value) as Line;
      this.lines.push(line);
      if (line.event === event) return line;
    }
  }
}
