//! Counters of a session: written by its event loop, read by anybody, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live counters of a session.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub(crate) $name: Counter,)* }

        /// The counters at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct StatsSnapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Stats {
            /// Reads every counter. Each is exact; together they may be a few events apart.
            #[must_use]
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Page-fault messages read. One fault may send several: duplicates are normal.
    faults,
    /// Pages copied in from the source.
    pages_installed,
    /// Pages installed as zeros because their owner had discarded them.
    pages_zeroed,
    /// Pages installed as zeros because the source has zeros there: nothing was copied.
    pages_zero,
    /// Pages poisoned because they could not or would not be served.
    pages_poisoned,
    /// Pages their owner discarded (each time it did).
    pages_removed,
    /// Bytes read from the source and installed.
    bytes_installed,
    /// Stretches of pages installed by one answer.
    windows,
    /// Faults whose page another answer had already brought.
    already_present,
    /// Answers the kernel put off because the address space was changing.
    deferred,
    /// Reads that were handed to a worker because they could have blocked.
    worker_reads,
    /// Nanoseconds spent answering faults, reading of the source included.
    busy_ns,
}

/// One counter. Only the event loop adds to it, so a plain add would do; the atomic is for the readers.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
