import { closeSync } from 'node:fs';
import { resolve } from 'node:path';

import { fromNative } from './errors.js';
import { native } from './native.js';
import type { PageSource } from './sources.js';
import { type TraceSettings, withTraces } from './trace-options.js';

/** What a daemon is told of what is recorded and replayed; the descriptor of what is replayed rides with it. @hidden */
export interface PackedTraces {
  record?: { path: string; identity: string };
  replay?: number;
}

/**
 * What recording and replaying come to for sessions of a source. All that needs a file or the image is done here, on another
 * thread, as for a session of this process: the recording is read, and held against the image; that its own can be written is tried.
 * The daemon gets what it needs no file for.
 *
 * @param fds Where the descriptor of what is to be replayed is put; its position there is what the daemon is told. @hidden
 */
export async function packTraces(
  traces: TraceSettings,
  source: PageSource | undefined,
  fds: number[],
): Promise<PackedTraces> {
  const { record, replay } = traces;
  if (source === undefined || (record === undefined && replay === undefined)) return {};
  return withTraces(traces, await source.handle(), ({ workingSet = -1 }) => {
    const { error, identity = '', replay: fd } = native().packWorkingSet(workingSet);
    if (error) throw fromNative(error);
    return {
      // What it is called here may be something else to whoever writes it.
      ...(record === undefined ? {} : { record: { path: resolve(record), identity } }),
      ...(fd === undefined ? {} : { replay: fds.push(fd) - 1 }),
    };
  });
}

/** Closes what has been sent, or never will be. @hidden */
export function closePacked(fds: readonly number[], { replay }: PackedTraces): void {
  const fd = fds[replay ?? -1];
  if (fd !== undefined) closeSync(fd);
}
