//! Following the served process: what its events mean for the session, and what is done about faults at addresses that
//! its pages have left.
//!
//! | the process | what follows |
//! | --- | --- |
//! | discards pages (REMOVE) | they read zero for ever |
//! | unmaps (UNMAP) | the pages leave the session: nothing is ever installed there again |
//! | moves (REMAP) | the pages keep state and source at their new address; the old place, until it is unmapped, reads zero |
//! | forks (FORK) | the child is a session of its own, which begins with its parent's pages as they are. From then on they are followed apart: of shared memory, a page that one has discarded and the other never had would come from the source again |
//! | grows a mapping (no event) | the new part reads zero |
//!
//! Faults are kept by address until they are answered: the kernel hands them out before events that are older, so that
//! only after all events were read it is known which page is meant. Who sleeps at an address whose page has left is woken
//! when that is read, because the kernel does not do it.

use std::collections::HashMap;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use nix::errno::Errno;
use uffd::{ContinueOptions, CopyOptions, Event, UffdError, Userfaultfd};

use crate::address_map::Place;
use crate::deferred::{Kind, Wanted};
use crate::error::PagerError;
use crate::fill::FillOptions;
use crate::pager::next_id;
use crate::policy::EndReason;
use crate::resolve::Stop;
use crate::session::{Context, Parts, Session};
use crate::source;
use crate::supervise::Peer;
use crate::trace::{WorkingSet, recording};
use crate::tracking::Tracking;

/// How often a thread may fault at an address where nothing helps, while the memory stays as it is.
const MOST_ROUNDS: u32 = 8;
/// Such addresses that are counted at one time.
const MOST_COUNTED: usize = 64;

/// Faults at addresses where nothing could be done but to wake, since the memory last changed.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    /// By address: how many batches had such a fault, and the last of them. Many threads can wait for one page.
    rounds: HashMap<u64, (u32, u64)>,
    pub(crate) batch: u64,
}

impl Elsewhere {
    pub(crate) fn forget(&mut self) {
        self.rounds.clear();
    }

    /// Takes note of one; whether that is one too often.
    fn again(&mut self, address: u64) -> bool {
        if self.rounds.len() >= MOST_COUNTED {
            self.rounds.clear();
        }
        let (rounds, last) = self.rounds.entry(address).or_insert((0, 0));
        if *last != self.batch {
            *rounds += 1;
            *last = self.batch;
        }
        *rounds > MOST_ROUNDS
    }
}

impl Session {
    /// Takes one event down: faults to be answered later, everything else at once.
    pub(crate) fn note(&mut self, event: Event, forked: &mut Vec<(u64, Self)>) -> Result<(), PagerError> {
        match event {
            Event::Fault(fault) => {
                self.info.stats.faults.add(1);
                if self.own
                    && fault.thread_id.is_some()
                    && fault.thread_id == source::answered_by(&*self.source)
                    && let Some(Place::Page(page)) = self.map.place_of(fault.address)
                {
                    self.self_fault = Some((page, fault.address));
                }
                self.holding.note(fault.thread_id, fault.address);
                let address = fault.address & !(self.map.page_size() - 1);
                self.queue.push_back(Wanted {
                    address,
                    kind: Kind::from(fault.kind),
                    write: fault.write,
                    read: Some(self.watch.last()),
                });
                Ok(())
            }
            Event::Remove { start, end } => {
                for pages in self.map.pages_of(start, end) {
                    self.info.stats.pages_removed.add(pages.len() as u64);
                    if let Some(tracking) = self.tracking.as_mut() {
                        tracking.discarded(pages.clone());
                    }
                    self.states.set_removed(pages);
                }
                Ok(())
            }
            Event::Unmap { start, end } => {
                let (gone, outcome) = self.map.unmap(start, end);
                let kept = self.left(start..end, gone);
                let followed = self.followed(outcome);
                kept.and(followed)
            }
            Event::Remap { from, to, len } => {
                let (gone, outcome) = self.map.remap(from, to, len);
                let kept = self.left(from..from.saturating_add(len), gone);
                let followed = self.followed(outcome);
                kept.and(followed)
            }
            Event::Fork { child } => {
                if self.phase.answers() {
                    let mut child = self.child(child);
                    self.keep_child(&mut child);
                    if self.holding.crowded {
                        child.fail(EndReason::Exhausted, crowded());
                    }
                    forked.push((self.info.id, child));
                } else {
                    // There is no more to be done to it: its parent is being killed.
                    self.poison_copy(&child);
                }
                Ok(())
            }
            Event::Unknown { event } => {
                self.holding.lost_track = true;
                Err(PagerError::Protocol(format!("the kernel sent an event of unknown kind {event:#x}")))
            }
        }
    }

