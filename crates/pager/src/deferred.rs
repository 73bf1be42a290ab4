//! Faults to be answered again.
//!
//! While an address space is changing the kernel refuses to install anything, and it never delivers the fault
//! again by itself. So the page is parked here, once however often it faulted, and tried again after a pause
//! that grows: first a few turns of yielding the CPU (the thread that changes the address space only has to run
//! again), then 50 us, doubling to 2 ms. A retry that got somewhere starts the pauses anew.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Turns that only yield.
const YIELDS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);

/// The parked faults of a session.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    pages: BTreeSet<usize>,
    attempts: u32,
    due: Option<Instant>,
}

impl Deferred {
    /// Parks the fault on `page`; `false` where one was parked already.
    pub(crate) fn park(&mut self, page: usize, now: Instant) -> bool {
        if self.due.is_none() {
            self.due = Some(now + self.pause());
        }
        self.pages.insert(page)
    }

    /// How many pages are parked.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// When to try again; `None` when nothing is parked.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes the parked pages if their time has come.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<BTreeSet<usize>> {
        if self.due? > now {
            return None;
        }
        self.due = None;
        self.attempts = self.attempts.saturating_add(1);
        Some(std::mem::take(&mut self.pages))
    }

    /// Something was installed: the address space is quiet again.
    pub(crate) fn progressed(&mut self) {
        self.attempts = 0;
    }

    fn pause(&self) -> Duration {
        let Some(doublings) = self.attempts.checked_sub(YIELDS) else { return Duration::ZERO };
        FIRST_PAUSE.saturating_mul(1 << doublings.min(16)).min(LONGEST_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_parked_twice_is_tried_once() {
        let now = Instant::now();
        let mut deferred = Deferred::default();

        assert!(deferred.park(7, now));
        assert!(!deferred.park(7, now));

        assert_eq!(deferred.take_due(now).unwrap().into_iter().collect::<Vec<_>>(), [7]);
        assert_eq!(deferred.due(), None);
    }

    #[test]
    fn pauses_grow_to_their_limit_and_start_anew_after_progress() {
        let now = Instant::now();
        let mut deferred = Deferred::default();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            deferred.park(1, now);
            let due = deferred.due().unwrap();
            pauses.push(due - now);
            deferred.take_due(due).unwrap();
        }

        assert_eq!(pauses[..4], [Duration::ZERO, Duration::ZERO, Duration::ZERO, FIRST_PAUSE]);
        assert_eq!(pauses[4], FIRST_PAUSE * 2);
        assert_eq!(pauses[11], LONGEST_PAUSE);

        deferred.progressed();
        deferred.park(1, now);
        assert_eq!(deferred.due(), Some(now));
    }

    #[test]
    fn nothing_is_taken_before_its_time() {
        let now = Instant::now();
        let mut deferred = Deferred { attempts: YIELDS, ..Deferred::default() };

        deferred.park(3, now);

        assert!(deferred.take_due(now).is_none());
        assert!(deferred.take_due(now + FIRST_PAUSE).is_some());
    }
}
