/** Programs of `inside/`: what is measured in JavaScript, each run in a process of its own. */

import { fileURLToPath } from 'node:url';

import type { Contender } from './case.js';
import { output } from './child.js';
import type { Run } from './run.js';

/** The command that runs a program of `inside/`. */
export const inside = (name: string, ...words: string[]): string[] => [
  process.execPath,
  fileURLToPath(new URL(`../inside/${name}.js`, import.meta.url)),
  ...words,
];

/**
 * A program that prints numbers: each is a figure of that name; what has no name is the result. One that has `both` may use the
 * CPU of who faults as well.
 */
export const printing =
  (
    command: (run: Run) => readonly string[],
    names: readonly string[],
    bytes: number,
    both = false,
  ): Contender =>
  async run => {
    await run.warm(bytes);
    const { faulter, handler } = run.cpus;
    const cpu = both && faulter !== handler ? `${faulter},${handler}` : handler;
    const words = (await output(cpu, command(run))).split(' ');
    const figures = Object.fromEntries(names.map((name, index) => [name, Number(words[index])]));
    const rest = words.slice(names.length);
    return rest.length > 0 ? { figures, result: rest.join(' ') } : { figures };
  };
