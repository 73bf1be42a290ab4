//! Bytes from the source: at hand, by a worker, later from whoever is asked, or not in time.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use uffd::limit_behind;

use crate::ahead::MOST_READS;
use crate::deferred::Wanted;
use crate::error::PagerError;
use crate::last_words;
use crate::policy::EndReason;
use crate::resolve::{Filling, Stop};
use crate::session::{Context, MOST_IN_FLIGHT, Session};
use crate::source::{self, Fetch};
use crate::workers::{Completion, Job, Urgency, Workers};

/// A read that a worker is doing.
pub(crate) struct InFlight {
    /// Which of the session's reads it is.
    pub(crate) number: u64,
    pub(crate) pages: Range<usize>,
    pub(crate) reason: Reason,
    /// Pages of it that somebody waits for.
    pub(crate) waiting: Vec<usize>,
    /// When it was asked for.
    pub(crate) since: Instant,
    /// When it has taken too long.
    pub(crate) deadline: Instant,
    /// The source looks whether it is still there.
    pub(crate) _wanted: Arc<()>,
}

/// Why a read is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Somebody waits for this page of it.
    Fault(usize),
    /// Somebody waits for its only page, and this is to be read when it is there.
    FirstPage(usize, Range<usize>),
    /// Nobody waits.
    Ahead,
}

impl Reason {
    pub(crate) const fn waiting(&self) -> Option<usize> {
        match self {
            Self::Fault(page) | Self::FirstPage(page, _) => Some(*page),
            Self::Ahead => None,
        }
    }
}

impl Session {
    pub(crate) fn answer_from_source(&mut self, page: usize, cx: &mut Context<'_>) -> Result<(), Stop> {
        if self.replaying.is_some()
            && let Some(outcome) = self.answer_from_ready(page)
        {
            return outcome;
        }
        if let Some(reading) = self.in_flight.iter_mut().find(|reading| reading.pages.contains(&page)) {
            if reading.waiting.is_empty() {
                // Now somebody does.
                cx.workers.promote(self.info.id, &reading.pages);
            }
            if reading.waiting.contains(&page) {
                self.info.stats.joined.add(1);
                return Ok(());
            }
            reading.waiting.push(page);
            return Ok(());
        }
        let window = self.window.at(page, &self.states);
        let run = self.states.missing_run(page, self.map.block_of(page, window));
        self.window.brings(&run);
        if let Some(wish) = self.window.wish() {
            self.ahead.add(wish);
        }
        if self.fill_at_hand(run.clone(), &[page], cx.staging)? {
            return Ok(());
        }
        // Its neighbours may be the ones to wait for.
        let alone = run.len() == 1;
        if !alone && self.fill_at_hand(page..page + 1, &[page], cx.staging)? {
            self.read_rest(run, cx.workers);
            return Ok(());
        }
        if let Some((own, address)) = self.self_fault.take()
            && own == page
        {
            last_words::deadlock(address);
        }
        if !alone && self.first_page.is_due() {
            return self.read_on_worker(page..page + 1, Reason::FirstPage(page, run), cx.workers);
        }
        self.read_on_worker(run, Reason::Fault(page), cx.workers)
    }

    /// Fills `run`, of which somebody waits for some pages or for none, if that needs no waiting for the source. Whether it did.
    /// Measured from what was measured last.
    pub(crate) fn fill_at_hand(
        &mut self,
        run: Range<usize>,
        waiting: &[usize],
        staging: &mut [u8],
    ) -> Result<bool, Stop> {
        let len = self.map.bytes(run.len()) as usize;
        let (Some(offset), Some(buffer)) = (self.map.source_offset_of(run.start), staging.get_mut(..len))
        else {
            return Err(outside());
        };
        let source = Arc::clone(&self.source);
        if !self.brings_to_file() && source::known_zeros(&*source, offset, len as u64) {
            return self.fill(run, Filling::SourceZeros, waiting).map(|()| true);
        }
        match source::at_hand(&*source, offset, buffer) {
            Ok(Some(bytes)) => {
                let took = self.watch.lap();
                self.source_answered(took, !waiting.is_empty());
                self.fill(run, Filling::Bytes(bytes), waiting).map(|()| true)
            }
            Ok(None) => Ok(false),
            Err(error) => Err(Stop::Failed(EndReason::SourceFailed, error)),
        }
    }

    /// Has the rest of a window read whose page is there already. Where there is no room for it, its faults will.
    fn read_rest(&mut self, window: Range<usize>, workers: &Workers) {
        let read = self.in_flight.iter().any(|reading| reading.pages == window);
        let missing = self.states.next_missing(window.start, 1).is_some_and(|run| run.start < window.end);
        if !missing || read || self.in_flight.len() >= MOST_READS || !self.phase.serves() {
            return;
        }
        if let Err(stop) = self.read_on_worker(window, Reason::Ahead, workers) {
            self.stopped(stop);
        }
    }

