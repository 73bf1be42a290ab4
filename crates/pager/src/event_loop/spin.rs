//! Looking again before sleeping.
//!
//! Waking a thread that sleeps on another CPU takes ten times as long as installing a page. A loop that looks again and
//! again for a moment, instead of sleeping at once, saves that where the next fault comes within the moment, and wastes the
//! CPU where it does not: on the CPU of the thread that faults it never can. So hits alone decide: how far faults lie
//! apart, and which CPUs may be used, have been tried as predictors and mispredict. Idle loops do not wait again, and so
//! never look.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::EventLoop;
use super::token::Token;

/// For how long it is looked.
const BUDGET: Duration = Duration::from_micros(100);
/// Misses in a row that end it.
const MOST_MISSES: u32 = 2;
/// Waits between two trials at first, and at most: each that misses doubles the distance.
const SHORTEST_DISTANCE: u32 = 32;
const LONGEST_DISTANCE: u32 = 4096;

/// What came of looking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// A fault came meanwhile: a sleep was saved.
    Hit,
    /// Something was there at once: nobody would have slept.
    AtOnce,
    /// Nothing came, or something that nobody waits for.
    Miss,
}

/// Whether it is looked before the next sleep.
#[derive(Debug)]
pub(super) struct Spin {
    on: bool,
    misses: u32,
    /// Waits until the next trial.
    until_trial: u32,
    distance: u32,
}

impl Spin {
    pub(super) const fn new() -> Self {
        Self { on: false, misses: 0, until_trial: SHORTEST_DISTANCE, distance: SHORTEST_DISTANCE }
    }

    /// Whether to look before sleeping this time. Then `looked` has to be told what came of it.
    fn is_due(&mut self) -> bool {
        self.until_trial = self.until_trial.saturating_sub(1);
        self.on || self.until_trial == 0
    }

    fn looked(&mut self, look: Look) {
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

impl EventLoop {
    /// What is ready, at the latest after `timeout`.
    pub(super) fn wait(&mut self, ready: &mut [EpollEvent], timeout: EpollTimeout) -> Result<usize, Errno> {
        if timeout != EpollTimeout::ZERO && !self.sessions.is_empty() && self.spin.is_due() {
            let count = self.look(ready)?;
            if count > 0 {
                return Ok(count);
            }
        }
        self.epoll.wait(ready, timeout)
    }

    /// What becomes ready while it is looked for a moment.
    fn look(&mut self, ready: &mut [EpollEvent]) -> Result<usize, Errno> {
        let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
        if count > 0 {
            self.spin.looked(Look::AtOnce);
            return Ok(count);
        }
        let until = Instant::now() + BUDGET;
        let count = loop {
            std::hint::spin_loop();
            let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
            if count > 0 || Instant::now() >= until {
                break count;
            }
        };
        let is_fault = |event: &EpollEvent| matches!(Token::decode(event.data()), Token::Uffd(_));
        let hit = ready.iter().take(count).any(is_fault);
        self.spin.looked(if hit { Look::Hit } else { Look::Miss });
        Ok(count)
    }
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
