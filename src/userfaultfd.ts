import process from 'node:process';

import type { NativeFactory, NativeUserfaultfd } from '#native';

import { fromNative, UffdError } from './errors.js';
import { EventBatch, type UffdEvent } from './events.js';
import { validateSignal } from './exited.js';
import type { FaultArea } from './fault-areas.js';
import { FaultHandler } from './fault-handler.js';
import { type CreateOptions, readCreateOptions, type UserfaultfdCloseOptions } from './create-options.js';
import type { Backend } from './factory.js';
import { PageOperations } from './filling.js';
import type { FaultCallbacks, FaultHandlerOptions } from './handler-options.js';
import type { MemoryMapping } from './mapping.js';
import { type Feature, type Ioctl, IOCTLS, MODES, type OrBit, type RegisterMode } from './names.js';
import { native } from './native.js';
import { errno, errorOf } from './outcome.js';
import { type MemoryRange, startOf } from './range.js';
import { keepFromSignals, leaveToSignals } from './signals.js';
import {
  argumentError,
  validateFd,
  validateInteger,
  validateNames,
  validateOneOf,
  validateOptions,
  wrongType,
} from './validate.js';

/** @hidden */
export function modeBits(modes: readonly RegisterMode[]): number {
  if (modes.length === 0) {
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      'Expected `options.modes` to name at least one mode: a range registered for no faults would only look registered',
    );
  }
  return modes.reduce((bits, mode) => bits | (1 << MODES.indexOf(mode)), 0);
}

const WAITING = ['timeout'] as const;
/** Milliseconds that one call waits. */
const SLICE = 100;
const fromHandle = (handle: number): Userfaultfd => Userfaultfd.fromHandle(handle);

const collected = new FinalizationRegistry<number>(handle => {
  if (!native().forgetUserfaultfd(handle)) {
    leaveToSignals(handle);
    return;
  }
  process.emitWarning('A Userfaultfd with registered memory was collected without close(); it stays open', {
    code: 'UFFD_NOT_CLOSED',
  });
});

/**
 * A userfaultfd (userfaultfd(2)): the kernel tells it of page faults, and it decides what the pages contain. It belongs to
 * the memory of the process that created it, for ever. All methods are synchronous, never wait (but `waitSync`), and may
 * be called on the main thread and in workers; an object belongs to the thread that made it.
 *
 * Addresses are `bigint`, lengths are bytes, ranges are whole pages. Each operation has a `try` form that returns a number:
 * the bytes done (fewer than asked for where a page was in the way further on), or `-errno`.
 *
 * @example
 * ```ts
 * using uffd = Userfaultfd.create();
 * using mapping = MemoryMapping.anonymous(1 * MiB);
 * uffd.register(mapping.range(), { modes: ['missing'] });
 * const reading = mapping.read(8192, 5); // waits in another thread
 * uffd.copy(mapping.range(8192, 4096), page);
 * await reading;
 * ```
 */
export class Userfaultfd extends PageOperations {
  /** Features in use; `undefined` for an adopted one where /proc does not tell. */
  readonly enabledFeatures: readonly OrBit<Feature>[] | undefined;
  /** Features the kernel has; `undefined` for one that came from elsewhere. */
  readonly supportedFeatures: readonly OrBit<Feature>[] | undefined;
  /** How it was made; `undefined` for one that came from elsewhere. */
  readonly backend: Backend | undefined;
  /** Whether it sees faults of user mode only; `undefined` for one that came from elsewhere. */
  readonly userModeOnly: boolean | undefined;
  readonly #handle: number;
  readonly #mappings = new Set<MemoryMapping>();
  /** Of a forked child: where its parent's mappings are in its memory. */
  #inherited: FaultArea[] = [];
  #handler: FaultHandler | undefined;
  #closed = false;

