//! A piece that nobody waits for is brought by two threads, where that is faster.
//!
//! The other thread reads and makes the ioctls of its part, and nothing else: what it has installed is recorded by the session, which
//! waits for it. No event is read meanwhile. A removal that begins meanwhile is therefore known to nobody yet, and takes the pages with
//! it when it goes on, as those of the loop's own ioctl; one that was read before is known to the states, by which all of the piece was chosen.
//!
//! Whether it is faster shows only by trying, as with looking before sleeping: a second CPU may be there and be busy. A trial takes several
//! pieces, because the thread has to be woken first.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::sched_getaffinity;
use nix::unistd::Pid;
use uffd::{CopyOptions, UffdError, Userfaultfd};

use crate::hand::{Hand, Outcome};
use crate::resolve::{Filling, Stop};
use crate::session::{Context, Session};
use crate::source::{self, PageSource};
use crate::zero_runs::{Run, runs};

/// Bytes that a thread brings in the time of a piece.
pub(crate) const HALF: u64 = 256 << 10;
/// Bytes it brings before it looks what is left.
const UNIT: u64 = 64 << 10;
/// Pieces in a row that were not worth it, after which it is left.
const MOST_MISSES: u32 = 8;
/// Pieces between two trials at first, and at most: each trial that failed doubles the distance.
const SHORTEST_DISTANCE: u32 = 32;
const LONGEST_DISTANCE: u32 = 4096;
/// It is worth it where a page takes at most this share of what it takes one thread.
const WORTH: f64 = 0.8;

/// The other thread, and whether it is worth it.
pub(crate) struct InTwo {
    hand: Hand<Vec<Brought>>,
    pace: Pace,
    /// Nanoseconds a page takes one thread; 0: not known yet.
    alone: f64,
}

impl InTwo {
    pub(crate) fn new() -> Self {
        Self { hand: Hand::new(UNIT as usize), pace: Pace::new(), alone: 0.0 }
    }

    /// Whether the next piece is to be brought in two halves.
    pub(crate) fn is_due(&mut self) -> bool {
        self.alone > 0.0 && self.pace.is_due() && several_cpus()
    }

    /// One thread took so long for so many pages.
    fn alone_took(&mut self, pages: usize, took: Duration) {
        let each = took.as_nanos() as f64 / pages.max(1) as f64;
        self.alone = if self.alone > 0.0 { (3.0 * self.alone + each) / 4.0 } else { each };
    }

    /// Both together took so long, if the other one has `helped` at all.
    fn both_took(&mut self, pages: usize, took: Duration, helped: bool) {
        let each = took.as_nanos() as f64 / pages.max(1) as f64;
        let worth = helped && each <= WORTH * self.alone;
        self.pace.came_to(worth);
    }
}

/// When to try.
#[derive(Debug)]
struct Pace {
    /// Pieces until the next trial; 0: one is going on, or it is worth it.
    until_trial: u32,
    distance: u32,
    misses: u32,
}

impl Pace {
    const fn new() -> Self {
        Self { until_trial: 4, distance: SHORTEST_DISTANCE, misses: 0 }
    }

    /// Whether to try with the next piece. Then it has to be told what that came to.
    fn is_due(&mut self) -> bool {
        self.until_trial = self.until_trial.saturating_sub(1);
        self.until_trial == 0
    }

    fn came_to(&mut self, worth: bool) {
        if worth {
            *self = Self { until_trial: 0, distance: SHORTEST_DISTANCE, misses: 0 };
        } else if self.misses + 1 < MOST_MISSES {
            self.misses += 1;
        } else {
            let distance = (self.distance * 2).min(LONGEST_DISTANCE);
            *self = Self { until_trial: self.distance, distance, misses: 0 };
        }
    }
}

/// Whether this thread may run on more than one CPU.
fn several_cpus() -> bool {
    sched_getaffinity(Pid::from_raw(0)).is_ok_and(|cpus| {
        let allowed = |&cpu: &usize| cpus.is_set(cpu).unwrap_or(false);
        (0..nix::sched::CpuSet::count()).filter(allowed).nth(1).is_some()
    })
}

/// What is to be brought, unit by unit: the loop takes the first, the other thread the last, until nothing is left. So neither waits for
/// the other for longer than a unit takes.
struct Units {
    pages: Range<usize>,
    each: usize,
    /// How many were taken from the front, and from the back.
    taken: Mutex<(usize, usize)>,
}

impl Units {
    fn new(pages: Range<usize>, each: usize) -> Self {
        Self { pages, each, taken: Mutex::new((0, 0)) }
    }

