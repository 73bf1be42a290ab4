//! One uffd being served: what it maps, what is known of its pages, and what happens to it in the end.
//!
//! A session belongs to the event loop's thread, which alone reads its events, changes its states and installs
//! its pages. So nothing here is locked, and what was decided about a page still holds when it is installed.
//! Workers only bring bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uffd::{Event, EventBuffer, Userfaultfd};

use crate::address_map::{AddressMap, Region};
use crate::deferred::Deferred;
use crate::error::PagerError;
use crate::last_words;
use crate::page_state::PageStates;
use crate::policy::{EndReason, FailurePolicy, SessionEnd};
use crate::resolve::{Filling, Resolver, Stop};
use crate::source::{self, PageSource, ReadNow};
use crate::stats::Stats;
use crate::supervise::{Peer, Supervised};
use crate::sweep::Phase;
use crate::window::Window;
use crate::workers::{Completion, Job, Urgency, Workers};

/// Reads of one session that may be under way at once. More faults than this wait their turn.
const MOST_IN_FLIGHT: usize = 32;
/// Messages read before they are answered, so that one session's storm does not hold up the others.
const MOST_MESSAGES: usize = 1024;

/// What is public about a session.
#[derive(Debug)]
pub struct SessionInfo {
    /// Unique in this process, never used again.
    pub id: u64,
    /// Who is served.
    pub peer: Peer,
    /// The memory served, in address order.
    pub regions: Vec<Region>,
    /// Bytes of a page.
    pub page_size: u64,
    /// Live counters.
    pub stats: Stats,
}

/// What a session is made of.
pub(crate) struct Parts {
    pub(crate) id: u64,
    pub(crate) uffd: Userfaultfd,
    pub(crate) map: AddressMap,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) policy: FailurePolicy,
    /// Bytes installed around a fault; adaptive where absent.
    pub(crate) window: Option<u64>,
    pub(crate) source_timeout: Duration,
    pub(crate) peer: Peer,
    pub(crate) process: Option<Supervised>,
    /// Memory of this very process: what cannot be served ends it, so that is said first.
    pub(crate) own: bool,
    /// Kept open: versions to come talk on it, and it names the peer.
    pub(crate) connection: Option<OwnedFd>,
}

pub(crate) struct Session {
    pub(crate) info: Arc<SessionInfo>,
    pub(crate) uffd: Userfaultfd,
    pub(crate) map: AddressMap,
    pub(crate) states: PageStates,
    pub(crate) process: Option<Supervised>,
    pub(crate) policy: FailurePolicy,
    pub(crate) phase: Phase,
    pub(crate) deferred: Deferred,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) source_timeout: Duration,
    window: Window,
    huge: bool,
    rounds: HashMap<usize, u32>,
    pub(crate) in_flight: Vec<InFlight>,
    /// Faulting pages of the batch in hand.
    batch: Vec<usize>,
    /// What answering this batch has installed: later faults of it in there were woken by that.
    answered: Vec<Range<usize>>,
    own: bool,
    /// A page, and the address in it, that the thread waits for without which its bytes may never come.
    self_fault: Option<(usize, u64)>,
    pub(crate) connection: Option<OwnedFd>,
}

/// A read that a worker is doing.
pub(crate) struct InFlight {
    pages: Range<usize>,
    /// Pages of it that somebody waits for.
    pub(crate) waiting: Vec<usize>,
    /// When it has taken too long.
    pub(crate) deadline: Instant,
}

/// What the event loop lends a session.
pub(crate) struct Context<'a> {
    pub(crate) events: &'a mut EventBuffer,
    /// At least as long as any session's window.
    pub(crate) staging: &'a mut [u8],
    pub(crate) workers: &'a Workers,
}

