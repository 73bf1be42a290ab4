import type { NativeError, NativeRecording, NativeStats } from '#native';

import { fromNative, toNative, UffdError } from './errors.js';
import { holdOpen } from './hold-open.js';
import { within } from './limits.js';
import { native } from './native.js';
import type { Told } from './remote-told.js';
import { Trace } from './trace.js';

/** What a daemon tells of a recording that is over. @hidden */
export interface ToldRecording {
  session: number;
  /** What its file is to be called. */
  path: string;
  /** Whose it is. */
  owner: string;
  /** And whose program that is. */
  uid?: number | null;
  server?: number | null;
  /** Whether that client is connected, or may come back. */
  attended: boolean;
  size?: number;
  /** Nothing is missing at its end. */
  whole?: boolean;
  /** There was no place for it any more. */
  lost?: boolean;
  counters?: Partial<NativeRecording>;
}

/** What another user's program has asked for is no reason to write anywhere. @hidden */
export const isOfThisUser = ({ uid }: ToldRecording): boolean => uid === process.geteuid?.();

/** One that is being written, or was. */
interface Brought {
  server: number | undefined;
  recording: NativeRecording;
  /** Resolves when the file is there, or is known not to come. */
  settled: Promise<void>;
  over: boolean;
}

/** How long a disk may take for one, in milliseconds: whoever waits for the end of its session waits no longer. */
const LATEST = 5000;

const tooLate = (timeout: number): UffdError =>
  new UffdError('ERR_UFFD_TIMEOUT', `the recording was not written within ${timeout} ms`);

const TORN = {
  code: 'ERR_UFFD_TRACE',
  message: 'the recording ends where the daemon that wrote it ended; what it has is good',
};

/** Recordings that a daemon has made in its memory: fetched, and written to their files here. @hidden */
export class RemoteRecordings {
  readonly #repeated: (method: string, params: object) => Promise<Told>;
  readonly #brought = new Map<number, Brought>();

  constructor(repeated: (method: string, params: object) => Promise<Told>) {
    this.#repeated = repeated;
  }

  /** All that the daemon has. */
  async list(): Promise<ToldRecording[]> {
    const { recordings } = await this.#repeated('recording.list', {});
    return recordings as ToldRecording[];
  }

  /** Writes one to its file, once. Never rejects: {@link stats} and {@link outcome} tell what has come of it. */
  async bring(told: ToldRecording): Promise<void> {
    const { session, path } = told;
    const known = this.#brought.get(session);
    if (known) return known.settled;
    const recording: NativeRecording = {
      path,
      state: 'recording',
      faults: 0,
      dropped: 0,
      bytes: told.size ?? 0,
      full: false,
      ...told.counters,
    };
    const settled = holdOpen(this.#bring(told, recording)).finally(() => {
      brought.over = true;
    });
    const brought: Brought = { server: told.server ?? undefined, recording, settled, over: false };
    this.#brought.set(session, brought);
    return settled;
  }

  async #bring(told: ToldRecording, recording: NativeRecording): Promise<void> {
    try {
      await this.write(told, told.path);
      if (told.whole === false) {
        const { length, dropped } = await Trace.read(told.path);
        Object.assign(recording, { faults: length, dropped, state: 'torn', error: TORN });
      } else recording.state = 'written';
    } catch (error) {
      const why = error instanceof UffdError ? error : new UffdError('ERR_UFFD_TRACE', String(error));
      Object.assign(recording, { state: 'failed', error: toNative(why) });
      // It is there for others.
      await this.#repeated('recording.done', { session: told.session, written: false }).catch(() => {});
    }
  }

  /** Writes one to a file. What was there before stays until all of it is written. */
  async write({ session }: ToldRecording, path: string): Promise<void> {
    const bytes = await this.#read(session);
    // Another client was there before.
    if (bytes === undefined) return;
    const writing = native().writeRecording(path, bytes);
    const { error } = await within(writing, { timeout: LATEST, signal: undefined }, tooLate);
    if (error) throw fromNative(error);
    await this.#repeated('recording.done', { session, written: true });
  }

  async #read(session: number): Promise<Buffer | undefined> {
    const parts: Buffer[] = [];
    let read = 0;
    let size = 1;
    while (read < size) {
      const answer = await this.#repeated('recording.read', { session, offset: read });
      if (answer['written'] === true) return undefined;
      const part = Buffer.from(answer['bytes'] as string, 'base64');
      size = answer['size'] as number;
      read += part.length;
      if (part.length === 0) break;
      parts.push(part);
    }
    return Buffer.concat(parts);
  }

  /** What has to be over before a notice is told: the end of a session that is recorded, or of a server that had it. */
  before(kind: string, id: number | undefined, server: number | undefined): Promise<unknown> | undefined {
    const concerns = (session: number, of: Brought): boolean =>
      kind === 'ended' ? session === id : kind === 'closed' && server !== undefined && of.server === server;
    const open = [...this.#brought].filter(([session, of]) => !of.over && concerns(session, of));
    return open.length > 0 ? Promise.all(open.map(async ([, { settled }]) => settled)) : undefined;
  }

  /** What came of ending one; `undefined` where nothing is known of it here. */
  async outcome(session: number): Promise<{ error?: NativeError } | undefined> {
    const brought = this.#brought.get(session);
    if (brought === undefined) return undefined;
    await brought.settled;
    const { error } = brought.recording;
    return error === undefined ? {} : { error };
  }

  /** A session's counters, with what is known here of its recording. */
  stats(session: number, stats: NativeStats): NativeStats {
    const brought = this.#brought.get(session);
    return brought ? { ...stats, recording: brought.recording } : stats;
  }

  forget(session: number): void {
    this.#brought.delete(session);
  }
}
