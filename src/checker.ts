import type { NativeChecker } from '#native';

import { fromNative, UffdError } from './errors.js';
import { native } from './native.js';
import { Userfaultfd } from './userfaultfd.js';
import { wrongType } from './validate.js';

/**
 * Asks userfaultfds whether their process lives by filling one page that was registered with each, as crosvm does.
 * {@link Userfaultfd.isDead} asks without a page and without side effects: prefer it.
 *
 * The page is shared memory at the same address in this process and in those forked from it, so the checker is made
 * before them.
 */
export class DeadUffdChecker {
  readonly #native: NativeChecker;

  constructor() {
    try {
      this.#native = native().NativeChecker.create();
    } catch (cause) {
      if (cause instanceof UffdError) throw cause;
      throw new UffdError('ERR_UFFD_SYSTEM', `no page could be mapped: ${String(cause)}`, { cause });
    }
  }

  /** Address of the page: events about it are the checker's doing. */
  get address(): bigint {
    return BigInt(this.#native.address);
  }

  /**
   * Registers the page with a userfaultfd (`UFFDIO_REGISTER`).
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_CLOSED` (the process is gone already), `ERR_UFFD_SYSTEM` with EINVAL (it does
   *   not have the page)
   */
  register(uffd: Userfaultfd): void {
    const error = this.#native.register(handleOf(uffd));
    if (error) throw fromNative(error);
  }

  /** Whether its process has exited or called exec (`UFFDIO_ZEROPAGE` of the page). {@link DeadUffdChecker.reset} follows a round. */
  isDead(uffd: Userfaultfd): boolean {
    return this.#native.isDead(handleOf(uffd));
  }

  /** Empties the page in every process (`MADV_REMOVE`), on another thread: it may wait for an event to be read. */
  async reset(): Promise<void> {
    const { error } = await this.#native.reset();
    if (error) throw fromNative(error);
  }
}

function handleOf(uffd: unknown): number {
  if (uffd instanceof Userfaultfd) return uffd.handle();
  throw wrongType('uffd', 'a Userfaultfd', uffd);
}
