//! Counters of a session: written by its event loop, read by anybody, without a lock.
//!
//! Every fault message is counted once when it is read and once when it ends: `faults` is the sum of `faults_installed`,
//! `faults_zeroed`, `faults_poisoned`, `faults_unprotected`, `already_present`, `joined` and `unanswered`, plus the faults
//! that are still waited for while the session lives. The other counters are of pages and answers, and have no such sum: one answer brings many pages.

use std::ops::Deref;
use std::sync::atomic::Ordering;

use uffd::Words;

use crate::latency::{Counter, Latencies, LiveLatencies};

/// The live counters of a session.
#[derive(Debug)]
pub struct Stats {
    /// As many as there are counters, at least: this process's own, or of a record that outlives it.
    words: Words,
    pub(crate) latencies: LiveLatencies,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters, one word each, in the order in which a record has them: a new one comes last.
        #[derive(Debug, Default)]
        #[repr(C)]
        pub struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

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
    /// Faults answered by installing their page from the source.
    faults_installed,
    /// Faults answered by zeros, because the page's owner had discarded it.
    faults_zeroed,
    /// Faults answered by poison.
    faults_poisoned,
    /// Faults answered by taking the protection off their page.
    faults_unprotected,
    /// Faults on a page that another fault waits for already (it is being read, or was put off): they end with that one.
    joined,
    /// Faults that are not this session's to answer: outside its memory, in memory that was taken back from it, or after
    /// its end. When it ends, those it was still waiting for are added.
    unanswered,
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
    /// Of the pages installed, with bytes or as zeros of the source, those that were brought without a fault.
    pages_prefetched,
    /// Pages that were made parts of transparent huge pages.
    pages_joined,
    /// Blocks of 2 MiB that the kernel would not join to a huge page.
    blocks_not_joined,
    /// Stretches of pages installed by one answer.
    windows,
    /// Faults whose page another answer had already brought.
    already_present,
    /// Answers the kernel put off because the address space was changing.
    deferred,
    /// Reads that were handed to a worker because they could have blocked.
    worker_reads,
    /// Pages of the image that are to be brought because an earlier run wanted them.
    replay_pages,
    /// Of these, pages that were brought before any fault asked for them.
    replay_installed,
    /// Faults on pages that were to be brought, and came first.
    replay_late,
    /// Faults on pages of the image that no earlier run wanted.
    replay_missed,
    /// Pages that an earlier run wanted and that are held back, to see whether this one does.
    replay_held,
    /// Faults on pages that were held back.
    replay_held_faults,
    /// Pages that were held back and came with a neighbour that somebody wanted: they tell nothing.
    replay_held_hidden,
    /// 1 once everything that was to be brought has been.
    replay_done,
    /// Nanoseconds spent answering faults, reading of the source included.
    busy_ns,
}

/// Counters that there are.
pub(crate) const COUNTERS: usize = size_of::<Counters>() / size_of::<u64>();

impl Default for Stats {
    fn default() -> Self {
        Self { words: Words::zeroed(COUNTERS), latencies: LiveLatencies::default() }
    }
}

impl Deref for Stats {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        // SAFETY: the words are at least as many as the counters, each of which is one atomic word.
        unsafe { &*self.words.as_ptr().cast::<Counters>() }
    }
}

impl Stats {
    /// Counters that are kept in `words`, and go on from what they are there. `None` where there are too few.
    pub(crate) fn in_words(words: Words) -> Option<Self> {
        (words.len() >= COUNTERS).then(|| Self { words, latencies: LiveLatencies::default() })
    }

    /// Goes on from what others have counted.
    pub(crate) fn adopt(&self, other: &Self) {
        for (word, from) in self.words.iter().zip(other.words.iter()) {
            word.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The faults that were being answered when whoever counted them was killed: they come again, and are counted again.
    pub(crate) fn drop_unfinished(&self) {
        let ended = [
            &self.faults_installed,
            &self.faults_zeroed,
            &self.faults_poisoned,
            &self.faults_unprotected,
            &self.already_present,
            &self.joined,
            &self.unanswered,
        ];
        let ended = ended.iter().fold(0_u64, |sum, counter| sum.wrapping_add(counter.get()));
        self.unanswered.add(self.faults.get().saturating_sub(ended));
    }

    /// Reads every histogram.
    #[must_use]
    pub fn latencies(&self) -> Latencies {
        self.latencies.snapshot()
    }
}