  private constructor(made: NativeUserfaultfd, own = made.backend !== undefined) {
    if (made.error) throw fromNative(made.error);
    super();
    this.#handle = made.handle;
    this.enabledFeatures = made.enabled as OrBit<Feature>[] | undefined;
    this.supportedFeatures = made.supported as OrBit<Feature>[] | undefined;
    this.backend = made.backend as Backend | undefined;
    this.userModeOnly = made.userModeOnly ?? undefined;
    collected.register(this, this.#handle, this);
    if (!own) keepFromSignals(this.#handle);
  }

  /**
   * Creates one for the memory of this process, through /dev/userfaultfd or userfaultfd(2), and makes the handshake
   * (`UFFDIO_API`).
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_NOT_PERMITTED` (the message says what would permit it; also for a required
   *   `event-fork` without CAP_SYS_PTRACE), `ERR_UFFD_UNSUPPORTED` (a required feature, or userfaultfd itself, is not
   *   there), `ERR_UFFD_SYSTEM`
   */
  static create(options: CreateOptions = {}): Userfaultfd {
    return Userfaultfd.createWith(undefined, options);
  }

  /**
   * Takes a descriptor over that came from elsewhere; it becomes nonblocking and close-on-exec. Reading its events is the
   * caller's: an unread fork or remove event stops the other process.
   *
   * @param fd From then on this object's, unless this throws.
   * @throws {@linkcode UffdError} `ERR_UFFD_PROTOCOL` (no userfaultfd, or its creator has not made the handshake),
   *   `ERR_UFFD_CLOSED` (its process is gone), `ERR_UFFD_SYSTEM`
   */
  static adopt(fd: number): Userfaultfd {
    validateFd('fd', fd);
    return new Userfaultfd(native().adoptUserfaultfd(fd));
  }

  /** @hidden Without a factory, with one for this once. */
  static createWith(factory: NativeFactory | undefined, options: CreateOptions): Userfaultfd {
    const checked = readCreateOptions(options);
    return new Userfaultfd(factory ? factory.create(checked) : native().createUserfaultfd(checked));
  }

  /** @hidden */
  static fromHandle(handle: number, own = false): Userfaultfd {
    return new Userfaultfd(native().describeUserfaultfd(handle), own);
  }

  /** The descriptor, to be polled or sent; it stays this object's. */
  get fd(): number {
    return native().userfaultfdFd(this.handle());
  }

  /** Whether {@link Userfaultfd.close} or {@link Userfaultfd.releaseFd} was called. */
  get closed(): boolean {
    return this.#closed;
  }

  /**
   * Registers memory (`UFFDIO_REGISTER`): from now on touching it waits for whoever serves it, in these modes and those
   * it was registered for before.
   *
   * @param range Of own memory a range of a mapping; addresses only where the memory is another process's.
   * @param options `modes`: at least one; `requireIoctls`: what the range must be able to take, else it is as before.
   * @returns The ioctls that the range can take.
   * @throws {@linkcode UffdError} `ERR_UFFD_CLOSED` (the process is gone), `ERR_UFFD_UNSUPPORTED` (an ioctl is missing),
   *   `ERR_UFFD_SYSTEM` (EINVAL: memory that cannot be registered so; EBUSY: another userfaultfd has it; EPERM: shared
   *   memory without write permission)
   */
  register(
    range: MemoryRange,
    options: { modes: readonly RegisterMode[]; requireIoctls?: readonly Ioctl[] },
  ): OrBit<Ioctl>[] {
    validateOptions('options', options, ['modes', 'requireIoctls']);
    const modes = modeBits(validateNames('options.modes', options.modes, MODES));
    const require = validateNames('options.requireIoctls', options.requireIoctls, IOCTLS);
    const start = this.registrableStart('range', range);
    const { error, ioctls } = native().uffdRegister(this.handle(), start, range.length, modes, require);
    if (error) throw fromNative(error);
    this.noteRegistered(range);
    return ioctls as OrBit<Ioctl>[];
  }

  /**
   * Ends a registration (`UFFDIO_UNREGISTER`) and wakes who waits for the range: what is missing reads zero from now on.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_CLOSED`, `ERR_UFFD_SYSTEM`
   */
  unregister(range: MemoryRange): void {
    const error = native().uffdUnregister(this.handle(), startOf('range', range), range.length);
    if (error) throw fromNative(error);
  }

  /**
   * Reads the messages that are there into `batch` (read(2)); never waits. Faults come before older events.
   *
   * @returns How many; 0 when there are none.
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`: EMFILE when a fork event needs a descriptor and none is free (it
   *   stays to be read); `ERR_UFFD_PROTOCOL`: the end of a file, or no whole messages, because the descriptor has become
   *   something else. Reading can go on after any of them. Messages of kinds to come are events of type `'unknown'`.
   */
  readEvents(batch: EventBatch): number {
    const count = this.#fill(batch, 0);
    if (count < 0) throw errorOf('read', -count, 0);
    return count;
  }

  #fill(batch: EventBatch, milliseconds: number): number {
    if (!(batch instanceof EventBatch)) {
      throw wrongType('batch', 'an EventBatch', batch);
    }
    return batch.fill(this.handle(), fromHandle, milliseconds);
  }

  /**
   * Waits on this thread until there are messages, then reads them: for a worker that does nothing else. Never on a
   * thread whose own memory is served by it.
   *
   * @param options `timeout`: milliseconds. Default: for ever.
   * @returns How many; 0 when the time is up; -1 when the process is gone.
   */
  waitSync(batch: EventBatch, options: { timeout?: number } = {}): number {
    validateOptions('options', options, WAITING);
    const { timeout = Number.MAX_SAFE_INTEGER } = options;
    let left = validateInteger('options.timeout', timeout, 0, Number.MAX_SAFE_INTEGER);
    for (;;) {
      // In slices: a worker can be terminated only between two calls.
      const slice = Math.min(left, SLICE);
      const count = this.#fill(batch, slice);
      if (count > 0) return count;
      if (count === -errno.ESRCH) return -1;
      if (count < 0) throw errorOf(count === -errno.EOPNOTSUPP ? 'poll' : 'read', -count, 0);
      left -= slice;
      if (left <= 0) return slice === 0 && this.isDead() ? -1 : 0;
    }
  }

  /**
   * Waits until there are messages, without holding up this thread (poll(2) on a thread of the package).
   *
   * @param options `timeout`: milliseconds (default: for ever); `signal`: ends the waiting with its reason.
   * @returns Whether there are: `false` when the time is up, or the process is gone.
   */
  async wait(options: { timeout?: number; signal?: AbortSignal } = {}): Promise<boolean> {
    validateOptions('options', options, ['timeout', 'signal']);
    const { timeout = Number.MAX_SAFE_INTEGER } = options;
    const until = performance.now() + validateInteger('options.timeout', timeout, 0, Number.MAX_SAFE_INTEGER);
    const signal = validateSignal(options.signal);
    for (;;) {
      signal?.throwIfAborted();
      const slice = Math.max(0, Math.min(100, Math.ceil(until - performance.now())));
      const { error, ready } = await native().uffdWaitAsync(this.handle(), slice);
      if (error) throw fromNative(error);
      if (ready) return true;
      if (performance.now() >= until || this.isDead()) return false;
    }
  }

  /**
   * The messages as they come, one array for each read, until the process is gone, this is closed, or the loop is left.
   * Nothing is read ahead of the loop: messages it has not asked for stay in the kernel, which keeps their causes waiting.
   *
   * @param options `signal`: ends the iteration with its reason; `capacity`: messages of one read (default: 64).
   */
  async *events(
    options: { signal?: AbortSignal; capacity?: number } = {},
  ): AsyncGenerator<UffdEvent[], void, undefined> {
    validateOptions('options', options, ['signal', 'capacity']);
    const signal = validateSignal(options.signal);
    const batch = new EventBatch(options.capacity);
    while (!this.#closed) {
      signal?.throwIfAborted();
      if (this.readEvents(batch) > 0) {
        yield [...batch];
        continue;
      }
      const ready = await this.wait(signal ? { signal } : {}).catch((error: unknown) => {
        if (this.#closed) return false;
        throw error;
      });
      if (!ready) return;
    }
  }

  /**
   * Has callbacks answer its faults, on this thread; until the handler is closed, which closes this as well, its messages are
   * the handler's. Faults of this very thread are known at once by `thread-id`, which is in use unless `create` was told otherwise; else
   * by this thread not answering.
   *
   * @example
   * ```ts
   * const handler = uffd.createHandler({
   *   fault: fault => fault.copy(pageFor(fault.offset)),
   *   removed: range => forget(range),
   * }, { faultDeadline: 1_000 });
   * ```
   * @throws {@linkcode UffdError} `ERR_UFFD_IN_USE` (it has a handler), `ERR_UFFD_SYSTEM`
   */
  createHandler(callbacks: FaultCallbacks, options: FaultHandlerOptions = {}): FaultHandler {
    this.#refuseHandled();
    this.#handler = new FaultHandler(
      {
        uffd: this,
        own: this.backend !== undefined,
        followsForks: this.enabledFeatures?.includes('event-fork') ?? false,
        areas: () => this.#areas(),
        child: handle => {
          const child = Userfaultfd.fromHandle(handle);
          child.#inherited = this.#areas();
          return child;
        },
        ended: () => {
          this.#handler = undefined;
          this.close({ waiting: 'zero' });
        },
      },
      callbacks,
      options,
    );
    return this.#handler;
  }

  #areas(): FaultArea[] {
    const areas = Array.from(this.#mappings, mapping => {
      const start = mapping.addressNumber();
      return { start, end: start + mapping.length, pageSize: mapping.pageSize, mapping };
    });
    return [...areas, ...this.#inherited];
  }

