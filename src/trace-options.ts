import type { NativeRecording, NativeReplay, NativeReplayStats } from '#native';

import { fromNative, type UffdError } from './errors.js';
import { native } from './native.js';
import { Trace } from './trace.js';
import { argumentError, validateBoolean, validatePathOrUrl } from './validate.js';

/** What a session does about its working set. */
export interface TraceOptions {
  /**
   * Records the faults: in their order, with time, kind, what they brought, and how long they waited. The file is there,
   * whole, when the session has ended, or {@link Session.stopRecording} resolves; until then it is written beside it under
   * another name. At most 4,194,304 faults; how many came afterwards is told. Sessions of one server write a file each, and
   * the last one to end has the name. Record with `window: 4096` to know every page, else windows are what is known.
   * Default: nothing is recorded.
   */
  record?: string | URL;
  /**
   * Brings what an earlier run of the same image wanted, in its order, while no fault waits: a recording, or the path of one. A torn one is
   * replayed as far as it goes. {@link Session.replayed} tells when it is done, {@link SessionStats.replay} what came of it.
   * Default: nothing is replayed.
   */
  replay?: string | URL | Trace;
  /** Holds back one page in 64 of what is replayed, to estimate how much of it nobody wants. Default: `false`. */
  estimateWaste?: boolean;
}

/** @hidden */
export const TRACE_OPTIONS = ['record', 'replay', 'estimateWaste'] as const;

/** How far the recording of a session's faults has come. */
export interface RecordingStats {
  /** What its file is called when it is whole. */
  readonly path: string;
  /**
   * It goes on; its file is whole; its file ends where the daemon that wrote it ended ({@link PagerClient}), and has what came before; there is no
   * file. `error` says why it is torn, or failed.
   */
  readonly state: 'recording' | 'written' | 'torn' | 'failed';
  /** Faults that were recorded. */
  readonly faults: number;
  /** Faults that were not: it is full, or they came faster than they could be written. */
  readonly dropped: number;
  /** Bytes of the file so far. */
  readonly bytes: number;
  /** It has as many faults as it may have. */
  readonly full: boolean;
  /** Why there is no file, or none that is whole. */
  readonly error?: UffdError;
}

/** What has come of a replay. */
export interface ReplayStats {
  /** Pages of the image that are to be brought, those held back not included. */
  readonly pages: number;
  /** Of these, pages that were brought before any fault asked for them. */
  readonly installed: number;
  /** Faults on pages that were to be brought, and came first. */
  readonly late: number;
  /** Faults on pages of the image that the recording has not. */
  readonly missed: number;
  /** Everything has been brought, or is on its way to a fault. */
  readonly done: boolean;
  /** Pages held back that a fault can still ask for, or has: with `estimateWaste`. */
  readonly heldBack: number;
  /** Of these, pages that a fault has asked for. */
  readonly heldBackFaults: number;
  /**
   * The share of what was brought that nobody has wanted so far, 0 to 1, as estimated from the pages held back; absent where
   * there are none. With few of them, it is coarse.
   */
  readonly waste?: number;
}

/** @hidden {@link TraceOptions}, checked. */
export interface TraceSettings {
  record?: string;
  replay?: NativeReplay;
}

/** @hidden */
export function readTraceOptions(name: string, options: TraceOptions): TraceSettings {
  const { record, replay } = options;
  const estimateWaste = validateBoolean(`${name}.estimateWaste`, options.estimateWaste, false);
  const read: TraceSettings = {};
  if (record !== undefined) read.record = validatePathOrUrl(`${name}.record`, record);
  if (replay instanceof Trace) read.replay = { trace: Trace.handleOf(replay), estimateWaste };
  else if (replay !== undefined) {
    read.replay = { path: validatePathOrUrl(`${name}.replay`, replay), estimateWaste };
  } else if (estimateWaste) {
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      `Expected a recording as \`${name}.replay\` beside \`${name}.estimateWaste\``,
    );
  }
  return read;
}

/** @hidden Does something with what these settings come to for a source, opened on another thread. */
export async function withTraces<T>(
  { record, replay }: TraceSettings,
  source: number,
  act: (given: { workingSet?: number }) => T,
): Promise<T> {
  if (record === undefined && replay === undefined) return act({});
  const { error, handle } = await native().prepareWorkingSet(source, record, replay);
  if (error || handle === undefined) throw fromNative(error ?? NO_ANSWER);
  try {
    return act({ workingSet: handle });
  } finally {
    native().forgetWorkingSet(handle);
  }
}

/** @hidden */
export function recordingOf({ error, ...told }: NativeRecording): RecordingStats {
  return Object.freeze(error ? { ...told, error: fromNative(error) } : told);
}

/** @hidden */
export function replayOf({ heldBackHidden, ...told }: NativeReplayStats): ReplayStats {
  // Those that came with a neighbour can never be asked for: they tell nothing.
  const heldBack = Math.max(0, told.heldBack - heldBackHidden);
  const waste = heldBack === 0 ? {} : { waste: Math.max(0, 1 - told.heldBackFaults / heldBack) };
  return Object.freeze({ ...told, heldBack, ...waste });
}

const NO_ANSWER = { code: 'ERR_UFFD_TRACE', message: 'the recording could not be opened' };
