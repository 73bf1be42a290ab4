import type { NativeFactory } from '#native';

import { UffdError } from './errors.js';
import { native } from './native.js';
import type { CreateOptions } from './create-options.js';
import { Userfaultfd } from './userfaultfd.js';
import { validateFd } from './validate.js';

/** How userfaultfds are made: through /dev/userfaultfd (Linux 6.1), or by userfaultfd(2). */
export type Backend = 'device' | 'syscall';

/**
 * The right to create userfaultfds, kept: the device is opened once, so that creating works after privileges were dropped
 * (file permissions are all it asks for), and its descriptor can be handed to a jailed process.
 */
export class UserfaultfdFactory {
  readonly #native: NativeFactory;
  #closed = false;

  private constructor(factory: NativeFactory) {
    this.#native = factory;
  }

  /** Opens /dev/userfaultfd. Whatever is wrong with it, userfaultfd(2) is used instead: this never fails. */
  static open(): UserfaultfdFactory {
    return new UserfaultfdFactory(native().NativeFactory.open());
  }

  /** A factory that uses userfaultfd(2) only. */
  static syscallOnly(): UserfaultfdFactory {
    return new UserfaultfdFactory(native().NativeFactory.syscallOnly());
  }

  /**
   * Takes over a device that another process opened.
   *
   * @param fd From then on the factory's.
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM` with EBADF: it is no open descriptor.
   */
  static fromDevice(fd: number): UserfaultfdFactory {
    validateFd('fd', fd);
    try {
      return new UserfaultfdFactory(native().NativeFactory.fromDevice(fd));
    } catch (cause) {
      throw new UffdError('ERR_UFFD_SYSTEM', `${fd} is no open descriptor`, { syscall: 'fcntl', cause });
    }
  }

  /** What creating tries first. */
  get backend(): Backend {
    return this.#open().backend as Backend;
  }

  /** errno of opening the device, where that failed: why `backend` is `'syscall'`. */
  get deviceErrno(): number | undefined {
    return this.#open().deviceErrno ?? undefined;
  }

  /** The descriptors to be kept open in, or handed to, a jailed process. They stay the factory's. */
  get fds(): number[] {
    const { deviceFd } = this.#open();
    return typeof deviceFd === 'number' ? [deviceFd] : [];
  }

  /**
   * Creates a userfaultfd of this process's memory. Where the device refuses, userfaultfd(2) is tried.
   *
   * @throws {@linkcode UffdError} as {@link Userfaultfd.create}
   */
  create(options: CreateOptions = {}): Userfaultfd {
    return Userfaultfd.createWith(this.#open(), options);
  }

  /** Another factory over the same open device. */
  clone(): UserfaultfdFactory {
    try {
      return new UserfaultfdFactory(this.#open().tryClone());
    } catch (cause) {
      if (cause instanceof UffdError) throw cause;
      throw new UffdError('ERR_UFFD_CLONE', 'no descriptor is free', { cause });
    }
  }

  /** Closes the device. Userfaultfds that were created stay as they are. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#native.close();
  }

  /** {@link UserfaultfdFactory.close} with its defaults. */
  [Symbol.dispose](): void {
    this.close();
  }

  #open(): NativeFactory {
    if (this.#closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the factory is closed');
    return this.#native;
  }
}
