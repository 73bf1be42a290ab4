/** The program of the process in which one thing is measured: `measure.js TASK` prints what it came to, as JSON. */

import process from 'node:process';

import { explain } from '../explain.js';
import { measure, type Task } from './works.js';

async function main(): Promise<void> {
  try {
    const figures = await measure(JSON.parse(process.argv[2] ?? '') as Task);
    process.stdout.write(JSON.stringify(figures));
  } catch (error) {
    process.stderr.write(explain(error));
    process.exitCode = 1;
  }
}

void main();
