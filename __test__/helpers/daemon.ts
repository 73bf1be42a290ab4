/** A daemon for one test; it and everything of it is gone when the test ends. */

import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { createConnection } from 'node:net';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import type { ExecutionContext } from 'ava';
import {
  type FirecrackerServer,
  type FirecrackerServerOptions,
  PagerClient,
  serveFirecracker,
  type Session,
  type SpawnOptions,
} from 'userfaultfd';

import { Peer, type Ready } from '../../examples/support/peer.js';
import { folder, image, IMAGE_SIZE } from './serving.js';

const PATIENCE = 10_000;

/** The daemon of this checkout. */
export const EXECUTABLE: string =
  process.env['USERFAULTFD_PAGERD'] ?? fileURLToPath(new URL('../../../userfaultfd-pagerd', import.meta.url));

/** Starts one. */
export async function daemon(t: ExecutionContext, options: SpawnOptions = {}): Promise<PagerClient> {
  const client = await PagerClient.spawn(options);
  const { holderPid = 0 } = client;
  t.teardown(async () => {
    if (!client.closed) await client.close();
    if (isAlive(holderPid)) process.kill(holderPid, 'SIGKILL');
    await until(() => !isAlive(holderPid), 'the holder ends');
  });
  return client;
}

/** Kills the daemon, and waits until another one has been reached. */
export async function killed(client: PagerClient): Promise<void> {
  const before = client.daemonPid;
  process.kill(before, 'SIGKILL');
  await until(() => client.daemonPid !== before, 'another daemon is there');
}

/** A server in a daemon, an image and peers. */
export interface RemoteServing {
  client: PagerClient;
  server: FirecrackerServer;
  memory: string;
  bytes: Buffer;
  socketPath: string;
  /** Starts a peer and waits until it is served. */
  connect: (...args: string[]) => Promise<{ peer: Peer; ready: Ready; session: Session }>;
}

/** Starts a server over an image of random bytes, in a daemon. */
export async function remotely(
  t: ExecutionContext,
  client: PagerClient,
  options: Partial<FirecrackerServerOptions> & { size?: number } = {},
): Promise<RemoteServing> {
  const { size = IMAGE_SIZE, ...rest } = options;
  const { path: memory, bytes } = image(t, size);
  const socketPath = `${folder(t)}/vm.sock`;
  const server = await serveFirecracker({ pager: client, socketPath, memory, ...rest });
  const connect = async (...args: string[]): Promise<{ peer: Peer; ready: Ready; session: Session }> => {
    const peer = startPeer(t, ['--socket', socketPath, '--region', `${size}`, ...args]);
    const ready = await peer.ready();
    return { peer, ready, session: await server.accept({ timeout: PATIENCE }) };
  };
  return { client, server, memory, bytes, socketPath, connect };
}

/** A peer that is ended with the test. */
export function startPeer(t: ExecutionContext, args: readonly string[]): Peer {
  const peer = new Peer(args);
  t.teardown(async () => {
    peer.kill();
    await peer.ended;
  });
  return peer;
}

/** Whether a process lives: neither gone nor a zombie. */
export function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

/** Kills a process that may be ending by itself, as an heir whose daemon is dead does; `false` where it has ended. */
export function killIfThere(pid: number): boolean {
  try {
    return process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
    return false;
  }
}

/** The daemons of a holder: the one that serves, or comes to, and the one that waits. */
export function daemonsOf(holder: number): number[] {
  const children = readFileSync(`/proc/${holder}/task/${holder}/children`, 'utf8').trim().split(' ');
  return children.map(Number).filter(pid => isAlive(pid) && !isHeir(pid));
}

/** The daemon that a holder has, or is starting, other than this; `undefined` where there is none. */
export function daemonOf(holder: number, not: number): number | undefined {
  return daemonsOf(holder).find(pid => pid !== not);
}

/** The process that shares a daemon's descriptors, where there is one at this moment. */
export function heirOf(pid: number): number | undefined {
  try {
    return readdirSync(`/proc/${pid}/task`)
      .flatMap(task => readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').trim().split(' '))
      .map(Number)
      .find(child => child > 0 && isHeir(child));
  } catch {
    return undefined;
  }
}

/** What is left of a dead daemon for a moment, and is no daemon. */
function isHeir(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').trim() === 'uffd-heir';
  } catch {
    return true;
  }
}

/** Since when a daemon serves, by its own clock: CLOCK_MONOTONIC in milliseconds. */
export async function servingSince({ socketPath }: PagerClient): Promise<number> {
  const socket = createConnection(socketPath);
  const params = { protocol: 1, version: '0.0.0', client: 'asks', sessions: [] };
  socket.write(`${JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'hello', params })}\n`);
  const [line] = (await once(createInterface({ input: socket }), 'line')) as [string];
  socket.destroy();
  return (JSON.parse(line) as { result: { servingSince: number } }).result.servingSince;
}

/** A promise, and who keeps it. */
export function promised<T>(): { promise: Promise<T>; resolve: (value: T) => void } {
  let resolve: (value: T) => void = () => {};
  const promise = new Promise<T>(keep => {
    resolve = keep;
  });
  return { promise, resolve };
}

/** Waits until something is so that nothing tells of. */
export async function until(holds: () => boolean, what: string): Promise<void> {
  const deadline = performance.now() + PATIENCE;
  while (!holds()) {
    if (performance.now() > deadline) throw new Error(`in vain was waited until ${what}`);
    await sleep(2);
  }
}

/** What a process has open, by what it is. */
export function openIn(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).flatMap(fd => {
    try {
      return [readlinkSync(`/proc/${pid}/fd/${fd}`).replace(/:\[\d+\]$/, '')];
    } catch {
      return [];
    }
  });
}