    /// The number of a unit, which `take` counts.
    fn take(&self, take: impl FnOnce(&mut (usize, usize), usize) -> usize) -> Option<Range<usize>> {
        let units = self.pages.len().div_ceil(self.each);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.0 + taken.1 >= units {
            return None;
        }
        let start = self.pages.start + take(&mut taken, units) * self.each;
        Some(start..(start + self.each).min(self.pages.end))
    }

    fn first(&self) -> Option<Range<usize>> {
        self.take(|(front, _), _| {
            *front += 1;
            *front - 1
        })
    }

    fn last(&self) -> Option<Range<usize>> {
        self.take(|(_, back), units| {
            *back += 1;
            units - *back
        })
    }
}

/// What has come of a unit.
struct Brought {
    unit: Range<usize>,
    /// Pages that are there now, counted from its first, one run behind the other.
    runs: Vec<Run>,
}

impl Brought {
    fn is_whole(&self) -> bool {
        self.runs.last().is_some_and(|run| run.pages.end == self.unit.len())
    }
}

/// What the other thread is told.
struct Other {
    uffd: Arc<Userfaultfd>,
    source: Arc<dyn PageSource>,
    /// Where page `first` lies, and in the source.
    first: usize,
    address: u64,
    offset: u64,
    page_size: usize,
    /// Zeros are copied like other bytes.
    whole: bool,
    units: Arc<Units>,
}

impl Other {
    /// Brings what is at hand, as far as nothing is in the way. What is in the way is for the session to find out.
    fn bring(&self, buffer: &mut [u8]) -> Vec<Brought> {
        let mut done = Vec::new();
        while let Some(unit) = self.units.last() {
            let runs = self.bring_unit(&unit, buffer);
            done.push(Brought { unit, runs });
            if !done.last().is_some_and(Brought::is_whole) {
                break;
            }
        }
        done
    }

    fn bring_unit(&self, unit: &Range<usize>, buffer: &mut [u8]) -> Vec<Run> {
        let mut done = Vec::new();
        let skip = ((unit.start - self.first) * self.page_size) as u64;
        let Some(buffer) = buffer.get_mut(..unit.len() * self.page_size) else { return done };
        let Ok(Some(bytes)) = source::at_hand(&*self.source, self.offset + skip, buffer) else { return done };
        if self.whole {
            self.install(Run { pages: 0..unit.len(), zero: false }, skip, bytes, &mut done);
            return done;
        }
        for run in runs(bytes, self.page_size, false) {
            if !self.install(run, skip, bytes, &mut done) {
                break;
            }
        }
        done
    }

    /// Whether all of the run is there now.
    fn install(&self, run: Run, skip: u64, bytes: &[u8], done: &mut Vec<Run>) -> bool {
        let place = run.pages.start * self.page_size..run.pages.end * self.page_size;
        let address = self.address + skip + place.start as u64;
        let Some(bytes) = bytes.get(place) else { return false };
        let outcome = if run.zero {
            self.uffd.zero(address, bytes.len() as u64, true)
        } else {
            // SAFETY: `bytes` is ordinary memory of this process, borrowed for the call. The destination is another
            // process's (or mapping's) missing memory, of which no reference exists.
            unsafe { self.uffd.copy(address, bytes.as_ptr(), bytes.len(), CopyOptions::default()) }
        };
        match outcome {
            Ok(()) => {
                done.push(run);
                true
            }
            Err(UffdError::PartiallyCopied { done: bytes }) => {
                let end = run.pages.start + bytes as usize / self.page_size;
                if end > run.pages.start {
                    done.push(Run { pages: run.pages.start..end, zero: run.zero });
                }
                false
            }
            Err(_) => false,
        }
    }
}

impl Session {
    /// Whether a second thread may install pages: where that takes an ioctl and nothing else.
    fn may_bring_in_two(&self) -> bool {
        !self.huge && !self.brings_to_file() && self.tracking.is_none() && !self.filling.is_huge()
    }

    /// Brings a run of missing pages that nobody waits for, or has it read; `false` where as many reads are under way as
    /// may be.
    pub(crate) fn bring(&mut self, run: Range<usize>, cx: &mut Context<'_>) -> Result<bool, Stop> {
        self.watch.start();
        let pages = run.len();
        if self.map.bytes(pages) > HALF && self.may_bring_in_two() {
            return self.bring_in_two(run, cx);
        }
        let began = Instant::now();
        if self.fill_at_hand(run.clone(), &[], cx.staging)? {
            if self.map.bytes(pages) == HALF {
                cx.in_two.alone_took(pages, began.elapsed());
            }
            return Ok(true);
        }
        self.read_ahead(run, cx.workers)
    }

