//! One uffd being served: what it maps, what is known of its pages, and what happens to it in the end.
//!
//! A session belongs to the event loop's thread, which alone reads its events, changes its states and installs
//! its pages. So nothing here is locked, and what was decided about a page still holds when it is installed.
//! Workers only bring bytes.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uffd::{EventBuffer, Userfaultfd};

use crate::address_map::AddressMap;
use crate::ahead::Wishes;
use crate::collapse::Collapsing;
use crate::deferred::{Deferred, Kind, Wanted};
use crate::failing::unwritable;
use crate::fill::{FillOptions, Filling as Announcing};
use crate::first_page::FirstPage;
use crate::following::Elsewhere;
use crate::holding::{Backing, Holding};
use crate::in_two::InTwo;
use crate::latency::Stopwatch;
use crate::modes::Minor;
use crate::page_state::PageStates;
use crate::policy::FailurePolicy;
use crate::reading::InFlight;
use crate::replay::Replaying;
use crate::resolve::{Filling, Resolver, Stop};
use crate::session_info::SessionInfo;
use crate::source::PageSource;
use crate::spin::Spin;
use crate::stats::Stats;
use crate::supervise::{Peer, Supervised};
use crate::sweep::Phase;
use crate::taking_over::Keeping;
use crate::trace::{RecordTo, Recorder, Recording, WorkingSet, recording};
use crate::tracking::Tracking;
use crate::window::Window;
use crate::workers::Workers;

/// Reads of one session that may be under way at once. More faults than this wait their turn.
pub(crate) const MOST_IN_FLIGHT: usize = 32;

/// Between attempts to do something that nobody waits for in an address space that is changing.
pub(crate) const CHANGING_PAUSE: Duration = Duration::from_micros(100);

/// What a session is made of.
pub(crate) struct Parts {
    pub(crate) id: u64,
    pub(crate) label: String,
    pub(crate) uffd: Userfaultfd,
    pub(crate) map: AddressMap,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) policy: FailurePolicy,
    /// The thread by which alone a hold of this process's own memory ends.
    pub(crate) owner: Option<u32>,
    /// What is to outlive the session.
    pub(crate) backing: Option<Backing>,
    /// Bytes installed around a fault; adaptive where absent.
    pub(crate) window: Option<u64>,
    pub(crate) fill: FillOptions,
    pub(crate) source_timeout: Duration,
    pub(crate) peer: Peer,
    pub(crate) process: Option<Supervised>,
    /// The session of the process it was forked from.
    pub(crate) parent: Option<u64>,
    /// Write to this memfd instead of copying.
    pub(crate) minor: Option<Minor>,
    /// Record writes; the memory is protected.
    pub(crate) tracking: Option<Tracking>,
    /// Nothing is missing: the source is never asked.
    pub(crate) all_there: bool,
    /// Memory of this very process: what cannot be served ends it, so that is said first.
    pub(crate) own: bool,
    /// Kept open: versions to come talk on it, and it names the peer.
    pub(crate) connection: Option<OwnedFd>,
    pub(crate) working_set: WorkingSet,
}

pub(crate) struct Session {
    pub(crate) info: Arc<SessionInfo>,
    pub(crate) uffd: Arc<Userfaultfd>,
    pub(crate) map: AddressMap,
    pub(crate) states: PageStates,
    pub(crate) process: Option<Supervised>,
    pub(crate) policy: FailurePolicy,
    pub(crate) phase: Phase,
    pub(crate) deferred: Deferred,
    pub(crate) holding: Holding,
    pub(crate) backing: Option<Backing>,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) source_timeout: Duration,
    pub(crate) window_bytes: Option<u64>,
    pub(crate) window: Window,
    pub(crate) first_page: FirstPage,
    /// Pages to bring although nobody waits for them.
    pub(crate) ahead: Wishes,
    pub(crate) filling: Announcing,
    pub(crate) collapsing: Option<Collapsing>,
    pub(crate) huge: bool,
    rounds: HashMap<usize, u32>,
    pub(crate) in_flight: Vec<InFlight>,
    /// Reads that were begun.
    pub(crate) reads_begun: u64,
    /// Faults that were read and have not had their turn yet.
    pub(crate) queue: VecDeque<Wanted>,
    /// What was installed since events were last read: later faults of the queue in there were woken by that.
    pub(crate) answered: Vec<Range<usize>>,
    /// Faults at addresses where nothing could be done but to wake: how often, since the memory last changed.
    pub(crate) elsewhere: Elsewhere,
    minor: Option<Minor>,
    pub(crate) tracking: Option<Tracking>,
    pub(crate) own: bool,
    /// A page, and the address in it, that the thread waits for without which its bytes may never come.
    pub(crate) self_fault: Option<(usize, u64)>,
    pub(crate) connection: Option<OwnedFd>,
    pub(crate) watch: Stopwatch,
    /// What outlives this process of it, where somebody keeps that.
    pub(crate) kept: Option<Box<Keeping>>,
    pub(crate) fill_options: FillOptions,
    record: Option<RecordTo>,
    pub(crate) recorder: Option<Box<Recorder>>,
    pub(crate) replaying: Option<Box<Replaying>>,
    /// Whether to read once more before waiting.
    pub(crate) again: Spin,
}