    /// Where a change of the address space made no sense, nothing is known of it any more.
    fn followed(&mut self, outcome: Result<(), PagerError>) -> Result<(), PagerError> {
        self.holding.lost_track |= matches!(outcome, Err(PagerError::Protocol(_)));
        outcome
    }

    /// Pages have left `addresses`; those in `gone` are mapped nowhere any more.
    fn left(&mut self, addresses: Range<u64>, gone: Vec<Range<usize>>) -> Result<(), PagerError> {
        for pages in gone {
            self.states.set_gone(pages);
        }
        let kept = self.keep_map();
        self.elsewhere.rounds.clear();
        if !addresses.is_empty() {
            // Who sleeps there would sleep for ever. An error would say that no process can have such addresses.
            let _ = self.uffd.wake(addresses.start, addresses.end - addresses.start);
        }
        kept
    }

    /// The session of a forked child, whose memory is its parent's at this very moment: no page was installed since the
    /// kernel copied it, because the kernel allows none until this event was read.
    fn child(&self, uffd: Userfaultfd) -> Self {
        let Peer { uid, gid, .. } = self.info.peer;
        let parts = Parts {
            id: next_id(),
            label: self.info.label.clone(),
            uffd,
            map: self.map.clone(),
            source: Arc::clone(&self.source),
            policy: self.policy,
            owner: None,
            backing: None,
            window: self.window_bytes,
            fill: FillOptions::default(),
            source_timeout: self.source_timeout,
            peer: Peer { pid: 0, uid, gid },
            process: None,
            parent: Some(self.info.id),
            minor: None,
            tracking: self.tracking.as_ref().map(Tracking::of_child),
            all_there: false,
            own: false,
            connection: None,
            working_set: WorkingSet::default(),
        };
        let mut child = Self::of_parts(parts, self.huge);
        child.states = self.states.clone();
        child.phase = self.phase.of_child();
        child.holding.news = child.phase.holds();
        if self.brings_to_file() {
            // Each would overwrite what the other has written to pages it has not brought itself.
            let error = PagerError::Unsupported(
                "the served process forked, and its memory is brought by writing to its memfd: one session can do that, so \
                 what the child misses is poisoned"
                    .to_owned(),
            );
            child.fail(EndReason::Protocol, error);
        }
        child
    }

    /// A forked child must not read zeros where its parent's memory was still missing.
    fn poison_copy(&self, child: &Userfaultfd) {
        let mut from = 0;
        while let Some(run) = self.states.next_missing(from, self.map.pages()) {
            from = run.end;
            let run = self.map.clip(run);
            from = from.min(run.end);
            if let Some(address) = self.map.address_of(run.start) {
                let len = self.map.bytes(run.len());
                if self.tracking.is_some() {
                    // A mark of protection is in the way of one of poison.
                    let _ = child.write_protect(address, len, false, false);
                }
                // A child that is gone, or a kernel that cannot poison: there is no more that could be done to it.
                let _ = child.poison(address, len, true);
            }
        }
    }