impl Session {
    pub(crate) fn new(parts: Parts, base_page_size: u64) -> Self {
        let Parts { id, uffd, map, source, policy, window, source_timeout, peer, process, own, connection } =
            parts;
        let (pages, page_size) = (map.pages(), map.page_size());
        let huge = page_size > base_page_size;
        let info =
            SessionInfo { id, peer, regions: map.regions().collect(), page_size, stats: Stats::default() };
        Self {
            info: Arc::new(info),
            uffd,
            states: PageStates::new(map.pages()),
            map,
            process,
            policy,
            phase: Phase::Serving,
            deferred: Deferred::default(),
            source,
            source_timeout,
            // Huge pages are installed one at a time.
            window: if huge { Window::Fixed(1) } else { Window::new(window, pages, page_size) },
            huge,
            rounds: HashMap::new(),
            in_flight: Vec::new(),
            batch: Vec::new(),
            answered: Vec::new(),
            own,
            self_fault: None,
            connection,
        }
    }

    /// Reads what is waiting and answers it: removals first, whatever order they were read in, because the
    /// kernel hands out faults before events that are older.
    pub(crate) fn serve(&mut self, cx: &mut Context<'_>) {
        let started = Instant::now();
        let mut read = 0;
        let mut failure = None;
        let mut drained = false;
        while !drained && read < MOST_MESSAGES {
            match self.uffd.read_events(cx.events) {
                Ok(count) => {
                    read += count;
                    // A read that had room left has emptied the queue: asking again would cost a system call.
                    drained = count < cx.events.capacity();
                }
                Err(cause) => {
                    failure = Some(PagerError::Kernel { address: 0, len: 0, cause });
                    break;
                }
            }
            for event in cx.events.drain() {
                if let Err(error) = self.note(event) {
                    failure = failure.or(Some(error));
                }
            }
        }
        if let Some(error) = failure {
            self.fail(EndReason::Protocol, error);
        }
        self.answer_batch(cx);
        self.info.stats.busy_ns.add(started.elapsed().as_nanos() as u64);
    }

    /// Takes one event down: faults to be answered later, everything else at once.
    fn note(&mut self, event: Event) -> Result<(), PagerError> {
        match event {
            Event::Fault(fault) => {
                self.info.stats.faults.add(1);
                if self.own && fault.thread_id.is_some() && fault.thread_id == self.source.answered_by() {
                    self.self_fault = self.map.page_of(fault.address).map(|page| (page, fault.address));
                }
                // Outside every region: not memory that was handed over, hence nothing this may fill.
                self.batch.extend(self.map.page_of(fault.address));
                Ok(())
            }
            Event::Remove { start, end } | Event::Unmap { start, end } => {
                for pages in self.map.pages_of(start, end) {
                    self.info.stats.pages_removed.add(pages.len() as u64);
                    self.states.set_removed(pages);
                }
                Ok(())
            }
            Event::Fork { child } => {
                self.poison_copy(&child);
                Err(PagerError::Unsupported(
                    "the served process forked with EVENT_FORK on; following a child is not supported"
                        .to_owned(),
                ))
            }
            Event::Remap { from, to, .. } => Err(PagerError::Unsupported(format!(
                "the served process moved its memory (mremap from {from:#x} to {to:#x}); following it is not supported"
            ))),
            Event::Unknown { event } => {
                Err(PagerError::Protocol(format!("the kernel sent an event of unknown kind {event:#x}")))
            }
        }
    }

    /// A forked child must not read zeros where its parent's memory was still missing.
    fn poison_copy(&self, child: &Userfaultfd) {
        let mut from = 0;
        while let Some(run) = self.states.next_missing(from, self.map.pages()) {
            from = run.end;
            let run = self.map.clip(run);
            from = from.min(run.end);
            if let Some(address) = self.map.address_of(run.start) {
                // A child that is gone, or a kernel that cannot poison: there is no more that could be done to it.
                let _ = child.poison(address, self.map.bytes(run.len()), true);
            }
        }
    }

    fn answer_batch(&mut self, cx: &mut Context<'_>) {
        self.answered.clear();
        let mut batch = std::mem::take(&mut self.batch);
        for page in batch.drain(..) {
            self.answer(page, cx);
        }
        self.batch = batch;
    }

