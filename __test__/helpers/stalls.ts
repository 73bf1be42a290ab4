/** What the machine itself does to who waits for nothing but its turn. */

import { Worker } from 'node:worker_threads';

import type { ExecutionContext } from 'ava';

/** CLOCK_MONOTONIC, which all processes have in common, in milliseconds. */
export const monotonic = (): number => Number(process.hrtime.bigint()) / 1e6;

/** Wants to run each millisecond, and notes how much later it does. */
const WATCHING = `
  const { workerData } = require('node:worker_threads');
  const [never, worst] = [new Int32Array(workerData, 0, 1), new Float64Array(workerData, 8, 1)];
  for (let last = performance.now(); ; ) {
    Atomics.wait(never, 0, 0, 1);
    const now = performance.now();
    worst[0] = Math.max(worst[0], now - last - 1);
    last = now;
  }
`;

/** Measures, until the test ends, for how long a thread of this process is not let run. */
export function watchStalls(t: ExecutionContext): { forget: () => void; worst: () => number } {
  const shared = new SharedArrayBuffer(16);
  const worst = new Float64Array(shared, 8, 1);
  const worker = new Worker(WATCHING, { eval: true, workerData: shared });
  t.teardown(async () => worker.terminate());
  return {
    forget: () => {
      worst[0] = 0;
    },
    worst: () => worst[0] ?? 0,
  };
}
