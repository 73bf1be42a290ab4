import { fileURLToPath } from 'node:url';

import { fromNative, UffdError } from './errors.js';
import { native } from './native.js';
import { validatePath } from './validate.js';

/** How a source is opened: what the native side knows it by. @hidden */
export interface OpenSource {
  readonly handle: number;
  /** Ends what answers for it. */
  close?(): void;
  /** Why it failed, where that is known here. */
  failure?(): unknown;
}

/**
 * Where the bytes of missing pages come from. One source can feed any number of sessions; it is opened by the first. Made by
 * {@link fileSource}, {@link callbackSource}, {@link workerSource}.
 */
export class PageSource {
  /** @hidden Whether this very thread has to run for bytes to come: then it must not wait for them. */
  readonly needsThisThread: boolean;
  readonly #open: () => Promise<OpenSource>;
  #opened: Promise<OpenSource> | undefined;
  #now: OpenSource | undefined;
  #closed = false;

  /** @hidden */
  constructor(open: () => Promise<OpenSource>, needsThisThread: boolean) {
    this.#open = open;
    this.needsThisThread = needsThisThread;
  }

  /** Whether {@link PageSource.close} was called. */
  get closed(): boolean {
    return this.#closed;
  }

  /** @hidden The native number. */
  async handle(): Promise<number> {
    if (this.#closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the source is closed');
    this.#opened ??= this.#open();
    try {
      this.#now = await this.#opened;
    } catch (error) {
      // What failed can be tried again.
      this.#opened = undefined;
      throw error;
    }
    if (this.#closed) this.#end();
    return this.#now.handle;
  }

  /** @hidden What made it fail last. */
  failure(): unknown {
    return this.#now?.failure?.();
  }

  /**
   * Ends it. Sessions that are served from a file go on; one whose source is JavaScript ends by its failure policy when it
   * wants the next bytes. Idempotent.
   */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#end();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #end(): void {
    const now = this.#now;
    if (!now) return;
    this.#now = undefined;
    now.close?.();
    native().closeSource(now.handle, true);
  }
}

/**
 * A file or block device: a snapshot's memory. It must not change while it is served; one that shrinks ends its sessions by
 * their failure policy. Opened by the first session, on another thread.
 */
export function fileSource(path: string | URL): PageSource {
  const name = validatePath('path', path instanceof URL ? fileURLToPath(path) : path);
  return new PageSource(async () => {
    const { error, handle } = await native().openFileSource(name);
    if (error || handle === undefined) throw fromNative(error ?? NO_ANSWER);
    return { handle };
  }, false);
}

const NO_ANSWER = { code: 'ERR_UFFD_SOURCE', message: 'the source could not be opened' };