    fn bring_in_two(&mut self, run: Range<usize>, cx: &mut Context<'_>) -> Result<bool, Stop> {
        let began = Instant::now();
        let Some(other) = self.other(&run) else { return self.bring_alone(run, cx) };
        let units = Arc::clone(&other.units);
        let (mut end, staging) = (run.start, &mut *cx.staging);
        let (own, outcome) = cx.in_two.hand.beside(Box::new(move |buffer| other.bring(buffer)), || {
            while let Some(unit) = units.first() {
                if !self.fill_at_hand(unit.clone(), &[], staging)? {
                    break;
                }
                end = unit.end;
            }
            Ok(())
        });
        let mut rest = end..run.end;
        if let Outcome::Done(done) = outcome {
            // From the last to the first: one behind the other for whoever looks at what was answered.
            for brought in done.iter().rev() {
                let from = brought.unit.start;
                let all = brought.runs.last().map_or(from, |run| from + run.pages.end);
                self.fill(from..all, Filling::Installed(&brought.runs), &[])?;
            }
            let whole = |brought: &&Brought| brought.is_whole();
            rest.end = done.iter().rev().find(whole).map_or(run.end, |brought| brought.unit.start);
            own?;
        } else {
            own?;
        }
        let helped = rest.end < run.end;
        while let Some(missing) = self.next_to_bring(rest.clone(), rest.len()) {
            if !self.bring_alone(missing.clone(), cx)? {
                return Ok(false);
            }
            rest.start = missing.end;
        }
        cx.in_two.both_took(run.len(), began.elapsed(), helped);
        Ok(true)
    }

    fn bring_alone(&mut self, run: Range<usize>, cx: &mut Context<'_>) -> Result<bool, Stop> {
        Ok(self.fill_at_hand(run.clone(), &[], cx.staging)? || self.read_ahead(run, cx.workers)?)
    }

    /// What the other thread is told of `run`.
    fn other(&self, run: &Range<usize>) -> Option<Other> {
        let page_size = self.map.page_size();
        Some(Other {
            uffd: Arc::clone(&self.uffd),
            source: Arc::clone(&self.source),
            address: self.map.address_of(run.start)?,
            offset: self.map.source_offset_of(run.start)?,
            first: run.start,
            page_size: page_size as usize,
            whole: self.collapsing.is_some(),
            units: Arc::new(Units::new(run.clone(), (UNIT / page_size).max(1) as usize)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::hand::Part;

    #[test]
    fn units_are_taken_from_both_ends_and_each_once() {
        let units = Units::new(100..135, 16);

        assert_eq!(units.first(), Some(100..116));
        assert_eq!(units.last(), Some(132..135));
        assert_eq!(units.last(), Some(116..132));
        assert_eq!((units.first(), units.last()), (None, None));
    }

    #[test]
    fn a_trial_takes_several_pieces_and_those_that_fail_become_rare() {
        let mut pace = Pace::new();
        let trials = |pace: &mut Pace, pieces: u32, worth: bool| {
            let mut trials = 0;
            for _ in 0..pieces {
                if pace.is_due() {
                    trials += 1;
                    pace.came_to(worth);
                }
            }
            trials
        };

        assert_eq!(trials(&mut pace, 3 + MOST_MISSES, false), MOST_MISSES);
        assert!(trials(&mut pace, 100_000, false) <= 30 * MOST_MISSES);
        assert!(trials(&mut pace, LONGEST_DISTANCE, true) >= 1);
        assert_eq!(trials(&mut pace, 1000, true), 1000);
    }

    #[test]
    fn a_part_that_panics_is_told_and_the_next_one_is_done() {
        let mut hand = Hand::new(8);
        let mut outcomes = Vec::new();
        while !outcomes.contains(&Outcome::Panicked) || !outcomes.contains(&Outcome::Done(8)) {
            let panics = !outcomes.contains(&Outcome::Panicked);
            let part: Part<usize> = Box::new(move |buffer| {
                assert!(!panics);
                buffer.len()
            });
            let (own, outcome) = hand.beside(part, || std::thread::sleep(Duration::from_millis(1)));
            assert_eq!(own, ());
            outcomes.push(outcome);
        }
    }

    #[test]
    fn a_part_is_over_before_who_gave_it_has_unwound() {
        let mut hand = Hand::new(8);
        let busy = Arc::new(Mutex::new(()));
        for _ in 0..100 {
            let held = Arc::clone(&busy);
            let part: Part<()> = Box::new(move |_| {
                let _busy = held.lock().unwrap_or_else(PoisonError::into_inner);
                std::thread::sleep(Duration::from_micros(100));
            });
            let own = catch_unwind(AssertUnwindSafe(|| hand.beside(part, || panic!("own part"))));
            assert!(own.is_err());
            assert!(busy.try_lock().is_ok(), "nobody is at it any more");
        }
    }
}
