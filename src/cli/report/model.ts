/** What a report says: figures of a recording. A pure function of its faults; nothing is drawn here. */

/** What is asked of a fault. */
export interface ReportFault {
  /** Milliseconds from the session's start. */
  readonly time: number;
  readonly kind: string;
  readonly write: boolean;
  /** Where its page is in the image. */
  readonly offset: number;
  readonly brought: { readonly offset: number; readonly length: number };
  /** Milliseconds. */
  readonly latency: number;
}

/** What is asked of a recording. */
export interface ReportTrace extends Iterable<ReportFault> {
  readonly pageSize: number;
  readonly imageSize: number;
  readonly identity: string;
  readonly startedAt: Date;
  readonly length: number;
  readonly dropped: number;
  readonly end: string;
}

/** A stretch of latencies: from `from` to below `to` milliseconds. */
export interface LatencyBin {
  readonly from: number;
  readonly to: number;
  readonly count: number;
}

/** Faults of a stretch of the image in a stretch of time. */
export interface HeatMap {
  readonly columns: number;
  readonly rows: number;
  /** Milliseconds of all columns. */
  readonly duration: number;
  /** Faults, row by row; the first row is the image's end. */
  readonly cells: readonly number[];
  readonly most: number;
}

/** Counts of the faults of a session that replayed, in equal stretches of time. */
export interface Misses {
  readonly late: readonly number[];
  readonly missed: readonly number[];
}

export interface Figures {
  readonly imageSize: number;
  readonly pageSize: number;
  readonly identity: string;
  readonly startedAt: string;
  readonly end: string;
  readonly dropped: number;
  readonly faults: number;
  readonly writes: number;
  /** Milliseconds to the last fault. */
  readonly duration: number;
  /**
   * Bytes that the session used, as far as that is known: what faults brought, each page counted once, and with it, where it
   * was said what was replayed, the pages of that. Of those nobody knows whether they were wanted: it is the most it can be.
   */
  readonly workingSet: number;
  /** Bytes that faults brought, each page counted once. A session that replays has few faults, however much it uses. */
  readonly faulted: number;
  /** Bytes that answers brought, counted each time. */
  readonly brought: number;
  /** Bytes that were replayed. */
  readonly replayed?: number;
  /** Milliseconds. */
  readonly latency: {
    readonly p50: number;
    readonly p90: number;
    readonly p99: number;
    readonly max: number;
  };
  readonly latencies: readonly LatencyBin[];
  readonly heat: HeatMap;
  /** Bytes that faults had brought, each page counted once, by the end of each of equal stretches of time. */
  readonly growth: readonly number[];
  /** Of a session that replayed another recording: faults on pages of that, which came too early for it, and the others. */
  readonly late?: number;
  readonly missed?: number;
  /** When they were. */
  readonly misses?: Misses;
}

/** Stretches of time: of the heat map and the growth; of the misses, which are fewer. */
const COLUMNS = 96;
const MISS_COLUMNS = 48;
const ROWS = 48;
/** The bins double: below 1 us, below 2 us … */
const FIRST_BIN = 0.001;
const BINS = 24;

/**
 * Counts.
 *
 * @param replayed The recording that was replayed in the session that this one is of.
 */
export function figuresOf(trace: ReportTrace, replayed?: ReportTrace): Figures {
  const faults = [...trace];
  const latencies = Float64Array.from(faults, ({ latency }) => latency).toSorted();
  const duration = faults.reduce((last, { time }) => Math.max(last, time), 0);
  const pages = pagesOf(faults, trace.pageSize);
  const faulted = pages.size * trace.pageSize;
  const figures: Figures = {
    imageSize: trace.imageSize,
    pageSize: trace.pageSize,
    identity: trace.identity,
    startedAt: trace.startedAt.toISOString(),
    end: trace.end,
    dropped: trace.dropped,
    faults: faults.length,
    writes: faults.filter(({ write }) => write).length,
    duration,
    workingSet: faulted,
    faulted,
    brought: faults.reduce((sum, { brought }) => sum + brought.length, 0),
    latency: {
      p50: percentile(latencies, 0.5),
      p90: percentile(latencies, 0.9),
      p99: percentile(latencies, 0.99),
      max: latencies.at(-1) ?? 0,
    },
    latencies: bins(latencies),
    heat: heatOf(faults, trace.imageSize, duration),
    growth: growthOf(faults, trace.pageSize, duration),
  };
  if (replayed === undefined) return figures;
  const known = pagesOf([...replayed], trace.pageSize);
  const isKnown = ({ offset }: ReportFault): boolean => known.has(Math.floor(offset / trace.pageSize));
  const misses = {
    late: timesOf(faults.filter(isKnown), duration),
    missed: timesOf(
      faults.filter(fault => !isKnown(fault)),
      duration,
    ),
  };
  const late = faults.filter(isKnown).length;
  return {
    ...figures,
    workingSet: faulted + [...known].filter(page => !pages.has(page)).length * trace.pageSize,
    replayed: known.size * trace.pageSize,
    late,
    missed: faults.length - late,
    misses,
  };
}

