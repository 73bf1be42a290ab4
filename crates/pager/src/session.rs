//! One uffd being served: what it maps, what is known of its pages, and what happens to it in the end.
//!
//! A session belongs to the event loop's thread, which alone reads its events, changes its states and installs
//! its pages. So nothing here is locked, and what was decided about a page still holds when it is installed.
//! Workers only bring bytes.

use std::collections::{HashMap, VecDeque};
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
use crate::source::{self, PageSource};
use crate::stats::Stats;
use crate::supervise::{Peer, Supervised};
use crate::sweep::Phase;
use crate::window::Window;
use crate::workers::Workers;

/// Reads of one session that may be under way at once. More faults than this wait their turn.
pub(crate) const MOST_IN_FLIGHT: usize = 32;

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
    pub(crate) window: Window,
    huge: bool,
    rounds: HashMap<usize, u32>,
    pub(crate) in_flight: Vec<InFlight>,
    /// Faults that were read and have not had their turn yet.
    pub(crate) queue: VecDeque<usize>,
    /// What was installed since events were last read: later faults of the queue in there were woken by that.
    pub(crate) answered: Vec<Range<usize>>,
    own: bool,
    /// A page, and the address in it, that the thread waits for without which its bytes may never come.
    pub(crate) self_fault: Option<(usize, u64)>,
    pub(crate) connection: Option<OwnedFd>,
}

/// A read that a worker is doing.
pub(crate) struct InFlight {
    pub(crate) pages: Range<usize>,
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
    /// There is no other session, which would have to wait.
    pub(crate) alone: bool,
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
            queue: VecDeque::new(),
            answered: Vec::new(),
            own,
            self_fault: None,
            connection,
        }
    }

    /// Takes one event down: faults to be answered later, everything else at once.
    pub(crate) fn note(&mut self, event: Event) -> Result<(), PagerError> {
        match event {
            Event::Fault(fault) => {
                self.info.stats.faults.add(1);
                let page = self.map.page_of(fault.address);
                if self.own
                    && fault.thread_id.is_some()
                    && fault.thread_id == source::answered_by(&*self.source)
                {
                    self.self_fault = page.map(|page| (page, fault.address));
                }
                match page {
                    Some(page) => self.queue.push_back(page),
                    // Outside every region: not memory that was handed over, hence nothing this may fill.
                    None => self.info.stats.unanswered.add(1),
                }
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

    /// Answers, or takes charge of, one fault.
    pub(crate) fn answer(&mut self, page: usize, cx: &mut Context<'_>) {
        if !self.phase.answers() {
            // Its process is being killed, or is gone.
            self.info.stats.unanswered.add(1);
            return;
        }
        if self.was_answered(page) {
            self.info.stats.already_present.add(1);
            return;
        }
        let outcome = if !self.states.is_missing(page) {
            // It was there and is not: its owner discarded it. (Or this is a late duplicate: then it is woken.)
            self.fill(page..page + 1, Filling::Zeros, &[page])
        } else if self.phase.poisons() {
            self.fill(page..page + 1, Filling::Poison, &[page])
        } else {
            self.answer_from_source(page, cx)
        };
        self.settle(page, outcome);
    }

    pub(crate) fn was_answered(&self, page: usize) -> bool {
        self.answered.iter().any(|pages| pages.contains(&page))
    }

    pub(crate) fn reads_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Faults that nobody has answered yet.
    pub(crate) fn faults_waiting(&self) -> usize {
        self.queue.len()
            + self.deferred.len()
            + self.in_flight.iter().map(|reading| reading.waiting.len()).sum::<usize>()
    }

    pub(crate) fn is_being_read(&self, page: usize) -> bool {
        self.in_flight.iter().any(|reading| reading.pages.contains(&page))
    }

    /// The most pages read at once.
    pub(crate) fn window(&self) -> usize {
        self.window.most()
    }

    /// Fills pages, of which some are waited for, and remembers that this turn did.
    pub(crate) fn fill(
        &mut self,
        pages: Range<usize>,
        filling: Filling<'_>,
        waiting: &[usize],
    ) -> Result<(), Stop> {
        let mut resolver = Resolver {
            uffd: &self.uffd,
            map: &self.map,
            states: &mut self.states,
            stats: &self.info.stats,
            rounds: &mut self.rounds,
            huge: self.huge,
            filled: false,
            waiting,
            reached: pages.start,
        };
        let done = resolver.fill(pages.clone(), filling);
        let end = resolver.reached;
        if end > pages.start {
            self.deferred.progressed();
            self.answered.push(pages.start..end);
        }
        done
    }

    /// What becomes of the fault on `page` after an attempt to answer it.
    fn settle(&mut self, page: usize, outcome: Result<(), Stop>) {
        let Err(stop) = outcome else { return };
        if !self.was_answered(page) {
            // Whatever happens to the session, this fault still waits.
            if matches!(stop, Stop::Changing(_)) {
                self.info.stats.deferred.add(1);
            }
            if !self.deferred.park(page, Instant::now()) {
                self.info.stats.joined.add(1);
            }
        }
        self.stopped(stop);
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
