//! Bringing pages that nobody waits for: the rest of blocks that are wanted, while no fault waits.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::PagerError;
use crate::policy::EndReason;
use crate::resolve::{Filling, Stop};
use crate::session::{Context, MOST_IN_FLIGHT, Session};
use crate::source::{self, ReadNow};

/// Reads ahead that may be under way at once: faults have room for as many more.
const MOST_READS: usize = MOST_IN_FLIGHT / 2;
/// Between attempts on an address space that is changing.
const PAUSE: Duration = Duration::from_micros(100);

/// Where bringing ahead has got to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// There is more to bring, or the session has begun to end: it wants its next turn at once.
    More,
    /// Not before this moment.
    At(Instant),
    /// Nothing, before a fault or a read that ends says otherwise.
    Nothing,
}

impl Session {
    /// Whether there is something to bring that nobody waits for.
    pub(crate) fn has_ahead(&self) -> bool {
        !self.ahead.is_empty() && self.phase.serves()
    }

    /// Brings one window of what is wanted and nobody waits for.
    pub(crate) fn bring_ahead(&mut self, cx: &mut Context<'_>) -> Ahead {
        // Who waits for a fault that was put off goes first.
        if let Some(moment) = self.deferred.due() {
            return Ahead::At(moment);
        }
        while let Some(pages) = self.ahead.front().cloned().filter(|_| self.phase.serves()) {
            let Some(run) = self.states.next_missing(pages.start, self.window()) else {
                self.ahead.clear();
                break;
            };
            if run.start >= pages.end || self.is_being_read(run.start) {
                self.brought_ahead(run.start + 1);
                continue;
            }
            let run = self.map.clip(run.start..run.end.min(pages.end));
            let end = run.end;
            return match self.bring(run, cx) {
                Ok(true) => {
                    self.brought_ahead(end);
                    Ahead::More
                }
                Ok(false) => Ahead::Nothing,
                Err(Stop::Changing(_)) => Ahead::At(Instant::now() + PAUSE),
                Err(stop) => {
                    self.stopped(stop);
                    Ahead::More
                }
            };
        }
        Ahead::Nothing
    }

    /// What lies before `page` of the first stretch is done.
    fn brought_ahead(&mut self, page: usize) {
        if let Some(pages) = self.ahead.front_mut() {
            pages.start = page;
            if pages.start >= pages.end {
                self.ahead.pop_front();
            }
        }
    }

    /// Brings a run of missing pages that nobody waits for, or has it read; `false` where as many reads are under way as
    /// may be.
    pub(crate) fn bring(&mut self, run: Range<usize>, cx: &mut Context<'_>) -> Result<bool, Stop> {
        let len = self.map.bytes(run.len()) as usize;
        let (Some(offset), Some(buffer)) = (self.map.source_offset_of(run.start), cx.staging.get_mut(..len))
        else {
            let error = PagerError::Internal("a run outside the map".to_owned());
            return Err(Stop::Failed(EndReason::PagerLost, error));
        };
        self.watch.start();
        if !self.brings_to_file() && source::known_zeros(&*self.source, offset, len as u64) {
            return self.fill(run, Filling::SourceZeros, &[]).map(|()| true);
        }
        match source::read_now(&*self.source, offset, buffer) {
            Ok(ReadNow::Done) => {
                let took = self.watch.lap();
                self.source_answered(took, false);
                self.fill(run, Filling::Bytes(buffer), &[]).map(|()| true)
            }
            Ok(ReadNow::WouldBlock) if self.reads_in_flight() >= MOST_READS => Ok(false),
            Ok(ReadNow::WouldBlock) => self.read_on_worker(run, None, offset, cx.workers).map(|()| true),
            Err(error) => Err(Stop::Failed(EndReason::SourceFailed, error)),
        }
    }
}
