import { native } from './native.js';
import { errno, errorOf } from './outcome.js';
import { type MemoryRange, ORDINARY_PAGE, pageOf, sourceOf, startOf } from './range.js';
import { MiB } from './units.js';
import { argumentError, validateBoolean, validateOneOf, validateOptions, validateView } from './validate.js';

/** How pages are filled. */
export interface FillOptions {
  /** Wake the threads that wait for them. Default: `true`. */
  wake?: boolean;
  /**
   * What to do where a page is present already: throw `ERR_UFFD_PAGE_EXIST`, or wake who waits for it and go on behind it.
   * Default: `'throw'`. (The `try` forms stop there.)
   */
  onPresent?: 'throw' | 'skip';
}

/** How pages are copied in, or mapped in from the page cache. */
export interface CopyOptions extends FillOptions {
  /** Install them write-protected; the range is registered for that. Default: `false`. */
  writeProtect?: boolean;
}

/** How pages are moved in. */
export interface MoveOptions extends FillOptions {
  /** Pass over pages that are missing in the source: they stay missing. Default: `false`. */
  allowSourceHoles?: boolean;
}

const DONT_WAKE = 1;
const PROTECT = 2;
const SOURCE_HOLES = 4;
const PAGE_SHIFT = 8;
/** What an address range may be made of besides ordinary pages: the size every supported machine has. */
const HUGE_PAGE = 2 * MiB;
const FILL = ['wake', 'onPresent'] as const;
const COPY = [...FILL, 'writeProtect'] as const;
const MOVE = [...FILL, 'allowSourceHoles'] as const;
const NO_OPTIONS: CopyOptions & MoveOptions = Object.freeze({});

/** The bits that go along with an operation: options, and the logarithm of the page size above them. */
function modeOf(range: MemoryRange, options: CopyOptions & MoveOptions, known: readonly string[]): number {
  let mode = (31 - Math.clz32(pageOf(range))) << PAGE_SHIFT;
  if (options === NO_OPTIONS) return mode;
  validateOptions('options', options, known);
  if (!validateBoolean('options.wake', options.wake, true)) mode |= DONT_WAKE;
  if (validateBoolean('options.writeProtect', options.writeProtect, false)) mode |= PROTECT;
  if (validateBoolean('options.allowSourceHoles', options.allowSourceHoles, false)) mode |= SOURCE_HOLES;
  if (options.onPresent !== undefined)
    validateOneOf('options.onPresent', options.onPresent, ['throw', 'skip']);
  return mode;
}

/** The operations on pages, shared by everything that has a userfaultfd. Not to be constructed. */
export abstract class PageOperations {
  /** @hidden */
  abstract handle(): number;

  /**
   * Fills missing pages (`UFFDIO_COPY`). Goes on by itself where the kernel stops on the way.
   *
   * @param source Bytes: any view, a range of a mapping, or addresses of this process; as many as `range` has. For huge
   *   pages it should be resident: the kernel otherwise takes a second huge page to copy by (ENOMEM where there is none).
   * @throws {@linkcode UffdError} with `done`: `ERR_UFFD_PAGE_EXIST`, `ERR_UFFD_CHANGING` or `ERR_UFFD_PARTIALLY_COPIED`
   *   (read the events, then go on), `ERR_UFFD_NOT_REGISTERED`, `ERR_UFFD_CLOSED`, `ERR_UFFD_SYSTEM`
   */
  copy(range: MemoryRange, source: ArrayBufferView | MemoryRange, options: CopyOptions = NO_OPTIONS): void {
    const start = startOf('range', range);
    const mode = modeOf(range, options, COPY);
    const page = pageOf(range);
    const { length } = range;
    const handle = this.handle();
    const from = this.#source(source, length);
    const step =
      typeof from === 'number'
        ? (done: number): number =>
            native().uffdCopyFrom(handle, start + done, from + done, length - done, mode)
        : (done: number): number => native().uffdCopyPart(handle, start + done, from, done, mode);
    complete('UFFDIO_COPY', length, page, options, step);
  }

  /** {@link Userfaultfd.copy}, once: bytes done, or `-errno`. The fastest form. */
  tryCopy(
    range: MemoryRange,
    source: ArrayBufferView | MemoryRange,
    options: CopyOptions = NO_OPTIONS,
  ): number {
    const start = startOf('range', range);
    const mode = modeOf(range, options, COPY);
    const from = this.#source(source, range.length);
    return typeof from === 'number'
      ? native().uffdCopyFrom(this.handle(), start, from, range.length, mode)
      : native().uffdCopy(this.handle(), start, from, mode);
  }

