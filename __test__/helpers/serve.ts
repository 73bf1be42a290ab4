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

/** What it has instead of a pipe that is read, and the test's own. */
export interface Outputs {
  /** A descriptor. Nothing can be had by {@link Serve.next} then. */
  stdout?: number;
  /** What it complains about is kept ({@link Serve.complaints}) instead of shown. */
  stderr?: 'pipe';
}

/** The command. */
export class Serve {
  readonly child: ChildProcess;
  readonly ended: Promise<unknown[]>;
  readonly lines: Line[] = [];
  /** On stderr. */
  complaints = '';
  readonly #reader: AsyncIterator<string> | undefined;

  constructor(t: ExecutionContext, args: string[], { stdout: output, stderr: errors }: Outputs = {}) {
    this.child = spawn(process.execPath, [MAIN, 'serve', ...args], {
      stdio: ['ignore', output ?? 'pipe', errors ?? 'inherit'],
    });
    this.ended = once(this.child, 'close');
    const { stdout, stderr } = this.child;
    if (stdout) this.#reader = createInterface({ input: stdout })[Symbol.asyncIterator]();
    stderr?.setEncoding('utf8').on('data', (text: string) => (this.complaints += text));
    t.teardown(async () => {
      this.child.kill('SIGKILL');
      // A daemon that it has spawned has it, too.
      stderr?.destroy();
      await this.ended;
    });
  }

  /** The next line of this kind. */
  async next(event: string): Promise<Line> {
    for (;;) {
      const next = await this.#reader?.next();
      if (next === undefined || next.done === true)
        throw new Error(`no line '${event}' in ${JSON.stringify(this.lines)}`);
      const line = JSON.parse(next.value) as Line;
      this.lines.push(line);
      if (line.event === event) return line;
    }
  }
}