/** Numbers of the pages that faults brought, or wanted. */
function pagesOf(faults: readonly ReportFault[], pageSize: number): Set<number> {
  const pages = new Set<number>();
  for (const fault of faults) addPages(pages, fault, pageSize);
  return pages;
}

function addPages(pages: Set<number>, { offset, brought }: ReportFault, pageSize: number): void {
  pages.add(Math.floor(offset / pageSize));
  const end = brought.offset + brought.length;
  for (let at = brought.offset; at < end; at += pageSize) pages.add(Math.floor(at / pageSize));
}

/** In which of so many stretches of the whole time it was. */
function stretchOf(time: number, duration: number, count: number): number {
  return Math.min(count - 1, Math.floor((time / Math.max(duration, Number.MIN_VALUE)) * count));
}

function timesOf(faults: readonly ReportFault[], duration: number): number[] {
  const counts = Array.from({ length: MISS_COLUMNS }, () => 0);
  for (const { time } of faults) {
    const at = stretchOf(time, duration, MISS_COLUMNS);
    counts[at] = (counts[at] ?? 0) + 1;
  }
  return counts;
}

function growthOf(faults: readonly ReportFault[], pageSize: number, duration: number): number[] {
  const pages = new Set<number>();
  const reached = Array.from({ length: COLUMNS }, () => 0);
  for (const fault of faults.toSorted((a, b) => a.time - b.time)) {
    addPages(pages, fault, pageSize);
    reached[stretchOf(fault.time, duration, COLUMNS)] = pages.size * pageSize;
  }
  let before = 0;
  return reached.map(bytes => (before = Math.max(before, bytes)));
}

/** The smallest latency that so large a share of all stays at or below. */
function percentile(sorted: Float64Array, share: number): number {
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? 0;
}

function bins(latencies: Float64Array): LatencyBin[] {
  const counts = Array.from({ length: BINS }, () => 0);
  for (const latency of latencies) {
    const bin = latency < FIRST_BIN ? 0 : Math.floor(Math.log2(latency / FIRST_BIN)) + 1;
    counts[Math.min(bin, BINS - 1)] = (counts[Math.min(bin, BINS - 1)] ?? 0) + 1;
  }
  const all = counts.map((count, bin) => ({
    from: bin === 0 ? 0 : FIRST_BIN * 2 ** (bin - 1),
    to: bin === BINS - 1 ? Infinity : FIRST_BIN * 2 ** bin,
    count,
  }));
  const first = all.findIndex(({ count }) => count > 0);
  const last = all.findLastIndex(({ count }) => count > 0);
  return first === -1 ? [] : all.slice(first, last + 1);
}

function heatOf(faults: readonly ReportFault[], imageSize: number, duration: number): HeatMap {
  const cells = Array.from({ length: COLUMNS * ROWS }, () => 0);
  for (const { time, offset } of faults) {
    const column = stretchOf(time, duration, COLUMNS);
    const row = ROWS - 1 - Math.min(ROWS - 1, Math.floor((offset / imageSize) * ROWS));
    cells[row * COLUMNS + column] = (cells[row * COLUMNS + column] ?? 0) + 1;
  }
  return { columns: COLUMNS, rows: ROWS, duration, cells, most: Math.max(0, ...cells) };
}
