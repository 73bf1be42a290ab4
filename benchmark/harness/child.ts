/** Programs that are driven by lines: they say JSON objects, one a line, and end when their input does. */

import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { promisify } from 'node:util';

import { pinned } from './placement.js';

const execute = promisify(execFile);

/** A program that is running. */
export class Child {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  readonly #ended: Promise<unknown[]>;

  constructor(cpu: number | undefined, command: readonly string[]) {
    const [program, ...args] = pinned(cpu, command);
    this.#child = spawn(program, args, { stdio: ['pipe', 'pipe', 'inherit'] });
    const { stdout, stdin } = this.#child;
    if (stdout === null || stdin === null) throw new Error('a pipe is missing');
    stdin.on('error', () => {}); // it may have ended; how is what its missing answer tells
    this.#lines = createInterface({ input: stdout })[Symbol.asyncIterator]();
    this.#ended = once(this.#child, 'close');
  }

  /** The next line that it says. */
  async says<T extends object>(): Promise<T> {
    const next = await this.#lines.next();
    if (next.done !== true) return JSON.parse(next.value) as T;
    const [status, signal] = await this.#ended;
    throw new Error(
      `${this.#child.spawnargs.join(' ')} ended (${String(signal ?? status)}) without an answer`,
    );
  }

  /** Sends a line. */
  tell(line: string): void {
    this.#child.stdin?.write(`${line}\n`);
  }

  get pid(): number {
    return this.#child.pid ?? -1;
  }

  /** Ends it, however it is. */
  async end(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.#ended;
  }
}

/** Runs a program to its end: what it has printed. */
export async function output(cpu: number | string | undefined, command: readonly string[]): Promise<string> {
  const [program, ...args] = pinned(cpu, command);
  const { stdout } = await execute(program, args, { maxBuffer: 1 << 26 });
  return stdout.trim();
}