  #refuseHandled(): void {
    if (!this.#handler) return;
    throw new UffdError('ERR_UFFD_IN_USE', 'a fault handler has the messages of this userfaultfd', {
      hint: 'Close the handler: `await handler.close()`.',
    });
  }

  /** Threads that wait in a fault, as /proc/self/fdinfo tells: read or not. */
  waitingThreads(): number {
    const count = native().userfaultfdWaiting(this.handle(), false);
    if (count < 0) throw errorOf('/proc/self/fdinfo', -count, 0);
    return count;
  }

  /** Whether its process has exited or called exec. Asks the kernel, has no side effects. */
  isDead(): boolean {
    return native().uffdIsDead(this.handle());
  }

  /** Another object for the same userfaultfd, closed on its own; the kernel's ends with the last. */
  clone(): Userfaultfd {
    return Userfaultfd.fromHandle(native().cloneUserfaultfd(this.handle()), this.backend !== undefined);
  }

  /**
   * Gives the descriptor up without closing it: it is the caller's, and this object is closed.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_CLONE`: there is a clone, and no descriptor is free for this one.
   */
  releaseFd(): number {
    this.#refuseHandled();
    const fd = native().releaseUserfaultfd(this.handle());
    if (fd < 0)
      throw new UffdError('ERR_UFFD_CLONE', 'no descriptor is free', { errno: -fd, syscall: 'fcntl' });
    this.#ended();
    return fd;
  }

