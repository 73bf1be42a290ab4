/** Another process whose memory is filled, as Firecracker's is, by this package, by the floor, or by a rival. */

import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import { Peer } from '../../examples/support/peer.js';
import type { Contender, Measured } from './case.js';
import { Child } from './child.js';
import type { Image } from './image.js';
import type { Run } from './run.js';
import type { ServingOptions } from './serving.js';
import { floor, rival } from './tools.js';

/** The command of a handler that listens on the socket and serves the image. */
export type Handler = (socket: string, image: string) => string[];

const SERVING = fileURLToPath(new URL('serving.js', import.meta.url));

/** This package. */
export const ours =
  (options: ServingOptions = {}): Handler =>
  (socket, image) => [process.execPath, SERVING, socket, image, JSON.stringify(options)];

/** `floor/serve.c`. */
export const inC =
  (how: string, pages = 1): Handler =>
  (socket, image) => [floor('serve'), socket, image, how, `${pages}`];

/** A program of `rivals/`. */
export const inRust =
  (program: string, ...words: string[]): Handler =>
  (socket, image) => [rival(program), socket, image, ...words];

/** What is done to the memory. */
export interface Work {
  image: Image;
  /** Settings of the peer's `touch`; `undefined`: nothing is touched. */
  touch?: string;
  /** Arguments of the peer beside its region. */
  peer?: readonly string[];
  /** Whether its contents are to be compared with the image at the end. Default: yes. */
  compare?: boolean;
  /** What it touches first, without being measured. */
  before?: string;
  /** Huge pages are filled: memory is warmed in those, too. */
  huge?: boolean;
  /** A thread of the handler that is held meanwhile, by its name. */
  hold?: string;
}

/** The thread of a process by its name, once it is there. */
async function threadOf(pid: number, name: string): Promise<string> {
  for (;;) {
    const threads = readdirSync(`/proc/${pid}/task`);
    const named = (thread: string): boolean =>
      readFileSync(`/proc/${pid}/task/${thread}/comm`, 'utf8') === `${name}\n`;
    const found = threads.find(named);
    if (found !== undefined) return found;
    await setTimeout(1);
  }
}

/**
 * One handler, one process. Figures: `fill` (ms before the first fault), `touch` (ms), `first`, `median`, `p99` (us), `rate`
 * (pages a second), `total` (ms of both).
 */
export async function measure(run: Run, handler: Handler, work: Work): Promise<Measured> {
  const { image } = work;
  return run.inFolder(async folder => {
    const socket = join(folder, 's');
    const child = new Child(run.cpus.handler, handler(socket, image.path));
    const ends: (() => Promise<unknown>)[] = [async () => child.end()];
    try {
      await child.says();
      await run.warm(image.size, work.huge);
      const cpu = run.cpus.faulter === undefined ? [] : ['--cpu', `${run.cpus.faulter}`];
      const peer = new Peer(['--socket', socket, '--region', `${image.size}`, ...cpu, ...(work.peer ?? [])]);
      ends.unshift(async () => {
        peer.kill();
        await peer.ended;
      });
      await peer.ready();
      const { ns = 0 } = await child.says<{ ns?: number }>();
      const fill = ns / 1e6;
      if (work.hold !== undefined) {
        const held = new Child(undefined, [floor('hold'), await threadOf(child.pid, work.hold)]);
        ends.unshift(async () => held.end());
        await held.says();
      }
      if (work.before !== undefined) await peer.ask('touch', ...work.before.split(' '));
      const touched =
        work.touch === undefined ? undefined : await peer.ask('touch', ...work.touch.split(' '));
      const touch = (touched?.total_ns ?? 0) / 1e6;
      // A tenth of the time of a checksum, which takes most of that of many a case.
      const compared = work.compare === false ? undefined : await peer.ask('compare', image.path);
      if (compared !== undefined && compared.different > 0)
        throw new Error('the process has read other bytes');
      const figures = {
        fill,
        touch,
        total: fill + touch,
        first: (touched?.first_ns ?? 0) / 1e3,
        median: (touched?.median_ns ?? 0) / 1e3,
        p99: (touched?.p99_ns ?? 0) / 1e3,
        rate: ((touched?.pages ?? 0) / touch) * 1e3,
      };
      return compared === undefined ? { figures } : { figures, result: image.sha256 };
    } finally {
      for (const end of ends) await end();
    }
  });
}

/** A contender that does some work with a handler. */
export const serving =
  (handler: Handler, work: (run: Run) => Work): Contender =>
  async run => {
    const { image, ...rest } = work(run);
    return measure(run, handler, { image, ...rest });
  };