  /**
   * Fills missing pages with zeros (`UFFDIO_ZEROPAGE`; where that cannot be done, which is on huge pages, by copying zeros;
   * address ranges of huge pages are taken for ones of 2 MiB).
   *
   * @throws {@linkcode UffdError} as {@link Userfaultfd.copy}
   */
  zero(range: MemoryRange, options: FillOptions = NO_OPTIONS): void {
    const start = startOf('range', range);
    const page = pageOf(range);
    const { length } = range;
    const mode = modeOf(range, options, FILL);
    const handle = this.handle();
    const zeroHuge = (size: number): void => {
      const withSize = (mode & ((1 << PAGE_SHIFT) - 1)) | ((31 - Math.clz32(size)) << PAGE_SHIFT);
      complete('UFFDIO_COPY', length, size, options, done =>
        native().uffdZeroHuge(handle, start + done, length - done, withSize),
      );
    };
    if (page > ORDINARY_PAGE) return zeroHuge(page);
    try {
      complete('UFFDIO_ZEROPAGE', length, page, options, done =>
        native().uffdZero(handle, start + done, length - done, mode),
      );
    } catch (error) {
      // Addresses do not tell what they are made of: of huge pages the kernel says EINVAL.
      const maybeHuge = !('mapping' in range) && start % HUGE_PAGE === 0 && length % HUGE_PAGE === 0;
      if (!maybeHuge || (error as { errno?: number }).errno !== errno.EINVAL) throw error;
      zeroHuge(HUGE_PAGE);
    }
  }

  /** `UFFDIO_ZEROPAGE`, once: bytes done, or `-errno` (EINVAL on huge pages). */
  tryZero(range: MemoryRange, options: FillOptions = NO_OPTIONS): number {
    const start = startOf('range', range);
    return native().uffdZero(this.handle(), start, range.length, modeOf(range, options, FILL));
  }

  /**
   * Makes touching missing pages a SIGBUS (`UFFDIO_POISON`, Linux 6.6), also for who waits now. Outlives the registration.
   *
   * @throws {@linkcode UffdError} as {@link Userfaultfd.copy}; EINVAL before Linux 6.6
   */
  poison(range: MemoryRange, options: FillOptions = NO_OPTIONS): void {
    const start = startOf('range', range);
    const mode = modeOf(range, options, FILL);
    const page = pageOf(range);
    const handle = this.handle();
    complete('UFFDIO_POISON', range.length, page, options, done =>
      native().uffdPoison(handle, start + done, range.length - done, mode),
    );
  }

  /** {@link Userfaultfd.poison}, once: bytes done, or `-errno`. */
  tryPoison(range: MemoryRange, options: FillOptions = NO_OPTIONS): number {
    const start = startOf('range', range);
    return native().uffdPoison(this.handle(), start, range.length, modeOf(range, options, FILL));
  }

  /**
   * Maps pages of shared memory that are in the page cache (`UFFDIO_CONTINUE`, Linux 5.13): the answer to a minor fault.
   *
   * @throws {@linkcode UffdError} as {@link Userfaultfd.copy}; EFAULT where the page cache has no page
   */
  continue(range: MemoryRange, options: CopyOptions = NO_OPTIONS): void {
    const start = startOf('range', range);
    const mode = modeOf(range, options, COPY);
    const page = pageOf(range);
    const handle = this.handle();
    complete('UFFDIO_CONTINUE', range.length, page, options, done =>
      native().uffdContinue(handle, start + done, range.length - done, mode),
    );
  }

  /** {@link Userfaultfd.continue}, once: bytes done, or `-errno`. */
  tryContinue(range: MemoryRange, options: CopyOptions = NO_OPTIONS): number {
    const start = startOf('range', range);
    return native().uffdContinue(this.handle(), start, range.length, modeOf(range, options, COPY));
  }

