import { cpus } from 'node:os';

import type { NativePager, NativeServed } from '#native';

import { fromNative } from './errors.js';
import { MemoryMapping } from './mapping.js';
import { native } from './native.js';
import { Paging } from './paging.js';
import { type AdoptOptions, readAdopting, readServing, type ServeOptions } from './serve-options.js';
import type { Session } from './session.js';
import { type PageSource, release } from './sources.js';
import { readStatsInterval } from './stats-reports.js';
import { type TraceSettings, withTraces } from './trace-options.js';
import { Userfaultfd } from './userfaultfd.js';
import { validateInteger, validateOptions, wrongType } from './validate.js';

export type { AdoptOptions, ServeOptions, SessionMode } from './serve-options.js';

/** Options of {@link Pager.create}. */
export interface PagerOptions {
  /**
   * The CPU to pin the pager's thread to; it then has a thread of its own. Worth it only where the faulting threads are
   * pinned as well. Default: not pinned, one thread shared by all pagers and servers of this process.
   */
  cpu?: number;
  /** Milliseconds between `'stats'` events, at least 10. Default: there are none. */
  statsInterval?: number;
}

/**
 * Answers page faults: of this process's own mappings, and of userfaultfds that came from other processes. One native thread
 * serves any number of sessions; JavaScript is not on the path of a fault unless a source is JavaScript.
 *
 * It keeps the process alive while it serves other processes, unless {@link Pager.unref} was called.
 *
 * @example
 * ```ts
 * await using pager = Pager.create();
 * using mapping = MemoryMapping.anonymous(1 * GiB);
 * await using session = await pager.serve(mapping, { source: fileSource('image') });
 * const bytes = await mapping.read(123 * 4096, 64); // comes from the file
 * ```
 */
export class Pager extends Paging {
  readonly #native: NativePager;

  private constructor(cpu: number | undefined, statsInterval: number | undefined) {
    super(notify => {
      const started = native().createPager(cpu, notify);
      const [failed] = started.takeNotices();
      if (!failed?.error) return started;
      started.release();
      throw fromNative(failed.error);
    }, statsInterval);
    this.#native = this.engine as NativePager;
  }

  /**
   * Starts a pager.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`: no descriptors or threads left, or no such `cpu`.
   */
  static create(options: PagerOptions = {}): Pager {
    validateOptions('options', options, ['cpu', 'statsInterval']);
    const { cpu } = options;
    if (cpu !== undefined) validateInteger('options.cpu', cpu, 0, Math.max(cpus().length, 1024) - 1);
    return new Pager(cpu, readStatsInterval(options.statsInterval));
  }

  /**
   * Serves a mapping of this process: from now on its missing pages come from the source, whoever touches them. What is
   * given back ({@link MemoryMapping.discard}) reads zero, never the source again.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SOURCE` (it cannot be opened), `ERR_UFFD_PROTOCOL` (it is shorter than the
   *   mapping), `ERR_UFFD_WOULD_DEADLOCK` (the mapping has a buffer, and only this thread could bring the bytes),
   *   `ERR_UFFD_NOT_PERMITTED`, `ERR_UFFD_UNSUPPORTED` (also for the mode `'minor'` of memory that is no shared memfd of
   *   ordinary pages), `ERR_UFFD_SYSTEM`
   */
  async serve(mapping: MemoryMapping, options: ServeOptions): Promise<Session> {
    if (!(mapping instanceof MemoryMapping)) throw wrongType('mapping', 'a MemoryMapping', mapping);
    const { settings, onFailure, signal, traces, source } = readServing(options);
    const handle = mapping.nativeHandle();
    mapping.refuseDeadlock(source.needsThisThread);
    this.refuseClosed();
    const served = await opening(source, traces, given => {
      this.refuseClosed();
      mapping.refuseDeadlock(source.needsThisThread);
      return this.#native.serve(handle, { ...settings, ...given });
    });
    return this.started(served, { source, mapping, onFailure }, signal);
  }

  /**
   * Serves memory that is registered with a userfaultfd: of another process that sent it, or of a forked child. Its events
   * are the pager's to read from now on, and the object is closed.
   *
   * If it has `event-fork` in use, each child that its process forks gets a session of its own, which begins with its
   * parent's pages as they are ({@link Session.parent}; the event `'session'`), from the same source, with the same options.
   *
   * @throws {@linkcode UffdError} as {@link Pager.serve}; `ERR_UFFD_REGION` and `ERR_UFFD_PROTOCOL` (a region that cannot
   *   be, or that the source or the memfd does not cover; a memfd that is none, or cannot be written to), `ERR_UFFD_CLONE`
   *   (it has a clone)
   */
  async adopt(uffd: Userfaultfd, options: AdoptOptions): Promise<Session> {
    if (!(uffd instanceof Userfaultfd)) throw wrongType('uffd', 'a Userfaultfd', uffd);
    const { settings, onFailure, signal, traces, source, ...memory } = readAdopting(options);
    const { regions, pageSize, pidfd, memfd } = memory;
    this.refuseClosed();
    const served = await opening(source, traces, given => {
      this.refuseClosed();
      const all = { ...settings, ...given };
      const adopted = this.#native.adopt(uffd.handle(), regions, pageSize, pidfd, memfd, all);
      if (!adopted.error) {
        this.isForeign(adopted.id);
        uffd.taken();
      }
      return adopted;
    });
    return this.started(served, { source, mapping: undefined, onFailure }, signal);
  }
}

/** Begins a session with a source that is open: it has that from then on, whoever closes it. */
async function opening(
  source: PageSource,
  traces: TraceSettings,
  begin: (given: { source: number; workingSet?: number }) => NativeServed,
): Promise<NativeServed> {
  try {
    const opened = await source.handle();
    return await withTraces(traces, opened, given => begin({ ...given, source: opened }));
  } finally {
    release(source);
  }
}
