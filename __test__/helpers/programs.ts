/** Programs of a test, which are ended with it. */

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import type { ExecutionContext } from 'ava';

/** One that runs. */
export interface Running {
  /** Says something to it. */
  say: (text: string) => void;
  /** Its first line. */
  said: string;
  /** Its status, and the signal that it was ended by. */
  ended: Promise<unknown[]>;
}

/** Starts one of the fixtures, and waits until it says something. */
export async function program(t: ExecutionContext, fixture: string, ...args: string[]): Promise<Running> {
  const path = fileURLToPath(new URL(`../fixtures/${fixture}.js`, import.meta.url));
  const child = spawn(process.execPath, [path, ...args], { stdio: ['pipe', 'pipe', 'ignore'] });
  t.teardown(() => child.kill('SIGKILL'));
  const ended = once(child, 'exit');
  const [said] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
  return { say: text => void child.stdin.write(text), said, ended };
}