    /// Answers, or takes charge of, one fault, wherever it is by now.
    pub(crate) fn answer(&mut self, wanted: Wanted, cx: &mut Context<'_>) {
        if !self.phase.answers() {
            // Its process is being killed, or is gone.
            self.info.stats.unanswered.add(1);
            return;
        }
        if self.phase.holds() {
            return self.keep_fault(wanted);
        }
        let place = self.map.place_of(wanted.address);
        if let (Some(recorder), Some(Place::Page(page))) = (recording(&mut self.recorder), place) {
            recorder.begin(page, &wanted);
        }
        match (wanted.kind, place) {
            (Kind::WriteProtect, _) => self.answer_protected(wanted),
            (Kind::Missing, Some(Place::Page(page))) => self.answer_missing(page, wanted, cx),
            (Kind::Minor, Some(Place::Page(page))) => self.answer_minor(page, wanted, cx),
            (Kind::Missing, Some(Place::Zeros)) => self.answer_with_zeros(wanted),
            (Kind::Minor, Some(Place::Zeros)) => self.continue_at(wanted),
            (_, None) => self.answer_stray(wanted),
        }
    }

    /// A fault in memory that has no source.
    fn answer_with_zeros(&mut self, wanted: Wanted) {
        let page_size = self.map.page_size();
        let filled = if self.huge {
            self.uffd.zero_huge(wanted.address, page_size, page_size as usize, true)
        } else {
            self.uffd.zero(wanted.address, page_size, true)
        };
        match filled {
            Ok(()) => {
                self.info.stats.faults_zeroed.add(1);
                self.info.stats.pages_zeroed.add(1);
                self.deferred.progressed();
                self.elsewhere.rounds.remove(&wanted.address);
            }
            Err(UffdError::Changing | UffdError::PartiallyCopied { .. }) => {
                self.put_off(wanted, Stop::Changing(0));
            }
            Err(UffdError::UffdClosed) => self.stopped(Stop::Gone),
            // Another thread's fault brought it. Of huge pages the kernel says so too when it has none left.
            Err(UffdError::PageExist) if !self.huge => {
                self.info.stats.already_present.add(1);
                let _ = self.uffd.wake(wanted.address, page_size);
            }
            Err(UffdError::PageExist | UffdError::NotRegistered) => self.wake_only(wanted),
            Err(cause) => {
                let stop = self.refused(wanted.address, cause);
                self.put_off(wanted, stop);
            }
        }
    }

    /// Maps a page that the page cache has.
    pub(crate) fn continue_at(&mut self, wanted: Wanted) {
        let page_size = self.map.page_size();
        let options =
            ContinueOptions { write_protect: self.tracking.is_some(), ..ContinueOptions::default() };
        match self.uffd.continue_pages(wanted.address, page_size, options) {
            Ok(()) => {
                self.info.stats.faults_installed.add(1);
                self.deferred.progressed();
                if let Some(page) = self.map.page_of(wanted.address) {
                    self.record_alone(page, Kind::Minor);
                }
            }
            Err(UffdError::Changing | UffdError::PartiallyCopied { .. }) => {
                self.put_off(wanted, Stop::Changing(0));
            }
            Err(UffdError::UffdClosed) => self.stopped(Stop::Gone),
            // Mapped by now, or taken out of the cache: then it faults again, as a missing page.
            Err(UffdError::PageExist | UffdError::System { errno: Errno::EFAULT, .. }) => {
                self.info.stats.already_present.add(1);
                // As above.
                let _ = self.uffd.wake(wanted.address, page_size);
            }
            Err(UffdError::NotRegistered) => self.wake_only(wanted),
            Err(cause) => {
                let stop = self.refused(wanted.address, cause);
                self.put_off(wanted, stop);
            }
        }
    }

    /// What follows when the kernel refuses something for one page.
    pub(crate) fn refused(&self, address: u64, cause: UffdError) -> Stop {
        let reason = match cause.errno() {
            Some(libc::ENOMEM) => EndReason::Exhausted,
            _ => EndReason::Protocol,
        };
        Stop::Failed(reason, PagerError::Kernel { address, len: self.map.page_size(), cause })
    }