    /// Answers, or takes charge of, one fault.
    pub(crate) fn answer(&mut self, page: usize, cx: &mut Context<'_>) {
        if !self.phase.answers() {
            // Its process is being killed, or is gone.
            return;
        }
        if self.answered.iter().any(|pages| pages.contains(&page)) {
            self.info.stats.already_present.add(1);
            return;
        }
        let outcome = if !self.states.is_missing(page) {
            // It was there and is not: its owner discarded it. (Or this is a late duplicate: then it is woken.)
            self.fill(page..page + 1, Filling::Zeros)
        } else if self.phase.poisons() {
            self.fill(page..page + 1, Filling::Poison)
        } else {
            self.answer_from_source(page, cx)
        };
        self.settle(page, outcome);
    }

    fn answer_from_source(&mut self, page: usize, cx: &mut Context<'_>) -> Result<(), Stop> {
        if let Some(reading) = self.in_flight.iter_mut().find(|reading| reading.pages.contains(&page)) {
            if !reading.waiting.contains(&page) {
                reading.waiting.push(page);
            }
            return Ok(());
        }
        let window = self.window.at(page);
        let run = self.states.missing_run(page, self.map.block_of(page, window));
        let len = self.map.bytes(run.len()) as usize;
        let (Some(offset), Some(buffer)) = (self.map.source_offset_of(run.start), cx.staging.get_mut(..len))
        else {
            return Err(Stop::Failed(
                EndReason::PagerLost,
                PagerError::Internal("a window outside the map".to_owned()),
            ));
        };
        if source::known_zeros(&*self.source, offset, len as u64) {
            return self.fill(run, Filling::SourceZeros);
        }
        match source::read_now(&*self.source, offset, buffer) {
            Ok(ReadNow::Done) => self.fill(run, Filling::Bytes(buffer)),
            Ok(ReadNow::WouldBlock) => {
                if let Some((own, address)) = self.self_fault.take()
                    && own == page
                {
                    last_words::deadlock(address);
                }
                self.read_on_worker(run, Some(page), offset, cx.workers)
            }
            Err(error) => Err(Stop::Failed(EndReason::SourceFailed, error)),
        }
    }

    /// Starts a read of `run`; `waiting` is the page somebody waits for.
    pub(crate) fn read_on_worker(
        &mut self,
        run: Range<usize>,
        waiting: Option<usize>,
        offset: u64,
        workers: &Workers,
    ) -> Result<(), Stop> {
        if self.in_flight.len() >= MOST_IN_FLIGHT {
            return Err(Stop::Changing(run.start));
        }
        let job = Job {
            session: self.info.id,
            pages: run.clone(),
            offset,
            buffer: vec![0; self.map.bytes(run.len()) as usize],
            source: Arc::clone(&self.source),
        };
        let urgency = if waiting.is_some() { Urgency::Demand } else { Urgency::Background };
        if workers.submit(job, urgency).is_err() {
            let error = PagerError::Exhausted("no thread could be started to read the source".to_owned());
            return Err(Stop::Failed(EndReason::Exhausted, error));
        }
        self.info.stats.worker_reads.add(1);
        let deadline = Instant::now() + self.source_timeout;
        self.in_flight.push(InFlight { pages: run, waiting: waiting.into_iter().collect(), deadline });
        Ok(())
    }