    pub(crate) fn reads_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Starts a read of `run`.
    pub(crate) fn read_on_worker(
        &mut self,
        run: Range<usize>,
        reason: Reason,
        workers: &Workers,
    ) -> Result<(), Stop> {
        let Some(offset) = self.map.source_offset_of(run.start) else { return Err(outside()) };
        if self.in_flight.len() >= MOST_IN_FLIGHT {
            return Err(Stop::Changing(run.start));
        }
        self.reads_begun += 1;
        let number = self.reads_begun;
        let job = Job {
            session: self.info.id,
            number,
            pages: run.clone(),
            offset,
            buffer: vec![0; self.map.bytes(run.len()) as usize],
            source: Arc::clone(&self.source),
        };
        let waiting = reason.waiting();
        let urgency = if waiting.is_some() { Urgency::Demand } else { Urgency::Background };
        let wanted = Arc::new(());
        let fetch = Fetch::new(job, workers.deliver(), urgency == Urgency::Demand).wanted_with(&wanted);
        let job = source::fetch(&*self.source, fetch).err().and_then(Fetch::into_job);
        if job.is_some_and(|job| workers.submit(job, urgency).is_err()) {
            let error = PagerError::Exhausted(format!(
                "no thread could be started to read the source. {}",
                limit_behind("clone", libc::EAGAIN).unwrap_or_default()
            ));
            return Err(Stop::Failed(EndReason::Exhausted, error));
        }
        self.info.stats.worker_reads.add(1);
        let since = Instant::now();
        let deadline = since + self.source_timeout;
        let waiting = waiting.into_iter().collect();
        self.in_flight.push(InFlight {
            number,
            pages: run,
            reason,
            waiting,
            since,
            deadline,
            _wanted: wanted,
        });
        Ok(())
    }

    /// Takes the bytes a worker brought. Pages that were discarded meanwhile are not filled with them.
    pub(crate) fn complete(&mut self, completion: Completion, cx: &mut Context<'_>) {
        let Completion { mut job, result } = completion;
        let Some(index) = self.in_flight.iter().position(|reading| reading.number == job.number) else {
            return;
        };
        let InFlight { pages, reason, waiting, since, .. } = self.in_flight.swap_remove(index);
        self.answered.clear();
        self.watch.start();
        let took = self.watch.last().saturating_duration_since(since);
        self.source_answered(took, !waiting.is_empty());
        match reason {
            Reason::Fault(_) if pages.len() > 1 => self.first_page.window_took(took),
            Reason::FirstPage(..) => self.first_page.page_took(took),
            Reason::Fault(_) | Reason::Ahead => {}
        }
        if let Err(error) = result {
            self.fail(EndReason::SourceFailed, error);
        } else if !self.phase.poisons() && !self.keep_for_replay(&pages, &mut job.buffer, &waiting) {
            let mut page = pages.start;
            while page < pages.end {
                let run = self.states.missing_run(page, page..pages.end);
                page = run.end.max(page + 1);
                let skip = self.map.bytes(run.start - pages.start) as usize;
                let Some(bytes) = job.buffer.get(skip..).filter(|_| !run.is_empty()) else { continue };
                if let Err(stop) = self.fill(run, Filling::Bytes(bytes), &waiting) {
                    self.stopped(stop);
                }
            }
        }
        if let Reason::FirstPage(_, window) = reason {
            self.read_rest(window, cx.workers);
        }
        // Those that were discarded, refused, or are to be poisoned now. Filling woke the waiters of the others.
        // Answering one of them may bring the page of the next, which nobody has counted then.
        let unanswered: Vec<usize> = waiting.into_iter().filter(|&page| !self.was_answered(page)).collect();
        for page in unanswered {
            self.answer_waiting(page, cx);
        }
    }

    /// Gives up reads that have taken too long; when the next one will have, if none has.
    pub(crate) fn check_reads(&mut self, now: Instant, cx: &mut Context<'_>) -> Option<Instant> {
        let soonest = self.in_flight.iter().map(|reading| reading.deadline).min()?;
        if soonest > now {
            return Some(soonest);
        }
        let ms = self.source_timeout.as_millis() as u64;
        self.fail(EndReason::Stalled, PagerError::Timeout { what: "the source did not answer", ms });
        // Whoever waits for these pages gets what the policy says; an answer that still comes finds nothing to fill.
        for page in self.drop_reads() {
            self.answer_waiting(page, cx);
        }
        None
    }

    /// Wants nothing any more of what the source was asked for; the pages of it that somebody waits for.
    pub(crate) fn drop_reads(&mut self) -> Vec<usize> {
        if self.in_flight.is_empty() {
            return Vec::new();
        }
        let waiting =
            std::mem::take(&mut self.in_flight).into_iter().flat_map(|reading| reading.waiting).collect();
        self.source.given_up();
        waiting
    }

    /// Answers who waited for a read of `page`, where that is now. Who waited where it was before was woken when it left.
    fn answer_waiting(&mut self, page: usize, cx: &mut Context<'_>) {
        match self.map.address_of(page) {
            Some(address) => self.answer(Wanted::missing(address), cx),
            None => self.info.stats.unanswered.add(1),
        }
    }
}

fn outside() -> Stop {
    Stop::Failed(EndReason::PagerLost, PagerError::Internal("pages outside the map".to_owned()))
}
