import { native } from './native.js';
import { validateNumber } from './validate.js';

/** How often something took how long, up to a bound. */
export interface LatencyBucket {
  /** Milliseconds that all of them stayed below; `Infinity` for the last bucket. */
  readonly below: number;
  /** How often it took less than that, and no less than the bound of the bucket before. */
  readonly count: number;
}

/** How long the parts of answering faults took, since the session started. */
export interface SessionLatencies {
  /** From reading a fault to its turn: what it waited for others. */
  readonly queue: LatencyHistogram;
  /** Reads of the source for faults. */
  readonly source: LatencyHistogram;
  /** Installing what faults get (`UFFDIO_COPY` and its like), the pages around them included, and waking. */
  readonly install: LatencyHistogram;
  /** Reads of the source that no fault waited for. */
  readonly prefetchSource: LatencyHistogram;
  /** Installing what no fault waited for. */
  readonly prefetchInstall: LatencyHistogram;
}

/**
 * How often something took how long, up to one moment. Four buckets to a doubling, from 256 ns to 68 s: what is read from
 * them is at most a quarter too high.
 */
export class LatencyHistogram {
  /** Of each bucket how often, then nanoseconds altogether. */
  readonly #words: Float64Array;

  /** @hidden */
  constructor(words: Float64Array) {
    this.#words = words;
  }

  /** How often. */
  get count(): number {
    return this.#counts().reduce((sum, count) => sum + count, 0);
  }

  /** Milliseconds altogether, exactly. */
  get sum(): number {
    return (this.#words.at(-1) ?? 0) / 1e6;
  }

  /** Milliseconds on average; `NaN` where it never happened. */
  get mean(): number {
    return this.sum / this.count;
  }

  /**
   * The time in milliseconds below which `percent` of them stayed: the bound of a bucket, `Infinity` where that is the last
   * one; `NaN` where it never happened.
   *
   * @param percent 0 to 100.
   */
  percentile(percent: number): number {
    validateNumber('percent', percent, 0, 100);
    const wanted = Math.max(1, Math.ceil((this.count * percent) / 100));
    let sum = 0;
    for (const { below, count } of this.buckets()) {
      sum += count;
      if (sum >= wanted) return below;
    }
    return Number.NaN;
  }

  /** All buckets, the shortest times first: always the same bounds, of which every fourth is twice the one before. */
  buckets(): LatencyBucket[] {
    const counts = this.#counts();
    return bounds().map((below, index) => ({ below, count: counts[index] ?? 0 }));
  }

  /** What `JSON.stringify` shows; milliseconds. */
  toJSON(): {
    /** {@link LatencyHistogram.count}. */
    count: number;
    /** {@link LatencyHistogram.mean}. */
    mean: number;
    /** The median. */
    p50: number;
    /** What one in a hundred takes longer than. */
    p99: number;
  } {
    return { count: this.count, mean: this.mean, p50: this.percentile(50), p99: this.percentile(99) };
  }

  #counts(): Float64Array {
    return this.#words.subarray(0, -1);
  }
}

/** @hidden */
export function latenciesOf(words: Float64Array): SessionLatencies {
  const length = words.length / NAMES.length;
  const histograms = NAMES.map((name, index) => [
    name,
    new LatencyHistogram(words.subarray(index * length, (index + 1) * length)),
  ]);
  return Object.freeze(Object.fromEntries(histograms)) as SessionLatencies;
}

/** In the order in which the addon tells them. */
const NAMES = [
  'queue',
  'source',
  'install',
  'prefetchSource',
  'prefetchInstall',
] as const satisfies readonly (keyof SessionLatencies)[];

let known: readonly number[] | undefined;

/** Milliseconds. */
function bounds(): readonly number[] {
  known ??= native()
    .latencyBounds()
    .map(nanoseconds => nanoseconds / 1e6);
  return known;
}