  /**
   * Closes it. Events that nobody has read are read first. Idempotent.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_FAULTS_WAITING`: threads wait and would get zeros; it stays open. `waiting`
   *   says what they are to get.
   */
  close(options: UserfaultfdCloseOptions = {}): void {
    if (this.#closed) return;
    validateOptions('options', options, ['waiting']);
    this.#refuseHandled();
    const { waiting } = options;
    if (waiting === undefined) this.#refuseIfWaiting(true);
    else validateOneOf('options.waiting', waiting, ['poison', 'zero']);
    const error = native().closeUserfaultfd(this.#handle, waiting === 'poison');
    if (error) throw fromNative(error);
    this.#ended();
  }

  /** {@link Userfaultfd.close} with its defaults. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** @hidden */
  override handle(): number {
    if (this.#closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the userfaultfd is closed');
    return this.#handle;
  }

  /** @hidden Own memory is registered by mapping only: anything else in this process is not ours to take away. */
  registrableStart(name: string, range: MemoryRange): number {
    const start = startOf(name, range);
    if (this.backend !== undefined && !('mapping' in range)) {
      throw argumentError(
        TypeError,
        'ERR_INVALID_ARG_VALUE',
        `Expected \`${name}\` to be a range of a MemoryMapping: memory of this process is registered by its mapping`,
      );
    }
    return start;
  }

  /** @hidden */
  noteRegistered(range: MemoryRange): void {
    if (!('mapping' in range) || this.backend === undefined) return;
    this.#mappings.add(range.mapping);
    range.mapping.registeredBy(this);
    this.#handler?.areasChanged();
  }

  /** @hidden A mapping is about to be unmapped. */
  leave(mapping: MemoryMapping): void {
    if (this.#closed) return;
    this.#refuseIfWaiting(false);
    this.unregister(mapping.range());
    this.forget(mapping);
  }

  /** @hidden A mapping was closed that a shared buffer still reaches: the registration ends with the buffer. */
  forget(mapping: MemoryMapping): void {
    this.#mappings.delete(mapping);
    this.#handler?.areasChanged();
  }

  /** @hidden A pager has it now. */
  taken(): void {
    this.#ended();
  }

  /** @hidden */
  nativeHandle(): number | undefined {
    return this.#closed ? undefined : this.#handle;
  }

  #refuseIfWaiting(ofLastOnly: boolean): void {
    const count = native().userfaultfdWaiting(this.#handle, ofLastOnly);
    if (count <= 0) return;
    throw new UffdError('ERR_UFFD_FAULTS_WAITING', `${count} threads wait for pages and would read zeros`, {
      hint: "Fill their pages first, or close with `{ waiting: 'poison' }` (SIGBUS) or `{ waiting: 'zero' }`.",
    });
  }

  #ended(): void {
    this.#closed = true;
    collected.unregister(this);
    leaveToSignals(this.#handle);
    for (const mapping of this.#mappings) mapping.leftBy(this);
    this.#mappings.clear();
  }
}
