import type { NativeJob, NativeSource } from '#native';

import { fromNative, UffdError } from './errors.js';
import { native } from './native.js';
import { MiB } from './units.js';
import {
  validateBoolean,
  validateInteger,
  validateOptions,
  validatePathOrUrl,
  validateView,
  wrongType,
} from './validate.js';

/** How a source is opened: what the native side knows it by. @hidden */
export interface OpenSource {
  readonly handle: number;
  /** Ends what answers for it. */
  readonly close?: () => void;
  /** Why it failed, where that is known here. */
  readonly failure?: () => unknown;
}

/**
 * How another process can read the same bytes by itself: from files, from what it is sent. Absent where this one has to be
 * asked. @hidden
 */
export type SourceDescription =
  | { kind: 'file'; path: string; direct: boolean; mayChange: boolean }
  | { kind: 'zero'; size: number }
  | { kind: 'memory'; bytes: Uint8Array }
  | { kind: 'layered'; base: PageSource; diffs: readonly string[] }
  | { kind: 'overlay'; base: PageSource; places: readonly (readonly [number, number])[]; bytes: Uint8Array };

/**
 * What an open source counts for where the engine decides when to collect: it sees a small object and not the descriptor, of which a
 * process has a thousand, nor the bytes.
 */
const WEIGHT = 1 * MiB;

/** Sources that were dropped without being closed. Who is served from one holds it. */
const forgotten = new FinalizationRegistry<OpenSource>(endSource);

/** Sessions that have it go on, unless it is JavaScript: nobody answers for it any more. */
function endSource({ handle, close }: OpenSource): void {
  close?.();
  native().closeSource(handle, true);
  native().weigh(-WEIGHT);
}

/**
 * Where the bytes of missing pages come from. One source can feed any number of sessions; it is opened by the first. Made by
 * {@link fileSource}, {@link bufferSource}, {@link zeroSource}, {@link layeredSource}, {@link overlaySource},
 * {@link callbackSource}, {@link workerSource}.
 */
export class PageSource {
  /** @hidden Whether this very thread has to run for bytes to come: then it must not wait for them. */
  readonly needsThisThread: boolean;
  /** @hidden */
  readonly description: SourceDescription | undefined;
  /** @hidden Made by this package for one use: nobody else can close it. */
  passing = false;
  readonly #ended = new Set<() => void>();
  readonly #open: () => Promise<OpenSource>;
  #opened: Promise<OpenSource> | undefined;
  #now: OpenSource | undefined;
  #failure: (() => unknown) | undefined;
  #closed = false;

  /** @hidden */
  constructor(open: () => Promise<OpenSource>, needsThisThread: boolean, description?: SourceDescription) {
    this.#open = open;
    this.needsThisThread = needsThisThread;
    this.description = description;
  }

  /** Whether {@link PageSource.close} was called. */
  get closed(): boolean {
    return this.#closed;
  }

  /** @hidden The native number. */
  async handle(): Promise<number> {
    if (this.#closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the source is closed');
    this.#opened ??= this.#begin();
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

  async #begin(): Promise<OpenSource> {
    const open = await this.#open();
    this.#failure = open.failure;
    forgotten.register(this, open, this);
    native().weigh(WEIGHT);
    return open;
  }

  /** @hidden Has `act` called when it is closed. */
  whenClosed(act: () => void): void {
    this.#ended.add(act);
  }

  /** @hidden What made it fail last. */
  failure(): unknown {
    return this.#failure?.();
  }

  /**
   * Ends it. Sessions that it feeds go on, and have its file or its bytes as long as they last; those whose source is JavaScript end by
   * their failure policy when they want the next bytes. Idempotent. One that is dropped without it is closed when it is
   * collected, which is never before its sessions have ended.
   */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const act of this.#ended) act();
    this.#end();
  }

  /** {@link PageSource.close} with its defaults. */
  [Symbol.dispose](): void {
    this.close();
  }

  #end(): void {
    const now = this.#now;
    if (!now) return;
    this.#now = undefined;
    forgotten.unregister(this);
    endSource(now);
  }
}

/** How a file is read. */
export interface FileSourceOptions {
  /**
   * Past the page cache (`O_DIRECT`), for an image that is read once and would push out what is used again. Default:
   * `false`.
   */
  direct?: boolean;
  /**
   * It may be written to while it is served: each page is what the file has when it is read, and only a file that is cut short
   * is an error. Default: `false`, and of a file that was written to, or whose time of writing was set (`touch`), no page is taken any more.
   */
  mayChange?: boolean;
}

/** Bytes of a clone's own over a shared image: its identity, its network settings. */
export interface Overlay {
  /** Where the first of them is in the image, in bytes. */
  readonly offset: number;
  /** At least one. */
  readonly data: ArrayBufferView;
}