/// What the event loop lends a session.
pub(crate) struct Context<'a> {
    pub(crate) events: &'a mut EventBuffer,
    /// At least as long as any session's window.
    pub(crate) staging: &'a mut [u8],
    pub(crate) in_two: &'a mut InTwo,
    pub(crate) workers: &'a Workers,
    /// There is no other session, which would have to wait.
    pub(crate) alone: bool,
    /// Sessions of children that were forked, with their parent's id, for the event loop to take over.
    pub(crate) forked: &'a mut Vec<(u64, Session)>,
    /// A descriptor to be closed where none is free.
    pub(crate) spare: &'a mut Option<OwnedFd>,
}

impl Session {
    pub(crate) fn new(parts: Parts, base_page_size: u64) -> Self {
        let huge = parts.map.page_size() > base_page_size;
        let collapse = parts.fill.collapse;
        let mut session = Self::of_parts(parts, huge);
        session.wants_collapsing(collapse);
        session
    }

    pub(crate) fn of_parts(parts: Parts, huge: bool) -> Self {
        let Parts {
            id,
            label,
            uffd,
            map,
            source,
            policy,
            window,
            fill,
            source_timeout,
            peer,
            process,
            parent,
            own,
            connection,
            minor,
            tracking,
            all_there,
            working_set,
            owner,
            backing,
        } = parts;
        let WorkingSet { record, replay } = working_set;
        let (pages, page_size) = (map.pages(), map.page_size());
        let info = SessionInfo {
            id,
            peer,
            parent,
            regions: map.regions().collect(),
            page_size,
            stats: Stats::default(),
            filled: OnceLock::new(),
            label,
            taken_over: 0,
            lost_children: 0,
            replays: replay.is_some(),
            recording: record.as_ref().map(|record| Arc::new(Recording::new(record))),
        };
        let filling = Announcing::new(fill);
        let replaying = replay.map(|plan| Box::new(Replaying::new(plan, &map, &info.stats)));
        let mut states = PageStates::new(pages);
        if all_there {
            states.set_present(0..pages);
        }
        Self {
            info: Arc::new(info),
            uffd: Arc::new(uffd),
            states,
            map,
            process,
            policy,
            phase: Phase::Serving,
            deferred: Deferred::default(),
            holding: Holding::of(owner),
            backing,
            source,
            source_timeout,
            // Huge pages are installed one at a time.
            window_bytes: window,
            first_page: FirstPage::new(),
            window: if huge { Window::Fixed(1) } else { Window::new(window, pages, page_size) },
            ahead: if filling.is_wanted() { Wishes::to_fill(pages) } else { Wishes::default() },
            filling,
            collapsing: None,
            huge,
            rounds: HashMap::new(),
            in_flight: Vec::new(),
            reads_begun: 0,
            queue: VecDeque::new(),
            answered: Vec::new(),
            elsewhere: Elsewhere::default(),
            minor,
            tracking,
            own,
            self_fault: None,
            connection,
            watch: Stopwatch::new(),
            again: Spin::new(),
            kept: None,
            fill_options: fill,
            record,
            recorder: None,
            replaying,
        }
    }

    /// Begins to record, where that is wanted; `over` is told when the recording has come to its end.
    pub(crate) fn start_recording(&mut self, over: impl FnOnce() + Send + 'static) {
        let (Some(to), Some(recording)) = (self.record.take(), &self.info.recording) else { return };
        match Recorder::start(to, recording, self.info.id, self.map.page_size(), over) {
            Ok(recorder) => self.recorder = Some(Box::new(recorder)),
            Err(error) => recording.ended(Err(error)),
        }
    }

    /// The fault on `page` was answered, and nothing had to be brought for it.
    pub(crate) fn record_alone(&mut self, page: usize, kind: Kind) {
        if let Some(recorder) = recording(&mut self.recorder) {
            recorder.answered_alone(page, kind, &self.map);
        }
    }