    /// Takes the bytes a worker brought. Pages that were discarded meanwhile are not filled with them.
    pub(crate) fn complete(&mut self, completion: Completion, cx: &mut Context<'_>) {
        let Completion { job, result } = completion;
        let Some(index) = self.in_flight.iter().position(|reading| reading.pages == job.pages) else {
            return;
        };
        let InFlight { pages, waiting, .. } = self.in_flight.swap_remove(index);
        self.answered.clear();
        if let Err(error) = result {
            self.fail(EndReason::SourceFailed, error);
        } else if !self.phase.poisons() {
            let mut page = pages.start;
            while page < pages.end {
                let run = self.states.missing_run(page, page..pages.end);
                page = run.end.max(page + 1);
                let skip = self.map.bytes(run.start - pages.start) as usize;
                let Some(bytes) = job.buffer.get(skip..).filter(|_| !run.is_empty()) else { continue };
                if let Err(stop) = self.fill(run, Filling::Bytes(bytes)) {
                    self.stopped(stop);
                }
            }
        }
        // Those that were discarded, refused, or are to be poisoned now. A page that was filled above is passed
        // over: filling woke its waiters.
        for page in waiting {
            self.answer(page, cx);
        }
    }

    pub(crate) fn reads_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub(crate) fn is_being_read(&self, page: usize) -> bool {
        self.in_flight.iter().any(|reading| reading.pages.contains(&page))
    }

    pub(crate) fn source(&self) -> &Arc<dyn PageSource> {
        &self.source
    }

    /// The most pages read at once.
    pub(crate) fn window(&self) -> usize {
        self.window.most()
    }

    /// Fills pages and remembers that this batch did.
    pub(crate) fn fill(&mut self, pages: Range<usize>, filling: Filling<'_>) -> Result<(), Stop> {
        let mut resolver = Resolver {
            uffd: &self.uffd,
            map: &self.map,
            states: &mut self.states,
            stats: &self.info.stats,
            rounds: &mut self.rounds,
            huge: self.huge,
            filled: false,
        };
        let done = resolver.fill(pages.clone(), filling);
        let end = match &done {
            Ok(()) => pages.end,
            Err(Stop::Changing(page)) => *page,
            Err(_) => pages.start,
        };
        if end > pages.start {
            self.deferred.progressed();
            self.answered.push(pages.start..end);
        }
        done
    }

    /// What becomes of the fault on `page` after an attempt to answer it.
    fn settle(&mut self, page: usize, outcome: Result<(), Stop>) {
        match outcome {
            Ok(()) => {}
            Err(Stop::Changing(from)) if from > page => {}
            Err(Stop::Changing(_)) => {
                self.info.stats.deferred.add(1);
                self.deferred.park(page, Instant::now());
            }
            Err(stop) => {
                // Whatever happens to the session, this fault still waits.
                self.deferred.park(page, Instant::now());
                self.stopped(stop);
            }
        }
    }

    /// Tries the parked faults again, if it is time.
    pub(crate) fn retry(&mut self, now: Instant, cx: &mut Context<'_>) {
        let Some(pages) = self.deferred.take_due(now) else { return };
        // The thread that changes the address space has to run before anything can be installed.
        std::thread::yield_now();
        self.batch.extend(pages);
        self.serve(cx);
    }

    /// Puts the session through its failure policy. The first failure is the one that is told.
    pub(crate) fn fail(&mut self, reason: EndReason, error: PagerError) {
        if self.own && matches!(self.phase, Phase::Serving) {
            last_words::cannot_be_served(&self.map, &error);
            if self.policy == FailurePolicy::Kill {
                std::process::abort();
            }
        }
        let end = SessionEnd { reason, error: Some(error) };
        self.phase.fail(end, self.policy, self.process.as_ref());
    }

    /// Makes the uffd nonblocking again. Its flags are shared with the peer; a blocking one cannot be polled.
    pub(crate) fn restore_nonblocking(&self) {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        if let Ok(flags) = fcntl(&self.uffd, FcntlArg::F_GETFL) {
            // It cannot fail on a descriptor that is open; if it did, the next turn would try again.
            let _ = fcntl(&self.uffd, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK));
        }
    }

    pub(crate) fn stopped(&mut self, stop: Stop) {
        match stop {
            Stop::Changing(_) => {}
            Stop::Gone => self.phase.peer_gone(),
            Stop::CannotPoison => self.phase.cannot_poison(self.process.as_ref()),
            Stop::Failed(reason, error) => self.fail(reason, error),
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