/**
 * A file or block device: a snapshot's memory. It must not change while it is served: one that shrinks, or is written to, ends its
 * sessions by their failure policy, unless the options say that it may. What its last page has behind its end is zero, as in a mapping of it. Opened by the first session, on
 * another thread.
 */
export function fileSource(path: string | URL, options: FileSourceOptions = {}): PageSource {
  const name = validatePathOrUrl('path', path);
  validateOptions('options', options, ['direct', 'mayChange']);
  const direct = validateBoolean('options.direct', options.direct, false);
  const mayChange = validateBoolean('options.mayChange', options.mayChange, false);
  const description = { kind: 'file', path: name, direct, mayChange } as const;
  const open = async () => openedBy(native().openFileSource(name, direct, mayChange));
  return new PageSource(open, false, description);
}

/** Bytes, copied here: whole pages that are missing come from them. */
export function bufferSource(bytes: ArrayBufferView): PageSource {
  const copy = Uint8Array.from(validateView('bytes', bytes));
  return new PageSource(async () => opened(native().bufferSource(copy)), false, {
    kind: 'memory',
    bytes: copy,
  });
}

/**
 * Zeros: memory that is served to be followed, or the base of layers.
 *
 * @param size Bytes.
 */
export function zeroSource(size: number): PageSource {
  validateInteger('size', size, 1, Number.MAX_SAFE_INTEGER);
  return new PageSource(async () => opened(native().zeroSource(size)), false, { kind: 'zero', size });
}

/**
 * Diffs over a base: sparse files as long as the base, of which the data (`SEEK_DATA`) takes the place of what lies below;
 * the later ones lie on top. None may change while it is served.
 */
export function layeredSource(base: PageSource, diffs: readonly (string | URL)[]): PageSource {
  refuseOther('base', base);
  refuseNoArray('diffs', diffs);
  const names = diffs.map((diff: string | URL, index) => validatePathOrUrl(`diffs[${index}]`, diff));
  const open = async (): Promise<OpenSource> => {
    const layered = await openedBy(native().openLayeredSource(await base.handle(), names));
    return { ...layered, failure: () => base.failure() };
  };
  return new PageSource(open, base.needsThisThread, { kind: 'layered', base, diffs: names });
}

/**
 * A few bytes over a shared image, for one clone: at most 1024 ranges and 16 MiB, apart from each other and inside of it.
 * They are copied here.
 */
export function overlaySource(base: PageSource, overlays: readonly Overlay[]): PageSource {
  refuseOther('base', base);
  refuseNoArray('overlays', overlays);
  const read = overlays.map((overlay: Overlay, index) => readOverlay(`overlays[${index}]`, overlay));
  const places = read.map(({ offset, data }) => [offset, data.byteLength] as const);
  const bytes = new Uint8Array(Buffer.concat(read.map(({ data }) => data)));
  const open = async (): Promise<OpenSource> => {
    const laid = opened(native().overlaySource(await base.handle(), places.flat(), bytes));
    return { ...laid, failure: () => base.failure() };
  };
  return new PageSource(open, base.needsThisThread, { kind: 'overlay', base, places, bytes });
}

/** @hidden */
export function passing(source: PageSource): PageSource {
  source.passing = true;
  return source;
}

/** @hidden Closes what was made for one use, which has it or will never come: only the caller's own are left. */
export function release(source: unknown): void {
  let given = source;
  while (given instanceof PageSource && given.passing) {
    given.close();
    const { description }: PageSource = given;
    given = description?.kind === 'overlay' ? description.base : undefined;
  }
}

/** @hidden A session's own bytes over a source, where it has any. */
export function overlaid(source: PageSource, overlays: readonly Overlay[] | undefined): PageSource {
  return overlays === undefined ? source : passing(overlaySource(source, overlays));
}

function readOverlay(name: string, overlay: Overlay): { offset: number; data: Uint8Array } {
  validateOptions(name, overlay, ['offset', 'data']);
  const data = validateView(`${name}.data`, overlay.data);
  validateInteger(`${name}.data.byteLength`, data.byteLength, 1, 16 * MiB);
  return { offset: validateInteger(`${name}.offset`, overlay.offset, 0, Number.MAX_SAFE_INTEGER), data };
}

function refuseNoArray(name: string, value: unknown): void {
  if (Array.isArray(value)) return;
  throw wrongType(name, 'an array', value);
}

function refuseOther(name: string, source: unknown): void {
  if (source instanceof PageSource) return;
  throw wrongType(name, 'a PageSource', source);
}

function opened({ error, handle }: NativeSource): OpenSource {
  if (error) throw fromNative(error);
  return { handle };
}

async function openedBy(job: Promise<NativeJob>): Promise<OpenSource> {
  const { error, handle } = await job;
  if (error || handle === undefined) throw fromNative(error ?? NO_ANSWER);
  return { handle };
}

const NO_ANSWER = { code: 'ERR_UFFD_SOURCE', message: 'the source could not be opened' };
