import type { NativeStats } from '#native';

import { latenciesOf, type SessionLatencies } from './latency.js';
import { recordingOf, type RecordingStats, replayOf, type ReplayStats } from './trace-options.js';

/**
 * Counters of a session since it started. Each is exact; together they may be a few events apart. Every fault ends as one of
 * `faultsInstalled`, `faultsZeroed`, `faultsPoisoned`, `faultsUnprotected`, `alreadyPresent`, `joined` and `unanswered`: when
 * the session is over, `faults` is their sum.
 */
export interface SessionStats {
  /** Page-fault messages read. One fault may send several: duplicates are normal. */
  readonly faults: number;
  /** Faults answered by installing their page from the source. */
  readonly faultsInstalled: number;
  /** Faults answered by zeros, because the page's owner had discarded it. */
  readonly faultsZeroed: number;
  /** Faults answered by poison. */
  readonly faultsPoisoned: number;
  /** Faults answered by taking the write protection off their page. */
  readonly faultsUnprotected: number;
  /** Faults on a page that another fault waits for already: they end with that one. */
  readonly joined: number;
  /** Faults outside the session's memory or after its end, and those it was waiting for when it ended. */
  readonly unanswered: number;
  /** Pages copied in from the source. */
  readonly pagesInstalled: number;
  /** Pages installed as zeros, because their owner had discarded them. */
  readonly pagesZeroed: number;
  /** Pages installed as zeros, because the memory image has zeros there: nothing was copied. */
  readonly pagesZero: number;
  /** Pages poisoned, because they could not or would not be served. */
  readonly pagesPoisoned: number;
  /** Pages discarded by their owner. */
  readonly pagesRemoved: number;
  /** Of the pages installed, with bytes or as zeros of the image, those that were brought without a fault. */
  readonly pagesPrefetched: number;
  /** Pages that were made parts of transparent huge pages. */
  readonly pagesJoined: number;
  /** Blocks of 2 MiB that the kernel would not join to a transparent huge page. */
  readonly blocksNotJoined: number;
  /** Bytes installed from the source. */
  readonly bytesInstalled: number;
  /** Stretches of pages installed by one answer. */
  readonly windows: number;
  /** Faults whose page another answer had brought already. */
  readonly alreadyPresent: number;
  /** Answers the kernel put off because the address space was changing; each was tried again. */
  readonly deferred: number;
  /** Reads of the source that could have waited for a disk, and were done by a worker thread. */
  readonly workerReads: number;
  /** Milliseconds spent answering faults, reading of the source included. */
  readonly busyMs: number;
  /** How long the parts of answering took. */
  readonly latencies: SessionLatencies;
  /** How far the recording of its faults has come; absent where they are not recorded. */
  readonly recording?: RecordingStats;
  /** What has come of the replay; absent where there is none. */
  readonly replay?: ReplayStats;
}

/** @hidden */
export function statsOf(stats: NativeStats = NO_STATS): SessionStats {
  const { busyNs, latencies, recording, replay, ...counters } = stats;
  return Object.freeze({
    ...counters,
    busyMs: busyNs / 1e6,
    latencies: latenciesOf(latencies),
    ...(recording ? { recording: recordingOf(recording) } : {}),
    ...(replay ? { replay: replayOf(replay) } : {}),
  });
}

const NO_STATS: NativeStats = {
  faults: 0,
  faultsInstalled: 0,
  faultsZeroed: 0,
  faultsPoisoned: 0,
  faultsUnprotected: 0,
  joined: 0,
  unanswered: 0,
  pagesInstalled: 0,
  pagesZeroed: 0,
  pagesZero: 0,
  pagesPoisoned: 0,
  pagesRemoved: 0,
  pagesPrefetched: 0,
  pagesJoined: 0,
  blocksNotJoined: 0,
  bytesInstalled: 0,
  windows: 0,
  alreadyPresent: 0,
  deferred: 0,
  workerReads: 0,
  busyNs: 0,
  latencies: new Float64Array(0),
};
