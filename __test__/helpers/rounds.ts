/** Rounds that must leave nothing behind, and what a process has: for tests, and for longer soaks of the same. */

import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { setImmediate, setTimeout } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';

import { MemoryMapping, MiB, Userfaultfd } from 'userfaultfd';

const PAGE = 4096;
/** A worker that does not end in this time hangs. */
const PATIENCE = 20_000;

/** What a process has of the system. */
export interface Holdings {
  /** Without the program's own files: a worker that is terminated while Node loads one leaves it open. */
  fds: number;
  /** Without those of the package's pools, which are bounded and end when they have had nothing to do for 2 s. */
  threads: number;
  vmas: number;
  /** Resident memory. */
  bytes: number;
}

function linkOf(fd: string): string {
  try {
    return readlinkSync(`/proc/self/fd/${fd}`);
  } catch {
    // The one that listed the others.
    return '';
  }
}

function nameOf(thread: string): string {
  try {
    return readFileSync(`/proc/self/task/${thread}/comm`, 'utf8').trim();
  } catch {
    // It has ended meanwhile.
    return 'uffd-job';
  }
}

/** What this process has, by /proc. */
export function holdings(): Holdings {
  return {
    fds: readdirSync('/proc/self/fd').filter(fd => !/\.c?js$/.test(linkOf(fd))).length,
    threads: readdirSync('/proc/self/task').filter(id => nameOf(id) !== 'uffd-job').length,
    vmas: readFileSync('/proc/self/maps', 'latin1').trimEnd().split('\n').length,
    bytes: process.memoryUsage.rss(),
  };
}

/** What is more than the collector's and the allocator's coming and going can explain; empty when all is well. */
export function leaked(before: Holdings, after: Holdings): string[] {
  const bounds: Holdings = { fds: 0, threads: 0, vmas: 200, bytes: 64 * MiB };
  return (Object.keys(bounds) as (keyof Holdings)[])
    .filter(what => after[what] - before[what] > bounds[what])
    .map(what => `${what}: ${before[what]} before, ${after[what]} after`);
}

/** One life of a userfaultfd, from creating to closing. */
export function createRegisterClose(): void {
  const uffd = Userfaultfd.create();
  const mapping = MemoryMapping.anonymous(4 * PAGE);
  uffd.register(mapping.range(), { modes: ['missing', 'write-protect'] });
  uffd.zero(mapping.range(0, PAGE));
  uffd.close();
  mapping.close();
}

/** Many such lives, with a turn of the event loop now and then, in which the engine finalizes what it has collected. */
export async function manyLives(count: number): Promise<void> {
  for (let round = 1; round <= count; round += 1) {
    createRegisterClose();
    if (round % 100 === 0) await setImmediate();
  }
}

/** A generator of numbers from 0 to 1 that gives the same ones for the same seed (mulberry32). */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Starts workers with faults pending, and terminates each at a moment of its own: also before it has done anything. */
export async function terminateWorkers(count: number, next: () => number): Promise<void> {
  const ended = Array.from({ length: count }, async () => {
    const worker = new Worker(join(import.meta.dirname, '..', 'fixtures', 'faulting.js'), {
      workerData: { faults: Math.floor(next() * 4) },
    });
    const failed = once(worker, 'error').then(([error]) => {
      throw error;
    });
    // Half of the moments lie behind its start, the others anywhere.
    if (next() < 0.5) await Promise.race([once(worker, 'message'), failed]);
    await Promise.race([setTimeout(next() * 60), failed]);
    const over = new AbortController();
    const late = setTimeout(PATIENCE, undefined, { signal: over.signal }).then(() => {
      throw new Error('a worker that was terminated has not ended');
    });
    await Promise.race([worker.terminate(), late]);
    over.abort();
    await late.catch((error: unknown) => {
      if (!over.signal.aborted) throw error;
    });
  });
  await Promise.all(ended);
}
