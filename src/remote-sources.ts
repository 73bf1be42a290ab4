import { closeSync, constants, open } from 'node:fs';
import { promisify } from 'node:util';

import { fromNative, UffdError } from './errors.js';
import { native } from './native.js';
import { type PageSource, release, type SourceDescription } from './sources.js';
import { KiB, MiB } from './units.js';

/** How a daemon is talked to. @hidden */
export interface Line {
  /** The connection was lost, and another is being made. */
  readonly reconnecting: boolean;
  request(method: string, params: object, fds?: readonly number[]): Promise<Record<string, unknown>>;
  tell(method: string, params: object, fds?: readonly number[]): void;
}

/** What a daemon asks of a source that only this process has. */
interface Read {
  source: number;
  request: number;
  offset: number;
  length: number;
}

/** A source as a daemon knows it, once that has answered. */
interface Opened {
  readonly id: number;
  ready: Promise<unknown>;
}

/** Asked for at once; the source here has a cache and pieces of its own. */
const CHUNK = 256 * KiB;

/**
 * Sources as a daemon knows them: files are opened here and sent, bytes are sent, and what is JavaScript stays here and is
 * asked. @hidden
 */
export class RemoteSources {
  readonly #line: Line;
  readonly #opened = new Map<PageSource, Opened>();
  readonly #numbers = new Map<number, PageSource>();
  #last = 0;

  constructor(line: Line) {
    this.#line = line;
  }

  /** Those that are open. */
  get numbers(): number[] {
    return [...this.#numbers.keys()];
  }

  /** The daemon's number of a source. */
  async open(source: PageSource): Promise<number> {
    if (source.closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the source is closed');
    let opened = this.#opened.get(source);
    if (opened === undefined) {
      this.#last += 1;
      const id = this.#last;
      opened = { id, ready: this.#send(id, source) };
      this.#opened.set(source, opened);
      this.#numbers.set(id, source);
      source.whenClosed(() => this.#close(source));
    }
    try {
      await this.#ready(source, opened);
    } catch (error) {
      // What failed can be tried again.
      this.#opened.delete(source);
      this.#numbers.delete(opened.id);
      throw error;
    }
    return opened.id;
  }

  /** Opening changes nothing where it was done: who was not answered asks the next daemon. */
  async #ready(source: PageSource, opened: Opened): Promise<void> {
    while (true) {
      const { ready } = opened;
      try {
        await ready;
        return;
      } catch (error) {
        if ((error as UffdError).code !== 'ERR_UFFD_PAGER_LOST' || !this.#line.reconnecting) throw error;
        if (opened.ready === ready) opened.ready = this.#send(opened.id, source);
      }
    }
  }

  /** The source of a number. */
  numbered(id: number | undefined): PageSource | undefined {
    return this.#numbers.get(id ?? -1);
  }

  /** The path of a source that is a file. */
  nameOf(id: number | undefined): string | undefined {
    const given = this.#numbers.get(id ?? -1)?.description;
    return given?.kind === 'file' ? given.path : undefined;
  }

  /** Another daemon, or the same after a while: it gets what it may have lost. */
  async reopen(): Promise<void> {
    for (const [source, opened] of this.#opened) {
      opened.ready = this.#send(opened.id, source);
      await opened.ready.catch((error: unknown) => {
        // Lost once more: it is opened on the next connection.
        if ((error as UffdError).code !== 'ERR_UFFD_PAGER_LOST') this.#opened.delete(source);
      });
    }
  }

  /**
   * Brings bytes that the daemon has asked for, to the one that has asked: another counts its requests anew. Never rejects.
   */
  async read({ source: id, request, offset, length }: Read, on: Pick<Line, 'tell'>): Promise<void> {
    const source = this.#numbers.get(id);
    try {
      if (source === undefined) throw new UffdError('ERR_UFFD_SOURCE', `source ${id} is not open`);
      const { error, fds } = await native().readSource(await source.handle(), offset, length);
      if (error) throw fromNative(error);
      on.tell('source.answer', { source: id, request }, fds ?? []);
    } catch (error) {
      on.tell('source.answer', { source: id, request, error: (error as Error).message });
    }
  }

  /**
   * A source is served from now on, or will never be. One that nobody else has is closed: the daemon keeps what it serves from,
   * and no longer.
   */
  used(id: number): void {
    release(this.#numbers.get(id));
  }

  #close(source: PageSource): void {
    const opened = this.#opened.get(source);
    if (!opened) return;
    this.#opened.delete(source);
    this.#numbers.delete(opened.id);
    this.#line.tell('source.close', { source: opened.id, ended: true });
  }

  async #send(id: number, source: PageSource): Promise<unknown> {
    const fds: number[] = [];
    let description: object;
    try {
      description = await this.#describe(source, source.description, fds);
    } catch (error) {
      for (const fd of fds) closeSync(fd);
      throw error;
    }
    return this.#line.request('source.open', { source: id, description }, fds);
  }

  async #describe(source: PageSource, given: SourceDescription | undefined, fds: number[]): Promise<object> {
    if (given === undefined) {
      const size = native().sourceSize(await source.handle());
      return { kind: 'callback', size, chunk: CHUNK, concurrency: 8, cacheBytes: 16 * MiB };
    }
    const { kind } = given;
    if (kind === 'file') {
      const fd = await openedAt(given.path, 0, fds);
      const direct = given.direct ? { direct: await openedAt(given.path, constants.O_DIRECT, fds) } : {};
      const may = given.mayChange ? { mayChange: true } : {};
      return { kind, path: given.path, fd, ...may, ...direct };
    }
    if (kind === 'memory') return { kind, fd: sent(given.bytes, fds) };
    if (kind === 'layered') {
      const base = await this.open(given.base);
      const diffs = [];
      for (const path of given.diffs) diffs.push({ path, fd: await openedAt(path, 0, fds) });
      return { kind, base, diffs };
    }
    if (kind === 'overlay') {
      return { kind, base: await this.open(given.base), places: given.places, fd: sent(given.bytes, fds) };
    }
    return given;
  }
}

const openFile = promisify(open);

/** Opens a file for the daemon; its position among the descriptors. */
async function openedAt(path: string, flags: number, fds: number[]): Promise<number> {
  try {
    // O_NONBLOCK: opening a FIFO must not wait for a writer.
    return fds.push(await openFile(path, constants.O_RDONLY | constants.O_NONBLOCK | flags)) - 1;
  } catch (cause) {
    const { errno, syscall, message } = cause as NodeJS.ErrnoException;
    const details = { errno: Math.abs(errno ?? 0), syscall, cause };
    throw new UffdError('ERR_UFFD_SOURCE', `the memory image cannot be read: ${message}`, details);
  }
}

/** Puts bytes into a memfd for the daemon; its position among the descriptors. */
function sent(bytes: Uint8Array, fds: number[]): number {
  const { error, fd } = native().bytesInMemfd(bytes);
  if (error || fd === undefined) throw fromNative(error ?? NO_ANSWER);
  return fds.push(fd) - 1;
}

const NO_ANSWER = { code: 'ERR_UFFD_SYSTEM', message: 'the kernel gave no answer' };
