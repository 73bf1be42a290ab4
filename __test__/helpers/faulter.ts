/** Drives `userfaultfd-faulter`: a process that faults when it is told to, on threads of its own. */

import { once } from 'node:events';
import { createServer, type Socket } from 'node:net';
import { dirname, join } from 'node:path';

import type { ExecutionContext } from 'ava';
import {
  type FaultCallbacks,
  type FaultHandler,
  type FaultHandlerOptions,
  receiveFds,
  Userfaultfd,
} from 'userfaultfd';

import { PEER } from '../../examples/support/peer.js';
import { Commanded } from './commanded.js';
import { canRun, folder } from './serving.js';

/** Where the executable is. */
export const FAULTER: string = join(dirname(PEER), 'userfaultfd-faulter');

/** Bits of features, as the kernel numbers them. */
export const FORK = 1 << 1;
export const REMAP = 1 << 2;
export const REMOVE = 1 << 3;
export const UNMAP = 1 << 6;
export const THREAD_ID = 1 << 8;

/** The process, and its userfaultfd here. */
export class Faulter {
  readonly uffd: Userfaultfd;
  readonly #process: Commanded;

  private constructor(child: Commanded, uffd: Userfaultfd) {
    this.#process = child;
    this.uffd = uffd;
  }

  /** Starts one; `undefined`, and said, where that cannot be. */
  static async start(t: ExecutionContext, features: number): Promise<Faulter | undefined> {
    if (!canRun(t)) return undefined;
    const path = join(folder(t), 'faulter.sock');
    const server = createServer({ pauseOnConnect: true }).listen(path);
    await once(server, 'listening');
    const child = new Commanded(FAULTER, [path, `0x${features.toString(16)}`]);
    t.teardown(async () => {
      child.kill();
      await child.ended;
    });
    const [socket] = (await once(server, 'connection')) as [Socket];
    // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
    const { fd } = (socket as unknown as { _handle: { fd: number } })._handle;
    const { fds } = await receiveFds(fd, { timeout: 10_000 });
    const closed = once(socket, 'close');
    socket.destroy();
    server.close();
    await closed;
    return new Faulter(child, Userfaultfd.adopt(fds[0] ?? -1));
  }

  get pid(): number {
    return this.#process.pid;
  }

  /** Has a thread of it do something; the words of its answer. */
  async ask(command: string, ...words: (number | bigint)[]): Promise<string[]> {
    return this.#process.ask(command, ...words);
  }

  /** New memory of so many pages, of which the first are registered for missing faults. */
  async map(pages: number, registered: number = pages, modes = 1): Promise<number> {
    const [address] = await this.ask('map', pages);
    if (registered > 0) await this.ask('register', Number(address), registered * 4096, modes);
    return Number(address);
  }

  /** The byte at an address, and the thread that loaded it. */
  async load(address: number): Promise<{ byte: number; thread: number }> {
    const [byte, thread] = await this.ask('load', address);
    return { byte: Number(byte), thread: Number(thread) };
  }

  async bytes(address: number, length: number): Promise<Buffer> {
    const [hex = ''] = await this.ask('dump', address, length);
    return Buffer.from(hex, 'hex');
  }

  /** A handler for it, closed when the test ends. */
  handle(t: ExecutionContext, callbacks: FaultCallbacks, options?: FaultHandlerOptions): FaultHandler {
    const handler = this.uffd.createHandler(callbacks, options);
    t.teardown(async () => {
      this.#process.kill();
      await handler.close({ rest: 'zero' });
    });
    return handler;
  }
}
