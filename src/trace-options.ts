import type { NativeRecording } from '#native';

import { fromNative, type UffdError } from './errors.js';
import { native } from './native.js';
import { validatePathOrUrl } from './validate.js';

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
}

/** @hidden */
export const TRACE_OPTIONS = ['record'] as const;

/** How far the recording of a session's faults has come. */
export interface RecordingStats {
  /** What its file is called when it is whole. */
  readonly path: string;
  /** It goes on; its file is whole; there is no file, and `error` says why. */
  readonly state: 'recording' | 'written' | 'failed';
  /** Faults that were recorded. */
  readonly faults: number;
  /** Faults that were not: it is full, or they came faster than they could be written. */
  readonly dropped: number;
  /** Bytes of the file so far. */
  readonly bytes: number;
  /** It has as many faults as it may have. */
  readonly full: boolean;
  readonly error?: UffdError;
}

/** @hidden {@link TraceOptions}, checked. */
export interface TraceSettings {
  record?: string;
}

/** @hidden */
export function readTraceOptions(name: string, { record }: TraceOptions): TraceSettings {
  return record === undefined ? {} : { record: validatePathOrUrl(`${name}.record`, record) };
}

/** @hidden Does something with what these settings come to for a source, opened on another thread. */
export async function withTraces<T>(
  { record }: TraceSettings,
  source: number,
  act: (given: { record?: number }) => T,
): Promise<T> {
  if (record === undefined) return act({});
  const { error, handle } = await native().prepareRecording(record, source);
  if (error || handle === undefined) throw fromNative(error ?? NO_ANSWER);
  try {
    return act({ record: handle });
  } finally {
    native().forgetRecording(handle);
  }
}

/** @hidden */
export function recordingOf({ error, ...told }: NativeRecording): RecordingStats {
  return Object.freeze(error ? { ...told, error: fromNative(error) } : told);
}

const NO_ANSWER = { code: 'ERR_UFFD_TRACE', message: 'the recording could not be begun' };
