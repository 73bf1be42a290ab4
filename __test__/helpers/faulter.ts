/** Drives `userfaultfd-faulter`: a process that faults when it is told to, on threads of its own. */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer, type Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';

import type { ExecutionContext } from 'ava';
import {
  type FaultCallbacks,
  type FaultHandler,
  type FaultHandlerOptions,
  receiveFds,
  Userfaultfd,
} from 'userfaultfd';

import { PEER } from '../../examples/support/peer.js';
import { canRun, folder } from './serving.js';

/** Bits of features, as the kernel numbers them. */
export const FORK = 1 << 1;
export const REMAP = 1 << 2;
export const REMOVE = 1 << 3;
export const UNMAP = 1 << 6;
export const THREAD_ID = 1 << 8;

/** The process, and its userfaultfd here. */
export class Faulter {
  readonly uffd: Userfaultfd;
  readonly #child: ChildProcess;
  readonly #waiting = new Map<
    number,
    { resolve: (words: string[]) => void; reject: (error: Error) => void }
  >();
  #last = 0;

  private constructor(child: ChildProcess, uffd: Userfaultfd) {
    this.#child = child;
    this.uffd = uffd;
    if (!child.stdout) throw new Error('a pipe is missing');
    createInterface({ input: child.stdout }).on('line', line => {
      const [id, how, ...words] = line.split(' ');
      const one = this.#waiting.get(Number(id));
      this.#waiting.delete(Number(id));
      if (how === 'ok') one?.resolve(words);
      else one?.reject(new Error(words.join(' ')));
    });
    child.on('exit', (status, signal) => {
      for (const one of this.#waiting.values()) one.reject(new Error(`it ended: ${signal ?? status}`));
      this.#waiting.clear();
    });
  }

  /** Starts one; `undefined`, and said, where that cannot be. */
  static async start(t: ExecutionContext, features: number): Promise<Faulter | undefined> {
    if (!canRun(t)) return undefined;
    const path = join(folder(t), 'faulter.sock');
    const server = createServer({ pauseOnConnect: true }).listen(path);
    await once(server, 'listening');
    const child = spawn(join(dirname(PEER), 'userfaultfd-faulter'), [path, `0x${features.toString(16)}`], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    t.teardown(async () => {
      const ended = child.exitCode === null && child.signalCode === null ? once(child, 'exit') : undefined;
      child.kill('SIGKILL');
      await ended;
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
    return this.#child.pid ?? -1;
  }

  /** Has a thread of it do something; the words of its answer. */
  async ask(command: string, ...words: (number | bigint)[]): Promise<string[]> {
    this.#last += 1;
    const id = this.#last;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#child.stdin?.write(`${[id, command, ...words].join(' ')}\n`);
    });
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
      this.#child.kill('SIGKILL');
      await handler.close({ rest: 'zero' });
    });
    return handler;
  }
}
