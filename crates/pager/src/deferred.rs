//! Faults to be answered again.
//!
//! While an address space is changing the kernel refuses to install anything, and it never delivers the fault
//! again by itself. So the fault is parked here, once however often it came, and tried again after a pause
//! that grows: first a few turns of yielding the CPU (the thread that changes the address space only has to run
//! again), then 50 us, doubling to 2 ms. A retry that got somewhere starts the pauses anew.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use uffd::FaultKind;

/// Turns that only yield.
const YIELDS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);

/// What kind of access waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// The page is not there.
    Missing,
    /// It is there, but must not be written.
    WriteProtect,
    /// It is in the page cache, but not mapped.
    Minor,
}

impl From<FaultKind> for Kind {
    fn from(kind: FaultKind) -> Self {
        match kind {
            FaultKind::Missing => Self::Missing,
            FaultKind::WriteProtect => Self::WriteProtect,
            FaultKind::Minor => Self::Minor,
        }
    }
}

/// A fault to be answered. By address, because the page that is meant may move before it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Start of the page.
    pub(crate) address: u64,
    pub(crate) kind: Kind,
    /// Whether somebody wants to write.
    pub(crate) write: bool,
    /// When it was read; absent after its first turn.
    pub(crate) read: Option<Instant>,
}

impl Wanted {
    /// A page somebody waits for, whatever for.
    pub(crate) const fn missing(address: u64) -> Self {
        Self { address, kind: Kind::Missing, write: false, read: None }
    }
}

/// The parked faults of a session.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    /// By address and kind, which are answered apart; whether any of them writes.
    faults: BTreeMap<(u64, Kind), bool>,
    attempts: u32,
    due: Option<Instant>,
}

impl Deferred {
    /// Parks a fault; `false` where it was parked already. That one becomes a write if this is one.
    pub(crate) fn park(&mut self, wanted: Wanted, now: Instant) -> bool {
        let before = self.faults.len();
        *self.faults.entry((wanted.address, wanted.kind)).or_insert(false) |= wanted.write;
        if self.due.is_none() {
            self.due = Some(now + self.pause());
        }
        self.faults.len() > before
    }

    /// How many faults are parked.
    pub(crate) fn len(&self) -> usize {
        self.faults.len()
    }

    /// When to try again; `None` when nothing is parked.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes the parked faults if their time has come.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<impl Iterator<Item = Wanted> + use<>> {
        if self.due? > now {
            return None;
        }
        self.due = None;
        self.attempts = self.attempts.saturating_add(1);
        Some(self.take_all())
    }

    /// Takes all of them, whatever the time.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = Wanted> + use<> {
        self.due = None;
        let faults = std::mem::take(&mut self.faults);
        faults.into_iter().map(|((address, kind), write)| Wanted { address, kind, write, read: None })
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
    fn a_fault_parked_twice_is_tried_once() {
        let now = Instant::now();
        let mut deferred = Deferred::default();

        assert!(deferred.park(Wanted::missing(0x7000), now));
        assert!(!deferred.park(Wanted::missing(0x7000), now));

        assert_eq!(deferred.take_due(now).unwrap().collect::<Vec<_>>(), [Wanted::missing(0x7000)]);
        assert_eq!(deferred.due(), None);
    }

    #[test]
    fn a_parked_read_becomes_a_write_and_never_a_read_again() {
        let now = Instant::now();
        let mut deferred = Deferred::default();
        let write = Wanted { write: true, ..Wanted::missing(0x7000) };

        for wanted in [Wanted::missing(0x7000), write, Wanted::missing(0x7000)] {
            deferred.park(wanted, now);
        }

        assert_eq!(deferred.take_due(now).unwrap().collect::<Vec<_>>(), [write]);
    }

    #[test]
    fn a_protected_and_a_missing_page_at_one_address_are_two_faults() {
        let now = Instant::now();
        let mut deferred = Deferred::default();
        let protected = Wanted { kind: Kind::WriteProtect, write: true, ..Wanted::missing(0x7000) };

        deferred.park(protected, now);
        deferred.park(Wanted::missing(0x7000), now);

        let taken: Vec<_> = deferred.take_due(now).unwrap().collect();
        assert_eq!(taken, [Wanted::missing(0x7000), protected]);
    }

    #[test]
    fn pauses_grow_to_their_limit_and_start_anew_after_progress() {
        let now = Instant::now();
        let mut deferred = Deferred::default();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            deferred.park(Wanted::missing(0x1000), now);
            let due = deferred.due().unwrap();
            pauses.push(due - now);
            drop(deferred.take_due(due).unwrap());
        }

        assert_eq!(pauses[..4], [Duration::ZERO, Duration::ZERO, Duration::ZERO, FIRST_PAUSE]);
        assert_eq!(pauses[4], FIRST_PAUSE * 2);
        assert_eq!(pauses[11], LONGEST_PAUSE);

        deferred.progressed();
        deferred.park(Wanted::missing(0x1000), now);
        assert_eq!(deferred.due(), Some(now));
    }

    #[test]
    fn nothing_is_taken_before_its_time() {
        let now = Instant::now();
        let mut deferred = Deferred { attempts: YIELDS, ..Deferred::default() };

        deferred.park(Wanted::missing(0x3000), now);

        assert!(deferred.take_due(now).is_none());
        assert!(deferred.take_due(now + FIRST_PAUSE).is_some());
    }
}