    /// A fault outside the session's memory: it left before the fault was answered, or a mapping has grown.
    fn answer_stray(&mut self, wanted: Wanted) {
        match self.has_grown_to(wanted.address) {
            Ok(Some(end)) => {
                let grown = self.map.grow(end, wanted.address + self.map.page_size());
                if let Err(error) = grown.and(self.keep_map()) {
                    self.fail(reason_of(&error), error);
                }
                match wanted.kind {
                    Kind::Minor => self.continue_at(wanted),
                    _ => self.answer_with_zeros(wanted),
                }
            }
            Ok(None) => self.wake_only(wanted),
            Err(stop) => self.put_off(wanted, stop),
        }
    }

    /// Nothing is to be installed, but a thread may sleep there. If it comes back again and again, it touches memory that
    /// is registered and that nobody answers for.
    pub(crate) fn wake_only(&mut self, wanted: Wanted) {
        let page_size = self.map.page_size();
        self.info.stats.unanswered.add(1);
        // As above: the address came from the kernel.
        let _ = self.uffd.wake(wanted.address, page_size);
        if !self.elsewhere.again(wanted.address) {
            return;
        }
        self.fail(
            EndReason::Protocol,
            PagerError::Protocol(format!(
                "a thread waits for {:#x}, which is registered but no memory of this session: hand over every range that \
                 is registered, or register it with a userfaultfd of its own",
                wanted.address
            )),
        );
        if self.phase.holds() {
            return self.keep_fault(wanted);
        }
        // Never zeros: what belongs there is not known. Where it cannot be poisoned, closing is all that is left.
        let _ = self.uffd.poison(wanted.address, page_size, true);
    }

    /// Where the memory of the session ends that goes on to `address` in one mapping, if it does. A mapping that grows in
    /// place sends no event, and its new part is registered like the old.
    fn has_grown_to(&self, address: u64) -> Result<Option<u64>, Stop> {
        let page_size = self.map.page_size();
        let Some(end) = self.map.end_below(address) else { return Ok(None) };
        let Some(last) = end.checked_sub(page_size) else { return Ok(None) };
        let len = (address + page_size - last) as usize;
        // The kernel first looks whether the range lies in one mapping, and then finds nothing to copy from.
        // SAFETY: nothing is mapped at address 0, so nothing is read, and nothing is installed.
        let probed = unsafe {
            self.uffd.copy(last, ptr::null(), len, CopyOptions { wake: false, ..CopyOptions::default() })
        };
        match probed {
            Err(UffdError::PageExist | UffdError::System { errno: Errno::EFAULT, .. }) => Ok(Some(end)),
            Err(UffdError::Changing) => Err(Stop::Changing(0)),
            Err(UffdError::UffdClosed) => Err(Stop::Gone),
            _ => Ok(None),
        }
    }

    /// Wakes who waits for pages of shared memory at its other addresses.
    pub(crate) fn wake_other_places(&self, pages: Range<usize>) {
        for place in self.map.other_places_of(pages) {
            // As above: the addresses came from the kernel.
            let _ = self.uffd.wake(place.start, place.end - place.start);
        }
    }
}

/// Why reading events failed.
pub(crate) fn unreadable(cause: UffdError) -> (EndReason, PagerError) {
    match cause.errno() {
        Some(libc::EMFILE | libc::ENFILE) => (EndReason::Exhausted, crowded()),
        _ => (EndReason::Protocol, PagerError::Kernel { address: 0, len: 0, cause }),
    }
}

pub(crate) fn is_short_of_descriptors(cause: &UffdError) -> bool {
    matches!(cause.errno(), Some(libc::EMFILE | libc::ENFILE))
}

fn crowded() -> PagerError {
    let what =
        "no descriptor is free for the memory of a forked child (RLIMIT_NOFILE): what it misses is poisoned";
    PagerError::Exhausted(what.to_owned())
}

pub(crate) fn reason_of(error: &PagerError) -> EndReason {
    match error {
        PagerError::Exhausted(_) => EndReason::Exhausted,
        _ => EndReason::Protocol,
    }
}