  /**
   * Moves pages in without copying (`UFFDIO_MOVE`, Linux 6.8): private anonymous memory of this process on both sides;
   * the source is missing afterwards.
   *
   * @param source As long as `range`, and apart from it.
   * @throws {@linkcode UffdError} as {@link Userfaultfd.copy}; `ERR_UFFD_NOT_REGISTERED` also where the source has holes
   */
  move(range: MemoryRange, source: MemoryRange, options: MoveOptions = NO_OPTIONS): void {
    const start = startOf('range', range);
    const from = this.#moveSource(start, range, source);
    const mode = modeOf(range, options, MOVE);
    const page = pageOf(range);
    const handle = this.handle();
    complete('UFFDIO_MOVE', range.length, page, options, done =>
      native().uffdMove(handle, start + done, from + done, range.length - done, mode),
    );
  }

  /** {@link Userfaultfd.move}, once: bytes done, or `-errno`. */
  tryMove(range: MemoryRange, source: MemoryRange, options: MoveOptions = NO_OPTIONS): number {
    const start = startOf('range', range);
    const from = this.#moveSource(start, range, source);
    const mode = modeOf(range, options, MOVE);
    return native().uffdMove(this.handle(), start, from, range.length, mode);
  }

  /**
   * Write-protects a range registered for that, or takes the protection off and wakes who waits for it
   * (`UFFDIO_WRITEPROTECT`). Holes of anonymous memory are passed over unless `wp-unpopulated` is in use.
   *
   * @param options `protect` (default: `true`); `wake`, when taking it off (default: `true`).
   * @throws {@linkcode UffdError} `ERR_UFFD_CHANGING`, `ERR_UFFD_NOT_REGISTERED`, `ERR_UFFD_CLOSED`, `ERR_UFFD_SYSTEM`
   */
  writeProtect(range: MemoryRange, options: { protect?: boolean; wake?: boolean } = {}): void {
    const result = this.tryWriteProtect(range, options);
    if (result < 0) throw errorOf('UFFDIO_WRITEPROTECT', -result, 0);
  }

  /** {@link Userfaultfd.writeProtect}: the length, or `-errno`. */
  tryWriteProtect(range: MemoryRange, options: { protect?: boolean; wake?: boolean } = {}): number {
    const start = startOf('range', range);
    validateOptions('options', options, ['protect', 'wake']);
    const protect = validateBoolean('options.protect', options.protect, true) ? PROTECT : 0;
    const wake = validateBoolean('options.wake', options.wake, true) ? 0 : DONT_WAKE;
    return native().uffdWriteProtect(this.handle(), start, range.length, protect | wake);
  }

  /** Makes the threads that wait for a range look again (`UFFDIO_WAKE`); they fault again where nothing was filled. */
  wake(range: MemoryRange): void {
    const result = this.tryWake(range);
    if (result < 0) throw errorOf('UFFDIO_WAKE', -result, 0);
  }

  /** {@link Userfaultfd.wake}: the length, or `-errno`. */
  tryWake(range: MemoryRange): number {
    return native().uffdWake(this.handle(), startOf('range', range), range.length);
  }

  #source(source: ArrayBufferView | MemoryRange, length: number): Uint8Array | number {
    // The common case first: this stands in front of every copy.
    if (source instanceof Uint8Array && source.byteLength === length) return source;
    const isView = ArrayBuffer.isView(source);
    const bytes = isView ? source.byteLength : undefined;
    if (isView && bytes === length) return validateView('source', source);
    const from = isView ? 0 : sourceOf('source', source);
    if ((bytes ?? (source as MemoryRange).length) !== length) {
      throw argumentError(
        RangeError,
        'ERR_OUT_OF_RANGE',
        `Expected \`source\` to have the ${length} bytes of \`range\`, got ${bytes ?? (source as MemoryRange).length}`,
      );
    }
    return from;
  }

  #moveSource(start: number, range: MemoryRange, source: MemoryRange): number {
    const from = startOf('source', source);
    const { length } = range;
    if (source.length !== length || (from < start + length && start < from + length)) {
      throw argumentError(
        RangeError,
        'ERR_OUT_OF_RANGE',
        `Expected \`source\` to have the ${length} bytes of \`range\` and to be apart from it, got ${source.length} bytes`,
      );
    }
    return from;
  }
}

/** Repeats a step until all is done, and throws with `done` where it cannot go on. */
function complete(
  syscall: string,
  length: number,
  page: number,
  options: FillOptions,
  step: (done: number) => number,
): void {
  let done = 0;
  while (done < length) {
    const result = step(done);
    if (result >= 0) done += result;
    else if (result === -errno.EEXIST && options.onPresent === 'skip') done += page;
    else throw errorOf(syscall, -result, done);
  }
}