    /// Answers, or takes charge of, the fault on a page that is missing from the other process's memory.
    pub(crate) fn answer_missing(&mut self, page: usize, wanted: Wanted, cx: &mut Context<'_>) {
        if self.was_answered(page) {
            self.info.stats.already_present.add(1);
            self.record_alone(page, Kind::Missing);
            return;
        }
        let outcome = if !self.states.is_missing(page) {
            // It was there and is not: its owner discarded it. (Or this is a late duplicate: then it is woken.)
            self.fill(page..page + 1, Filling::Zeros, &[page])
        } else if self.phase.poisons() {
            self.fill(page..page + 1, Filling::Poison, &[page])
        } else {
            if self.replaying.is_some() && wanted.read.is_some() {
                self.compare_with_replay(page);
            }
            self.answer_from_source(page, cx)
        };
        if let (Ok(()), true, Some(tracking)) = (&outcome, wanted.write, self.tracking.as_mut()) {
            // The next thing it does is to write. That would be a second fault.
            tracking.written(page..page + 1);
            // If this is refused, there is that fault.
            let _ = self.uffd.write_protect(wanted.address, self.map.page_size(), false, true);
        }
        self.settle(page, wanted, outcome);
    }

    pub(crate) fn was_answered(&self, page: usize) -> bool {
        self.answered.iter().any(|pages| pages.contains(&page))
    }

    pub(crate) fn forget_rounds(&mut self) {
        self.rounds.clear();
    }

    /// Faults that nobody has answered yet.
    pub(crate) fn faults_waiting(&self) -> usize {
        self.queue.len()
            + self.deferred.len()
            + self.holding.faults.len()
            + self.in_flight.iter().map(|reading| reading.waiting.len()).sum::<usize>()
    }

    /// The most pages read at once.
    pub(crate) fn window(&self) -> usize {
        self.window.most()
    }

    /// Fills pages, of which some are waited for, and remembers that this turn did. Measured from what was measured last.
    pub(crate) fn fill(
        &mut self,
        pages: Range<usize>,
        filling: Filling<'_>,
        waiting: &[usize],
    ) -> Result<(), Stop> {
        if waiting.is_empty()
            && let Some(done) = self.fill_huge(&pages, filling)
        {
            return done;
        }
        let (mut filling, mut brought) = (filling, None);
        if let (Some(minor), Filling::Bytes(bytes)) = (&self.minor, filling) {
            // There may be more bytes than pages: those behind them are not to be touched.
            let len = (self.map.bytes(pages.len()) as usize).min(bytes.len());
            minor.write(&self.map, pages.start, bytes.get(..len).unwrap_or_default()).map_err(unwritable)?;
            (filling, brought) = (Filling::Cached, Some(minor));
        }
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
            brought,
            protect: self.tracking.as_ref().map(|tracking| tracking.zeros.as_slice()),
            whole: self.collapsing.is_some(),
        };
        let done = resolver.fill(pages.clone(), filling);
        let (end, filled) = (resolver.reached, resolver.filled);
        if brought.is_some() && !matches!(done, Err(Stop::Failed(..))) {
            // Whoever maps it from now on has the right bytes; they are never written a second time.
            self.states.set_present(pages.clone());
        }
        if filled && !matches!(filling, Filling::Poison) {
            let latencies = &self.info.stats.latencies;
            let install = if waiting.is_empty() { &latencies.prefetch_install } else { &latencies.install };
            install.record(self.watch.lap());
        }
        if end > pages.start {
            if let Some(recorder) = recording(&mut self.recorder) {
                let from_image = !matches!(filling, Filling::Zeros | Filling::Poison);
                recorder.filled(&(pages.start..end), from_image, waiting, &self.map);
            }
            if self.replaying.is_some() && !waiting.is_empty() {
                self.note_held(pages.start..end, waiting);
            }
            self.deferred.progressed();
            self.wake_other_places(pages.start..end);
            match self.answered.last_mut() {
                Some(last) if last.end == pages.start => last.end = end,
                _ => self.answered.push(pages.start..end),
            }
        }
        done
    }

    /// A page in the page cache that is not mapped. What the pager has not brought itself it brings now, if it can write to
    /// the memory's file; everything else is mapped as it is.
    pub(crate) fn answer_minor(&mut self, page: usize, wanted: Wanted, cx: &mut Context<'_>) {
        if self.states.is_missing(page) && self.minor.is_some() {
            self.answer_missing(page, wanted, cx);
            return;
        }
        // Whatever is there is what somebody put there: the source has nothing to add any more.
        self.states.set_present(page..page + 1);
        self.continue_at(wanted);
    }

    /// Whether pages are written to the memory's file.
    pub(crate) fn brings_to_file(&self) -> bool {
        self.minor.is_some()
    }

    /// A read of the source took so long.
    pub(crate) fn source_answered(&self, took: Duration, waited_for: bool) {
        let latencies = &self.info.stats.latencies;
        let source = if waited_for { &latencies.source } else { &latencies.prefetch_source };
        source.record(took);
    }

    /// Makes the uffd nonblocking again. Its flags are shared with the peer; a blocking one cannot be polled.
    pub(crate) fn restore_nonblocking(&self) {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        if let Ok(flags) = fcntl(&self.uffd, FcntlArg::F_GETFL) {
            // It cannot fail on a descriptor that is open; if it did, the next turn would try again.
            let _ = fcntl(&self.uffd, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK));
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
