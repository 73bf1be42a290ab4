//! When to look again for a moment before sleeping, or before saying that there is nothing: where that hits.
//!
//! Waking a thread that sleeps on another CPU takes ten times as long as installing a page. A loop that looks again and
//! again for a moment, instead of sleeping at once, saves that where the next fault comes within the moment, and wastes the
//! CPU where it does not: on the CPU of the thread that faults it never can. So hits alone decide: how far faults lie
//! apart, and which CPUs may be used, have been tried as predictors and mispredict. Idle loops do not wait again, and so
//! never look.

use std::time::{Duration, Instant};

/// Misses in a row that end it.
const MOST_MISSES: u32 = 2;
/// Waits between two trials at first, and at most: each that misses doubles the distance.
const SHORTEST_DISTANCE: u32 = 32;
const LONGEST_DISTANCE: u32 = 4096;

/// What a thread that was woken takes to its next fault, where giving way to it is worth it.
const LONGEST_YIELD: Duration = Duration::from_micros(50);

/// What came of looking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// A fault came meanwhile: a sleep was saved.
    Hit,
    /// Something was there at once: nobody would have slept.
    AtOnce,
    /// Nothing came, or something that nobody waits for.
    Miss,
}

/// Whether it is looked before the next sleep.
#[derive(Debug)]
pub(crate) struct Spin {
    on: bool,
    misses: u32,
    /// Waits until the next trial.
    until_trial: u32,
    distance: u32,
}

impl Spin {
    pub(crate) const fn new() -> Self {
        Self { on: false, misses: 0, until_trial: SHORTEST_DISTANCE, distance: SHORTEST_DISTANCE }
    }

    /// Whether to look before sleeping this time. Then `looked` has to be told what came of it.
    pub(crate) fn is_due(&mut self) -> bool {
        self.until_trial = self.until_trial.saturating_sub(1);
        self.on || self.until_trial == 0
    }

    pub(crate) fn looked(&mut self, look: Look) {
        match look {
            // It says nothing: on the CPU of the thread that faults it is like this nearly always. A trial goes on.
            Look::AtOnce => {}
            Look::Hit => *self = Self { on: true, ..Self::new() },
            Look::Miss if self.on && self.misses + 1 < MOST_MISSES => self.misses += 1,
            Look::Miss => {
                let distance = if self.on { SHORTEST_DISTANCE } else { self.distance * 2 };
                self.distance = distance.min(LONGEST_DISTANCE);
                *self = Self { until_trial: self.distance, distance: self.distance, ..Self::new() };
            }
        }
    }
}

/// On the CPU of the thread that was woken, that thread runs only now; its next fault is then read without a turn of the
/// event loop. Where somebody else ran instead, and for long, that is no hit.
pub(crate) fn let_others_run(since: Instant) -> Look {
    std::thread::yield_now();
    if since.elapsed() < LONGEST_YIELD { Look::Hit } else { Look::Miss }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many waits are looked at, if it always comes to the same.
    fn looks(spin: &mut Spin, waits: u32, look: Look) -> u32 {
        let mut looks = 0;
        for _ in 0..waits {
            if spin.is_due() {
                looks += 1;
                spin.looked(look);
            }
        }
        looks
    }

    #[test]
    fn where_it_hits_every_wait_is_looked_at_after_the_first_trial() {
        assert_eq!(looks(&mut Spin::new(), 31 + 1000, Look::Hit), 1000);
    }

    #[test]
    fn where_it_never_hits_trials_become_rare() {
        let mut spin = Spin::new();

        assert_eq!(looks(&mut spin, 32 + 64 + 128, Look::Miss), 3);
        assert!(looks(&mut spin, 100_000, Look::Miss) <= 30);
    }

    #[test]
    fn two_misses_without_a_hit_between_them_end_it_and_one_does_not() {
        let mut spin = Spin::new();
        assert_eq!(looks(&mut spin, 32, Look::Hit), 1);

        assert_eq!(looks(&mut spin, 1, Look::Miss), 1);
        assert_eq!(looks(&mut spin, 1, Look::Hit), 1);
        assert_eq!(looks(&mut spin, 1, Look::Miss), 1);
        assert_eq!(looks(&mut spin, 10, Look::AtOnce), 10);
        assert_eq!(looks(&mut spin, 1, Look::Miss), 1);
        assert_eq!(looks(&mut spin, 31, Look::Miss), 0, "off");
        assert_eq!(looks(&mut spin, 1, Look::Hit), 1, "tried again soon");
    }

    #[test]
    fn what_is_there_at_once_decides_nothing() {
        let mut spin = Spin::new();

        assert_eq!(looks(&mut spin, 31 + 100, Look::AtOnce), 100);
        assert_eq!(looks(&mut spin, 1, Look::Miss), 1, "the trial had not ended");
        assert_eq!(looks(&mut spin, 63, Look::Miss), 0);
    }
}
