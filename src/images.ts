import type { NativeImage, NativeSession } from '#native';

import { FAILURE_OPTIONS, type FailureOptions, type OnFailure, readFailureOptions } from './policy.js';
import { readSourceTimeout } from './limits.js';
import type { Peer, SessionRegion } from './session.js';
import { readMode, type RestoreMode } from './fill-options.js';
import { fileSource, overlaid, type Overlay, PageSource, passing, release } from './sources.js';
import { readTraceOptions, TRACE_OPTIONS, type TraceOptions } from './trace-options.js';
import { KiB, MiB } from './units.js';
import { validateBoolean, validateOptions, validatePathOrUrl, validatePowerOfTwo } from './validate.js';

/**
 * What a memory image can be given as: the path of a file, a `file:` URL, or a source. A file must not change while it is
 * served.
 */
export type MemoryImage = string | URL | PageSource;

/** A process that waits for its memory. */
export interface ImageRequest {
  /** Who it is. */
  readonly peer: Peer;
  /** The memory it has handed over, in address order; `sourceOffset` is where its bytes are in its image. */
  readonly regions: readonly SessionRegion[];
  /** Bytes of a page. */
  readonly pageSize: number;
  /** Aborts when the answer is not wanted any more: too late, the process is gone, the server is closed. */
  readonly signal: AbortSignal;
}

/** What a process is served from, and how. */
export interface ImageChoice extends TraceOptions, FailureOptions {
  /** Its image. */
  memory: MemoryImage;
  /** Default: the server's. */
  window?: number;
  /** Default: the server's. */
  mode?: RestoreMode;
  /** Default: the server's. */
  collapse?: boolean;
  /** Default: the server's. */
  sourceTimeout?: number;
  /** Bytes of its own over the image, which others share ({@link overlaySource}). Default: none. */
  overlays?: readonly Overlay[];
}

/** Says which image a process gets. */
export type ChooseImage = (
  request: ImageRequest,
) => MemoryImage | ImageChoice | Promise<MemoryImage | ImageChoice>;

/** How images are served where they do not say it themselves. */
export type ImageDefaults = Omit<NativeImage, 'memory' | 'source'>;

/** What the addon is told of an image, and what becomes of it when it fails. */
export interface Served<Image> {
  image: Image;
  onFailure: OnFailure;
}

/** The image of one process. */
export interface Chosen extends Served<NativeImage> {
  /** Absent where the addon opens a file by itself. */
  source: PageSource | undefined;
}

/** @hidden Options that say how an image is served. */
export const IMAGE_OPTIONS: readonly Exclude<keyof ImageChoice, 'memory' | 'overlays'>[] = [
  ...FAILURE_OPTIONS,
  'window',
  'mode',
  'collapse',
  'sourceTimeout',
  ...TRACE_OPTIONS,
];

/** @hidden The one place where what users give as memory becomes what the addon opens. */
export function readMemory(name: string, memory: unknown): string | PageSource {
  if (memory instanceof PageSource) return memory;
  return validatePathOrUrl(name, memory);
}

/** @hidden How what is given as memory is opened where it is served. */
export type OpenMemory = (memory: string | PageSource) => Promise<{ memory: string; source?: number }>;

/** @hidden What the addon opens. A source is opened here, by its first user. */
export async function openMemory(memory: string | PageSource): Promise<{ memory: string; source?: number }> {
  return memory instanceof PageSource ? { memory: '', source: await memory.handle() } : { memory };
}

/** @hidden */
export function withOverlays(
  memory: string | PageSource,
  overlays: readonly Overlay[] | undefined,
): string | PageSource {
  if (overlays === undefined) return memory;
  return overlaid(memory instanceof PageSource ? memory : passing(fileSource(memory)), overlays);
}

/** @hidden */
export function readDefaults(
  name: string,
  options: { [name in keyof ImageDefaults | keyof FailureOptions]?: unknown } & TraceOptions,
): Served<ImageDefaults> {
  const onFailure = readFailureOptions(name, options);
  const { window, mode, collapse, sourceTimeout, replay } = options;
  const read: ImageDefaults = {
    ...readTraceOptions(name, options),
    mode: readMode(`${name}.mode`, mode, replay !== undefined),
    collapse: validateBoolean(`${name}.collapse`, collapse, false),
    onFailure: onFailure.native,
    sourceTimeout: readSourceTimeout(`${name}.sourceTimeout`, sourceTimeout),
  };
  if (window !== undefined) read.window = validatePowerOfTwo(`${name}.window`, window, 4 * KiB, 2 * MiB);
  return { image: read, onFailure };
}

/** @hidden What a function has answered. */
export async function readChoice(
  choice: unknown,
  { image: defaults, onFailure }: Served<ImageDefaults>,
  open: OpenMemory,
): Promise<Chosen> {
  const name = 'the answer of options.memory';
  const isImage = choice instanceof URL || choice instanceof PageSource;
  if (typeof choice !== 'object' || choice === null || isImage) {
    const read = readMemory(name, choice);
    return { image: { ...defaults, ...(await open(read)) }, onFailure, source: sourceOf(read) };
  }
  validateOptions(name, choice, ['memory', 'overlays', ...IMAGE_OPTIONS]);
  const { memory, overlays, ...own } = choice as ImageChoice;
  const read = readDefaults(name, own);
  const settings = { ...defaults, ...read.image };
  // Who says what happens, says all of that.
  const says = FAILURE_OPTIONS.some(option => own[option] !== undefined);
  if (!says) settings.onFailure = defaults.onFailure;
  if (own.collapse === undefined) settings.collapse = defaults.collapse;
  if (own.sourceTimeout === undefined) settings.sourceTimeout = defaults.sourceTimeout;
  // Who says how it is brought, says all of that.
  if (own.mode === undefined && own.replay === undefined) settings.mode = defaults.mode;
  else if (own.replay === undefined) delete settings.replay;
  const laid = withOverlays(readMemory(`${name}.memory`, memory), overlays);
  try {
    const opened = await open(laid);
    const policy = says ? read.onFailure : onFailure;
    return { image: { ...settings, ...opened }, onFailure: policy, source: sourceOf(laid) };
  } catch (error) {
    release(laid);
    throw error;
  }
}

/** Absent where the addon opens a file by itself. @hidden */
export const sourceOf = (memory: string | PageSource | undefined): PageSource | undefined =>
  memory instanceof PageSource ? memory : undefined;

/** @hidden */
export function requestOf(asked: NativeSession, signal: AbortSignal): ImageRequest {
  const regions = Object.freeze(asked.regions.map(region => Object.freeze(region)));
  return Object.freeze({ peer: Object.freeze(asked.peer), regions, pageSize: asked.pageSize, signal });
}
