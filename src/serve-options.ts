import type { NativeServeOptions } from '#native';

import { type AdoptRegion, readRegions, refuseMemfd } from './adopting.js';
import { validateSignal } from './exited.js';
import { readMode, type RestoreMode } from './fill-options.js';
import { IMAGE_OPTIONS } from './images.js';
import { readSourceTimeout } from './limits.js';
import { MODES, type RegisterMode } from './names.js';
import {
  type DecideFailure,
  type FailureOptions,
  type FailurePolicy,
  type OnFailure,
  readFailureOptions,
} from './policy.js';
import { overlaid, type Overlay, PageSource } from './sources.js';
import { readTraceOptions, type TraceOptions, type TraceSettings } from './trace-options.js';
import { KiB, MiB } from './units.js';
import {
  argumentError,
  validateBoolean,
  validateFd,
  validateNames,
  validateOptions,
  validatePowerOfTwo,
  wrongType,
} from './validate.js';

/** Options of {@link Pager.serve}. */
export interface ServeOptions extends TraceOptions, FailureOptions {
  /** Where the bytes come from; as long as the mapping, at least. */
  source: PageSource;
  /**
   * What happens where memory cannot be served: what is missing is poisoned (touching it is SIGBUS, which ends this program
   * if the memory is its own), the process is killed (this one: aborted), or whoever touches it waits (`'hold'`). Why is written to
   * standard error before memory of this process is poisoned, or it is aborted. A function that says which is never asked while
   * this thread waits for that memory itself. Default: `'poison'`.
   */
  onFailure?: FailurePolicy | DecideFailure;
  /**
   * Bytes installed around a fault, a power of two from 4 KiB to 2 MiB. Default: as the faults suggest: 64 KiB at first, doubling
   * to 2 MiB where one is right behind the other, 256 KiB where they are dense, 16 KiB where they are rare.
   */
  window?: number;
  /** How much is brought before the session is there. Default: `'windows'`. */
  mode?: RestoreMode;
  /**
   * Join what is there to transparent huge pages, 2 MiB after 2 MiB, when no fault has come for 20 ms (`process_madvise`,
   * `MADV_COLLAPSE`, Linux 6.1). Zeros of the image take memory then. Where it cannot be, {@link Session.fallback} says why. Default: `false`.
   */
  collapse?: boolean;
  /** Gives up waiting for the session, with its reason; what is missing then is poisoned. */
  signal?: AbortSignal;
  /** Milliseconds the source may take for a read; then the session ends as `'stalled'`. Default: 30,000. */
  sourceTimeout?: number;
  /**
   * Which faults are answered; any of them together. Adopted memory has to be registered for them. Default: `['missing']`.
   *
   * - `'missing'`: of pages that are not there. They get the source's bytes.
   * - `'minor'`: of pages that a memfd has and the mapping has not (`UFFDIO_CONTINUE`; Linux 5.14, `minor-shmem`). The
   *   source's bytes are written to the memfd, with the window around them, and everybody who maps it gets the same pages.
   *   Until the session has brought a page, nobody else may write to it, by the memfd or by a mapping that is not
   *   registered: that would be overwritten. Afterwards everybody may. Without `'missing'` the memfd must have all its
   *   pages (whatever is in them): the kernel would fill holes with zeros, without a fault.
   * - `'write-protect'`: of writes. The page may be written to, and is told by {@link Session.takeDirty}.
   *
   * With `'write-protect'` alone the source is never asked: all the memory is held to be there.
   */
  modes?: readonly SessionMode[];
  /** Bytes of this session's own over the source ({@link overlaySource}). Default: none. */
  overlays?: readonly Overlay[];
}

/** Which faults a session answers. */
export type SessionMode = RegisterMode;

/** Options of {@link Pager.adopt}. */
export interface AdoptOptions extends ServeOptions {
  /** What is registered with the userfaultfd, and where its bytes are in the source. */
  regions: readonly AdoptRegion[];
  /**
   * With the mode `'minor'`, and only then: the memfd (or file of tmpfs) that the memory is a shared mapping of, open for
   * writing. Stays the caller's.
   */
  memfd?: number;
  /** Bytes of a page there: 4096, or the size of its huge pages. Default: 4096. */
  pageSize?: number;
  /** A pidfd of the process whose memory it is ({@link pidfdOf}), so that its end is seen at once. Stays the caller's. */
  pidfd?: number;
}

const SERVE: readonly string[] = ['source', 'signal', 'modes', 'overlays', ...IMAGE_OPTIONS];
const ADOPT: readonly string[] = [...SERVE, 'regions', 'memfd', 'pageSize', 'pidfd'];

/** Options of a session, checked. @hidden */
export interface Serving {
  settings: Omit<NativeServeOptions, 'source'>;
  onFailure: OnFailure;
  signal: AbortSignal | undefined;
  traces: TraceSettings;
  /** With the overlays over it. */
  source: PageSource;
}

/** The same of memory that is adopted. @hidden */
export interface Adopting extends Serving {
  regions: AdoptRegion[];
  pageSize: number;
  memfd: number | undefined;
  pidfd: number | undefined;
}

/** @hidden */
export function readServing(options: ServeOptions, known: readonly string[] = SERVE): Serving {
  const { settings, onFailure } = readServeOptions(options, known);
  const signal = signalOf(options);
  const traces = readTraceOptions('options', options);
  return { settings, onFailure, signal, traces, source: overlaid(options.source, options.overlays) };
}

/** @hidden */
export function readAdopting(options: AdoptOptions): Adopting {
  const serving = readServing(options, ADOPT);
  const { memfd, pageSize = 4 * KiB, pidfd } = options;
  const regions = readRegions(options.regions);
  validatePowerOfTwo('options.pageSize', pageSize, 4 * KiB, 1024 * MiB);
  if (pidfd !== undefined) validateFd('options.pidfd', pidfd);
  refuseMemfd(serving.settings.minor, memfd, regions);
  return { ...serving, regions, pageSize, memfd, pidfd };
}

function signalOf({ signal }: ServeOptions): AbortSignal | undefined {
  const checked = validateSignal(signal);
  checked?.throwIfAborted();
  return checked;
}

function readServeOptions(
  options: ServeOptions,
  known: readonly string[],
): { settings: Omit<NativeServeOptions, 'source'>; onFailure: OnFailure } {
  validateOptions('options', options, known);
  const { source, window, modes = ['missing'] } = options;
  if (!(source instanceof PageSource)) throw wrongType('options.source', 'a PageSource', source);
  const named = validateNames('options.modes', modes, MODES);
  if (named.length === 0) {
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      'Expected `options.modes` to name at least one mode: a session without would answer no faults',
    );
  }
  const onFailure = readFailureOptions('options', options);
  const settings = {
    missing: named.includes('missing'),
    minor: named.includes('minor'),
    writeProtect: named.includes('write-protect'),
    mode: readMode('options.mode', options.mode, options.replay !== undefined),
    collapse: validateBoolean('options.collapse', options.collapse, false),
    onFailure: onFailure.native,
    sourceTimeout: readSourceTimeout('options.sourceTimeout', options.sourceTimeout),
    ...(window === undefined
      ? {}
      : { window: validatePowerOfTwo('options.window', window, 4 * KiB, 2 * MiB) }),
  };
  return { settings, onFailure };
}
