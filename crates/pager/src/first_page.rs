//! Whether the page that somebody waits for is read before the rest of its window.
//!
//! That costs a second request, so it is done where it was seen to hit: where windows take long, and a page alone no more than
//! half of it. A source that is slow because of its distance answers both alike; one that is slow because of its bytes does not.

use std::time::Duration;

/// Windows that take less are not worth a second request, which wakes two threads.
const SLOW: Duration = Duration::from_millis(1);
/// Reads between two trials, or between two windows as a whole while it hits; each trial that misses doubles the distance.
const SHORTEST_DISTANCE: u32 = 32;
const LONGEST_DISTANCE: u32 = 4096;
/// Misses in a row that end it.
const MOST_MISSES: u32 = 2;

#[derive(Debug)]
pub(crate) struct FirstPage {
    /// What windows took of late.
    whole: Duration,
    on: bool,
    misses: u32,
    /// Reads until it is done otherwise, for once.
    until: u32,
    distance: u32,
}

impl FirstPage {
    pub(crate) const fn new() -> Self {
        Self { whole: Duration::ZERO, on: false, misses: 0, until: 1, distance: SHORTEST_DISTANCE }
    }

    /// Whether to read the page first this time. Then `page_took` has to be told, else `window_took`.
    pub(crate) fn is_due(&mut self) -> bool {
        if self.whole < SLOW {
            return false;
        }
        self.until = self.until.saturating_sub(1);
        if self.until > 0 {
            return self.on;
        }
        self.until = self.distance;
        !self.on
    }

    pub(crate) fn window_took(&mut self, took: Duration) {
        self.whole = if self.whole.is_zero() { took } else { (self.whole * 3 + took) / 4 };
    }

    pub(crate) fn page_took(&mut self, took: Duration) {
        if took * 2 <= self.whole {
            let until = if self.on { self.until } else { SHORTEST_DISTANCE };
            *self = Self { whole: self.whole, on: true, until, ..Self::new() };
        } else if self.on && self.misses + 1 < MOST_MISSES {
            self.misses += 1;
        } else {
            let distance = if self.on { SHORTEST_DISTANCE } else { self.distance * 2 };
            let distance = distance.min(LONGEST_DISTANCE);
            *self = Self { whole: self.whole, until: distance, distance, ..Self::new() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// How many of so many reads are of the page first, if windows and pages take so long.
    fn firsts(first: &mut FirstPage, reads: u32, window: Duration, page: Duration) -> u32 {
        let mut firsts = 0;
        for _ in 0..reads {
            if first.is_due() {
                firsts += 1;
                first.page_took(page);
            } else {
                first.window_took(window);
            }
        }
        firsts
    }

    #[test]
    fn where_windows_are_quick_no_page_goes_first() {
        assert_eq!(firsts(&mut FirstPage::new(), 10_000, MS / 2, Duration::ZERO), 0);
    }

    #[test]
    fn where_a_page_takes_a_part_of_a_window_it_goes_first_but_for_one_in_thirty_two() {
        // A window, a trial, and then one window in each 32.
        assert_eq!(firsts(&mut FirstPage::new(), 2 + 3200, MS * 8, MS), 1 + 3100);
    }

    #[test]
    fn where_a_page_takes_as_long_as_a_window_trials_become_rare() {
        let mut first = FirstPage::new();

        assert_eq!(firsts(&mut first, 2, MS * 8, MS * 8), 1);
        assert!(firsts(&mut first, 100_000, MS * 8, MS * 8) <= 30);
    }

    #[test]
    fn a_source_that_becomes_quick_gets_windows_again_and_one_miss_ends_nothing() {
        let mut first = FirstPage::new();
        assert_eq!(firsts(&mut first, 11, MS * 8, MS), 10);

        first.page_took(MS * 8);
        assert_eq!(firsts(&mut first, 10, MS * 8, MS), 10);
        firsts(&mut first, 1000, MS / 10, MS / 10);
        assert_eq!(firsts(&mut first, 1000, MS / 10, MS / 10), 0);
    }
}
