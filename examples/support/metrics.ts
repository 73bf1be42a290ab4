/** What all sessions of this program have done, for Prometheus. Nobody has to hand them over: they are heard of. */

import { subscribe } from 'node:diagnostics_channel';

import { Counter, type Histogram, type Registry } from 'prom-client';
import type { LatencyHistogram, Session, SessionStats } from 'userfaultfd';

/** By how a fault ended, and what became of a page. */
const COUNTERS = {
  faults: {
    help: 'Page faults, by how they ended',
    outcomes: {
      installed: 'faultsInstalled',
      zeroed: 'faultsZeroed',
      poisoned: 'faultsPoisoned',
      unprotected: 'faultsUnprotected',
      already_present: 'alreadyPresent',
      joined: 'joined',
      unanswered: 'unanswered',
    },
  },
  pages: {
    help: 'Pages, by what became of them',
    outcomes: {
      installed: 'pagesInstalled',
      zero: 'pagesZero',
      zeroed: 'pagesZeroed',
      poisoned: 'pagesPoisoned',
      removed: 'pagesRemoved',
    },
  },
} as const;

const LATENCIES = {
  queue: 'Seconds a fault waited for its turn',
  source: 'Seconds the source took for a fault',
  install: 'Seconds installing took for a fault',
} as const;

type Name = keyof typeof COUNTERS;
type Part = keyof typeof LATENCIES;

/** Registers the metrics. Sessions that have begun before are not in them. */
export function registerUserfaultfd(registry: Registry): void {
  const alive = new Set<Session>();
  // Counters must not fall when a session ends: what it came to stays in them.
  const over = new Totals();
  subscribe('userfaultfd:session:start', message => {
    alive.add((message as { session: Session }).session);
  });
  subscribe('userfaultfd:session:end', message => {
    const { session, stats } = message as { session: Session; stats: SessionStats };
    alive.delete(session);
    over.add(stats);
  });
  const totals = (): Totals => {
    const sum = over.copy();
    for (const session of alive) sum.add(session.stats());
    return sum;
  };
  for (const name of Object.keys(COUNTERS) as Name[]) registry.registerMetric(counterOf(name, totals));
  for (const part of Object.keys(LATENCIES) as Part[]) registry.registerMetric(histogramOf(part, totals));
}

/** Sums over sessions. */
class Totals {
  readonly counts = new Map<string, number>();
  readonly latencies = new Map<Part, { sum: number; buckets: { le: number; count: number }[] }>();

  add(stats: SessionStats): void {
    for (const { outcomes } of Object.values(COUNTERS)) {
      for (const key of Object.values(outcomes))
        this.counts.set(key, (this.counts.get(key) ?? 0) + stats[key]);
    }
    for (const part of Object.keys(LATENCIES) as Part[]) this.#addLatencies(part, stats.latencies[part]);
  }

  copy(): Totals {
    const copy = new Totals();
    for (const [key, count] of this.counts) copy.counts.set(key, count);
    for (const [part, latencies] of this.latencies) copy.latencies.set(part, structuredClone(latencies));
    return copy;
  }

  /** A bound for each doubling is every fourth of those there are: cumulative, as Prometheus has them. */
  #addLatencies(part: Part, histogram: LatencyHistogram): void {
    const known = this.latencies.get(part) ?? { sum: 0, buckets: [] };
    this.latencies.set(part, known);
    known.sum += histogram.sum / 1000;
    let below = 0;
    for (const [index, bucket] of histogram.buckets().entries()) {
      below += bucket.count;
      if (index % 4 === 0 || bucket.below === Infinity) {
        const place = Math.ceil(index / 4);
        known.buckets[place] ??= { le: Number((bucket.below / 1000).toPrecision(12)), count: 0 };
        known.buckets[place].count += below;
      }
    }
  }
}

function counterOf(name: Name, totals: () => Totals): Counter {
  const { help, outcomes } = COUNTERS[name];
  return new Counter({
    name: `userfaultfd_${name}_total`,
    help,
    labelNames: ['outcome'],
    registers: [],
    collect() {
      const { counts } = totals();
      this.reset();
      for (const [outcome, key] of Object.entries(outcomes)) this.inc({ outcome }, counts.get(key) ?? 0);
    },
  });
}

/** Not prom-client's own class: that one wants to see every value, and here they are counted already. */
function histogramOf(part: Part, totals: () => Totals): Histogram {
  const name = `userfaultfd_${part}_seconds`;
  const get = async (): Promise<unknown> => {
    const { sum, buckets } = totals().latencies.get(part) ?? { sum: 0, buckets: [] };
    const values = buckets.map(({ le, count }) => ({
      metricName: `${name}_bucket`,
      labels: { le: le === Infinity ? '+Inf' : le },
      value: count,
    }));
    const count = buckets.at(-1)?.count ?? 0;
    return {
      name,
      help: LATENCIES[part],
      type: 'histogram',
      values: [
        ...values,
        { metricName: `${name}_sum`, labels: {}, value: sum },
        { metricName: `${name}_count`, labels: {}, value: count },
      ],
    };
  };
  // All that a registry asks of a metric.
  return { name, get } as unknown as Histogram;
}
