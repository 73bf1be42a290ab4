//! How long things take, in a session: histograms that its event loop writes and anybody reads, without a lock.
//!
//! Four buckets to a doubling, from 256 ns to 68 s: a percentile read from them is at most a quarter too high.

use std::fmt::{self, Debug};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Everything shorter is in the first bucket.
const SHORTEST: u32 = u64::BITS - 1 - 256_u64.leading_zeros();
/// Doublings that are told apart; everything longer is in the last bucket.
const DOUBLINGS: usize = 28;
/// How many buckets a histogram has.
pub const LATENCY_BUCKETS: usize = 2 + 4 * DOUBLINGS;

/// How often something took how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    /// How often, by bucket: bucket `i` holds what took less than `bound(i)` and not less than `bound(i - 1)`.
    pub counts: [u64; LATENCY_BUCKETS],
    /// Nanoseconds altogether.
    pub sum_ns: u64,
}

impl Histogram {
    /// Nanoseconds that everything in a bucket stays below; `None` for the last bucket, which has no bound.
    #[must_use]
    pub const fn bound(bucket: usize) -> Option<u64> {
        if bucket > LATENCY_BUCKETS - 2 {
            return None;
        }
        let quarter = 1_u64 << (SHORTEST as usize + bucket / 4 - 2);
        Some(quarter * (4 + bucket as u64 % 4))
    }

    /// How often it happened.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// How long the parts of answering took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latencies {
    /// From reading a fault to its turn: what it waited for others.
    pub queue: Histogram,
    /// Reads of the source for faults: from when the fault had its turn, or from when a worker or a source that
    /// answers later was asked.
    pub source: Histogram,
    /// Installing what faults get, its neighbours included, and waking.
    pub install: Histogram,
    /// Reads of the source that nobody waited for.
    pub prefetch_source: Histogram,
    /// Installing what nobody waited for.
    pub prefetch_install: Histogram,
}

/// The live histograms of a session.
#[derive(Debug, Default)]
pub(crate) struct LiveLatencies {
    pub(crate) queue: LiveHistogram,
    pub(crate) source: LiveHistogram,
    pub(crate) install: LiveHistogram,
    pub(crate) prefetch_source: LiveHistogram,
    pub(crate) prefetch_install: LiveHistogram,
}

impl LiveLatencies {
    pub(crate) fn snapshot(&self) -> Latencies {
        Latencies {
            queue: self.queue.snapshot(),
            source: self.source.snapshot(),
            install: self.install.snapshot(),
            prefetch_source: self.prefetch_source.snapshot(),
            prefetch_install: self.prefetch_install.snapshot(),
        }
    }
}

/// A histogram that one thread writes.
pub(crate) struct LiveHistogram {
    counts: [Counter; LATENCY_BUCKETS],
    sum_ns: Counter,
}

/// How many, and how long on average: its buckets would be pages of zeros.
impl Debug for LiveHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Histogram { counts, sum_ns } = self.snapshot();
        let count: u64 = counts.iter().sum();
        let mean = sum_ns.checked_div(count).unwrap_or(0);
        write!(f, "LiveHistogram({count} of {:?})", Duration::from_nanos(mean))
    }
}

impl Default for LiveHistogram {
    fn default() -> Self {
        Self { counts: [const { Counter::new() }; LATENCY_BUCKETS], sum_ns: Counter::new() }
    }
}

impl LiveHistogram {
    pub(crate) fn record(&self, took: Duration) {
        if cfg!(userfaultfd_without_statistics) {
            return;
        }
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get(bucket_of(ns)) {
            count.add(1);
        }
        self.sum_ns.add(ns);
    }

    fn snapshot(&self) -> Histogram {
        Histogram { counts: self.counts.each_ref().map(Counter::get), sum_ns: self.sum_ns.get() }
    }
}

fn bucket_of(ns: u64) -> usize {
    let exponent = u64::BITS - 1 - (ns | 1).leading_zeros();
    if exponent < SHORTEST {
        return 0;
    }
    let quarter = (ns >> (exponent - 2)) & 3;
    (1 + 4 * (exponent - SHORTEST) as usize + quarter as usize).min(LATENCY_BUCKETS - 1)
}

/// One counter, which one thread adds to and any thread reads.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// On the event loop's thread only: two threads that add at once would lose one of their sums.
    pub(crate) fn add(&self, count: u64) {
        if !cfg!(userfaultfd_without_statistics) {
            self.0.store(self.get().wrapping_add(count), Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Measures one thing after the other: each begins where the one before it ended. Reading the clock costs 1 % of a fault.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    last: Instant,
    /// Something has been measured since it was set.
    moved: bool,
}

impl Stopwatch {
    pub(crate) fn new() -> Self {
        Self { last: Instant::now(), moved: false }
    }

    /// What comes now began then.
    pub(crate) fn set(&mut self, began: Instant) {
        self.last = began;
        self.moved = false;
    }

    /// What comes now begins now.
    pub(crate) fn start(&mut self) {
        if !cfg!(userfaultfd_without_statistics) {
            self.set(Instant::now());
        }
    }

    /// When the last thing ended.
    pub(crate) fn last(&self) -> Instant {
        self.last
    }

    /// How long it took since then.
    pub(crate) fn lap(&mut self) -> Duration {
        let before = self.last;
        self.start();
        self.moved = true;
        self.last.saturating_duration_since(before)
    }

    /// Now, or the end of what was measured since it was set: nothing of any length has followed.
    pub(crate) fn end(&self) -> Instant {
        if self.moved && !cfg!(userfaultfd_without_statistics) { self.last } else { Instant::now() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_in_the_bucket_whose_bounds_hold_it() {
        let around =
            (0..64).map(|bit| 1_u64 << bit).flat_map(|ns| [ns - 1, ns, ns + 1, ns + ns / 4, ns + ns / 2]);
        for ns in around.chain([0, u64::MAX]) {
            let bucket = bucket_of(ns);
            assert!(
                Histogram::bound(bucket).is_none_or(|bound| ns < bound),
                "{ns} is not below bucket {bucket}"
            );
            let below = bucket.checked_sub(1).and_then(Histogram::bound);
            assert!(below.is_none_or(|bound| ns >= bound), "{ns} is below bucket {bucket}");
        }
    }

    #[test]
    fn bounds_rise_by_a_quarter_at_most() {
        let bounds: Vec<u64> = (0..LATENCY_BUCKETS).map_while(Histogram::bound).collect();

        assert_eq!(bounds.len(), LATENCY_BUCKETS - 1, "all but the last have one");
        assert_eq!(bounds[0], 256);
        for pair in bounds.windows(2) {
            assert!(pair[0] < pair[1] && pair[1] <= pair[0] + pair[0] / 4, "{pair:?}");
        }
    }

    #[test]
    fn what_is_recorded_is_counted_and_summed() {
        let live = LiveHistogram::default();
        for ns in [100, 300, 300, 5_000_000] {
            live.record(Duration::from_nanos(ns));
        }
        let histogram = live.snapshot();

        assert_eq!(histogram.count(), 4);
        assert_eq!(histogram.sum_ns, 5_000_700);
        assert_eq!(histogram.counts[bucket_of(300)], 2);
        assert_eq!(format!("{live:?}"), "LiveHistogram(4 of 1.250175ms)");
    }
}
