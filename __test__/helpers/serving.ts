/** A server, an image and peers for one test; everything is gone when it ends. */

import { randomBytes } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';

import type { ExecutionContext } from 'ava';
import {
  type FirecrackerServer,
  type FirecrackerServerOptions,
  KiB,
  MiB,
  type RejectedConnection,
  serveFirecracker,
  type Session,
  type SessionStats,
} from 'userfaultfd';

import { whyNoUserfaultfd } from '../../examples/support/machine.js';
import { Peer, type Ready } from '../../examples/support/peer.js';

export const PAGE: number = 4 * KiB;
/** No multiple of 2 MiB, nor of the 64 KiB of a window. */
export const IMAGE_SIZE: number = 7 * MiB + 3 * PAGE;

/** Long enough for a machine that is busy with other things. */
const PATIENCE = 10_000;

/** A folder of the test's own. */
export function folder(t: ExecutionContext): string {
  const path = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  t.teardown(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

/** A file of random bytes: no page is like another, none is zero. */
export function image(t: ExecutionContext, size: number = IMAGE_SIZE): { path: string; bytes: Buffer } {
  const path = join(folder(t), 'image');
  const bytes = randomBytes(size);
  writeFileSync(path, bytes);
  return { path, bytes };
}

/** A listening server. */
export interface Serving {
  server: FirecrackerServer;
  socketPath: string;
  memory: string;
  bytes: Buffer;
  /** Starts a peer and waits until it is served. */
  connect: (...args: string[]) => Promise<{ peer: Peer; ready: Ready; session: Session }>;
  /** Starts a peer without waiting. */
  start: (...args: string[]) => Peer;
}

/** Starts a server over an image of random bytes. */
export async function serving(
  t: ExecutionContext,
  options: Partial<FirecrackerServerOptions> & { size?: number } = {},
): Promise<Serving> {
  const { size = IMAGE_SIZE, ...rest } = options;
  const { path: memory, bytes } = image(t, size);
  const socketPath = join(folder(t), 'vm.sock');
  const server = await serveFirecracker({ socketPath, memory, ...rest });
  t.teardown(async () => server.close());
  const start = (...args: string[]): Peer => {
    const peer = new Peer(['--socket', socketPath, ...args]);
    t.teardown(async () => {
      peer.kill();
      await peer.ended;
    });
    return peer;
  };
  return {
    server,
    socketPath,
    memory,
    bytes,
    start,
    connect: async (...args) => {
      const peer = start(...(args.includes('--region') ? args : ['--region', `${size}`, ...args]));
      const ready = await peer.ready();
      return { peer, ready, session: await server.accept({ timeout: PATIENCE }) };
    },
  };
}

/** The next rejection of a server. */
export async function nextRejection(server: FirecrackerServer): Promise<RejectedConnection> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error('nothing was rejected')), PATIENCE);
    server.once('rejected', rejection => {
      clearTimeout(timer);
      resolve(rejection);
    });
  });
}

/** Descriptors that are open in this process, and its threads. */
export function resources(): { fds: string[]; threads: string[] } {
  const threads = readdirSync('/proc/self/task').map(id =>
    readFileSync(`/proc/self/task/${id}/comm`, 'utf8').trim(),
  );
  return { fds: readdirSync('/proc/self/fd'), threads: threads.filter(name => name.startsWith('uffd')) };
}

/** Says why the test cannot run here, and whether it can. */
export function canRun(t: ExecutionContext): boolean {
  const problem = whyNoUserfaultfd();
  if (problem === undefined) return true;
  t.log(`skipped: ${problem.split('\n')[0]}`);
  t.pass();
  return false;
}

const POOL = '/proc/sys/vm/nr_hugepages';

/** A figure of the 2 MiB pool, from /proc/meminfo. */
function poolFigure(name: 'Total' | 'Free' | 'Rsvd'): number {
  return Number(
    new RegExp(`^HugePages_${name}:\\s*(\\d+)`, 'm').exec(readFileSync('/proc/meminfo', 'utf8'))?.[1],
  );
}

/**
 * Makes exactly `count` pages of 2 MiB free for the test, where that is allowed and they can be had: not more, because
 * tests of an empty pool rely on it, whatever the pool held before.
 */
export function reserveHugePages(t: ExecutionContext, count: number): boolean {
  try {
    const before = readFileSync(POOL, 'utf8').trim();
    t.teardown(() => writeFileSync(POOL, before));
    // Pages that somebody has reserved are free, but not to be had.
    const taken = poolFigure('Total') - poolFigure('Free') + poolFigure('Rsvd');
    writeFileSync(POOL, `${taken + count}`);
    const free = poolFigure('Free') - poolFigure('Rsvd');
    if (free === count) return true;
    t.log(`skipped: ${free} huge pages are free where ${count} were asked for`);
  } catch (error) {
    t.log(`skipped: huge pages cannot be reserved (${String(error)})`);
  }
  t.pass();
  return false;
}

/**
 * The counters, once as many pages are counted as installed: a thread whose page came goes on a moment before it is
 * counted.
 */
export async function counted(session: Session, pages: number): Promise<SessionStats> {
  const until = performance.now() + PATIENCE;
  while (session.stats().pagesInstalled < pages && performance.now() < until) await setImmediate();
  return session.stats();
}
