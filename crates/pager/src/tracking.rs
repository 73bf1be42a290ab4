//! Write tracking: which pages were written to since it was last asked.
//!
//! A page is protected or dirty (or both, for a moment), never neither: the bit is set before the protection is taken off,
//! and the protection is put on before the page is reported clean. Who reads the memory after the answer therefore sees
//! every write that the answer stands for, and a write that comes later is in the next one. A page that was discarded
//! counts as written to, in two answers. Bits are set and cleared on the event loop's thread only.

use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use uffd::UffdError;

use crate::address_map::Place;
use crate::deferred::{Kind, Wanted};
use crate::error::PagerError;
use crate::owed::{Deliver, Owed};
use crate::page_state::PageBits;
use crate::resolve::Stop;
use crate::session::{CHANGING_PAUSE, Session};
use crate::sweep::Next;

/// Ranges protected in one step, between which everything else has its turn.
const RANGES_PER_STEP: usize = 64;
/// Pages protected in one step: a fraction of a millisecond.
const PAGES_PER_STEP: usize = 4096;

/// Memory that was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyRange {
    /// Where it is now.
    pub address: u64,
    /// Bytes, whole pages.
    pub len: u64,
    /// Where its first byte belongs in the source; `None` for memory that has none there: grown, or left behind by a
    /// move. Such memory is not tracked and always reported.
    pub source_offset: Option<u64>,
}

/// What was written to since the last time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// Where, in the order of the source's pages; then what has no source.
    pub ranges: Vec<DirtyRange>,
    /// There were more than were asked for. The next call goes on behind them.
    pub more: bool,
}

/// Takes the answer. Called on the event loop's thread: it must return at once.
pub type DeliverDirty = Deliver<DirtyPages>;

/// An answer that is on its way. Dropping it loses what it would have told.
#[derive(Debug)]
pub struct DirtyReply(Receiver<Result<DirtyPages, PagerError>>);

impl DirtyReply {
    /// A reply, and how it is delivered.
    pub(crate) fn new() -> (Self, DeliverDirty) {
        let (sender, receiver) = sync_channel(1);
        // There is room for the one answer. Nobody may want it any more.
        (Self(receiver), Box::new(move |answer| drop(sender.try_send(answer))))
    }

    /// Waits for the answer.
    ///
    /// # Errors
    ///
    /// [`PagerError::SessionOver`] when the session is over, or never was; [`PagerError::Unsupported`] when it does not
    /// track writes; [`PagerError::Exhausted`] while another answer is on its way; [`PagerError::Kernel`] when protecting
    /// was refused, after which nothing is lost: the pages stay dirty; [`PagerError::Timeout`] when `timeout` passes.
    pub fn wait(self, timeout: Duration) -> Result<DirtyPages, PagerError> {
        match self.0.recv_timeout(timeout) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(PagerError::Timeout {
                what: "the dirty pages were not told",
                ms: timeout.as_millis() as u64,
            }),
            Err(RecvTimeoutError::Disconnected) => Err(PagerError::SessionOver),
        }
    }
}

/// What a session knows of writes.
pub(crate) struct Tracking {
    dirty: PageBits,
    /// Pages whose discarding was announced, by an event that comes before they go: they are reported once more.
    discarded: PageBits,
    /// Pages that the last answer has told of. If it never arrived, because this process was killed, a successor tells again.
    reported: PageBits,
    /// Where the last answer stopped.
    next: usize,
    taking: Option<Taking>,
    /// What a page of zeros is copied from.
    pub(crate) zeros: Vec<u8>,
}

/// An answer being gathered.
struct Taking {
    ranges: Vec<DirtyRange>,
    most: usize,
    /// Pages left to look at, in one round over all.
    left: usize,
    not_before: Option<Instant>,
    answer: Owed<DirtyPages>,
}

impl Tracking {
    pub(crate) fn new(pages: usize, page_size: u64) -> Self {
        // Zeroed by the allocator: not resident before it is needed.
        Self::in_record([(); 3].map(|()| PageBits::new(pages)), page_size)
    }

    /// With bitmaps that outlive this process: dirty, discarded, reported.
    pub(crate) fn in_record([dirty, discarded, reported]: [PageBits; 3], page_size: u64) -> Self {
        let mut tracking =
            Self { dirty, discarded, reported, next: 0, taking: None, zeros: vec![0; page_size as usize] };
        // Whether the last answer has arrived is not known.
        tracking.dirty.adopt(&tracking.reported);
        tracking.reported.clear_all();
        tracking
    }

    /// Goes on with other bitmaps, which are empty.
    pub(crate) fn move_to(&mut self, [mut dirty, mut discarded, mut reported]: [PageBits; 3]) {
        for (to, from) in
            [(&mut dirty, &self.dirty), (&mut discarded, &self.discarded), (&mut reported, &self.reported)]
        {
            to.adopt(from);
        }
        (self.dirty, self.discarded, self.reported) = (dirty, discarded, reported);
    }

    /// For a forked child, whose protection is its parent's.
    pub(crate) fn of_child(&self) -> Self {
        let [dirty, discarded, reported] =
            [&self.dirty, &self.discarded, &self.reported].map(PageBits::clone);
        Self { dirty, discarded, reported, next: 0, taking: None, zeros: vec![0; self.zeros.len()] }
    }

    /// Somebody is about to write to the pages.
    pub(crate) fn written(&mut self, pages: Range<usize>) {
        self.dirty.set(pages);
    }

    /// The pages are about to be discarded.
    pub(crate) fn discarded(&mut self, pages: Range<usize>) {
        self.dirty.set(pages.clone());
        self.discarded.set(pages);
    }

    /// The pages were reported, and are protected. Those that were discarded stay dirty once: the kernel announces it, and
    /// they may have gone only after this.
    fn reported(&mut self, pages: Range<usize>) {
        let mut from = pages.start;
        self.reported.set(pages.clone());
        self.dirty.clear(pages.clone());
        while let Some(run) = self.discarded.next_set(from..pages.end, usize::MAX) {
            from = run.end;
            self.dirty.set(run.clone());
            self.discarded.clear(run);
        }
    }
}

impl Session {
    /// A write to a protected page: it is recorded, then let through.
    pub(crate) fn answer_protected(&mut self, wanted: Wanted) {
        if let (Some(Place::Page(page)), Some(tracking)) =
            (self.map.place_of(wanted.address), self.tracking.as_mut())
        {
            tracking.written(page..page + 1);
        }
        match self.uffd.write_protect(wanted.address, self.map.page_size(), false, true) {
            Ok(()) => {
                self.info.stats.faults_unprotected.add(1);
                self.deferred.progressed();
                if let Some(page) = self.map.page_of(wanted.address) {
                    self.record_alone(page, Kind::WriteProtect);
                }
            }
            Err(UffdError::Changing | UffdError::PartiallyCopied { .. }) => {
                self.put_off(wanted, Stop::Changing(0))
            }
            Err(UffdError::UffdClosed) => self.stopped(Stop::Gone),
            // It left before this was answered.
            Err(UffdError::NotRegistered) => self.wake_only(wanted),
            Err(cause) => {
                let stop = self.refused(wanted.address, cause);
                self.put_off(wanted, stop);
            }
        }
    }

    /// Begins to gather what was written to.
    pub(crate) fn take_dirty(&mut self, most: usize, mut answer: Owed<DirtyPages>) {
        let refused = match &self.tracking {
            None => {
                PagerError::Unsupported("this session does not track writes (`write_protect`)".to_owned())
            }
            Some(tracking) if tracking.taking.is_some() => {
                PagerError::Exhausted("the dirty pages of this session are being taken already".to_owned())
            }
            Some(_) if !self.phase.serves() && !self.phase.holds() => PagerError::SessionOver,
            Some(_) => {
                let left = self.map.pages();
                let taking = Taking { ranges: Vec::new(), most: most.max(1), left, not_before: None, answer };
                if let Some(tracking) = self.tracking.as_mut() {
                    // Who asks again has had the answer before.
                    tracking.reported.clear_all();
                    tracking.taking = Some(taking);
                }
                return;
            }
        };
        answer.give(Err(refused));
    }

    /// Does the next piece of what an answer takes; `None` when none is wanted.
    pub(crate) fn gather_dirty(&mut self, now: Instant) -> Option<Next> {
        // Taken out while it is worked on; put back unless it is done.
        let mut tracking = self.tracking.take()?;
        let Some(mut taking) = tracking.taking.take() else {
            self.tracking = Some(tracking);
            return None;
        };
        let next = match taking.not_before {
            Some(moment) if moment > now => Some(Next::At(moment)),
            _ => self.gather(&mut tracking, &mut taking, now),
        };
        if next.is_some() {
            tracking.taking = Some(taking);
        }
        self.tracking = Some(tracking);
        next
    }

    /// `None` when the answer was given.
    fn gather(&mut self, tracking: &mut Tracking, taking: &mut Taking, now: Instant) -> Option<Next> {
        let (mut ranges, mut pages) = (0, 0);
        while ranges < RANGES_PER_STEP && pages < PAGES_PER_STEP {
            if taking.ranges.len() >= taking.most {
                self.answer_dirty(taking, true);
                return None;
            }
            let total = self.map.pages();
            let end = total.min(tracking.next.saturating_add(taking.left));
            let Some(run) = tracking.dirty.next_set(tracking.next..end, PAGES_PER_STEP) else {
                taking.left -= end - tracking.next;
                tracking.next = if end == total { 0 } else { end };
                if taking.left == 0 {
                    self.answer_dirty(taking, false);
                    return None;
                }
                continue;
            };
            let clipped = self.map.clip(run.clone());
            // Not mapped any more: there is nothing to tell of it.
            let run = if clipped.is_empty() { run.start..run.start + 1 } else { clipped.clone() };
            if !clipped.is_empty() {
                match self.protect_again(&clipped) {
                    Ok(()) => taking.push(self, &clipped),
                    Err(UffdError::Changing | UffdError::PartiallyCopied { .. }) => {
                        let moment = now + CHANGING_PAUSE;
                        taking.not_before = Some(moment);
                        return Some(Next::At(moment));
                    }
                    Err(UffdError::UffdClosed) => {
                        self.stopped(Stop::Gone);
                        taking.answer.give(Err(PagerError::SessionOver));
                        return None;
                    }
                    Err(cause) => {
                        let address = self.map.address_of(run.start).unwrap_or(0);
                        let len = self.map.bytes(run.len());
                        taking.answer.give(Err(PagerError::Kernel { address, len, cause }));
                        return None;
                    }
                }
            }
            tracking.reported(run.clone());
            taking.left -= run.end - tracking.next;
            tracking.next = run.end % total.max(1);
            ranges += 1;
            pages += run.len();
            if taking.left == 0 {
                self.answer_dirty(taking, false);
                return None;
            }
        }
        taking.not_before = None;
        Some(Next::Now)
    }

    /// Protects pages that lie together. Where they are more than one mapping the kernel stops in the middle: then one by
    /// one, and what is not registered for it cannot be written to unseen, because its UNMAP waits to be read.
    fn protect_again(&self, pages: &Range<usize>) -> Result<(), UffdError> {
        let Some(address) = self.map.address_of(pages.start) else { return Ok(()) };
        let outcome = self.uffd.write_protect(address, self.map.bytes(pages.len()), true, false);
        if outcome != Err(UffdError::NotRegistered) {
            return outcome;
        }
        for page in 0..pages.len() {
            match self.uffd.write_protect(address + self.map.bytes(page), self.map.page_size(), true, false) {
                Ok(()) | Err(UffdError::NotRegistered) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn answer_dirty(&self, taking: &mut Taking, more: bool) {
        let mut ranges = std::mem::take(&mut taking.ranges);
        if !more {
            let untracked = self.map.memory().filter(|(_, source)| source.is_none());
            ranges.extend(untracked.map(|(addresses, source_offset)| DirtyRange {
                address: addresses.start,
                len: addresses.end - addresses.start,
                source_offset,
            }));
        }
        taking.answer.give(Ok(DirtyPages { ranges, more }));
    }
}

impl Taking {
    fn push(&mut self, session: &Session, pages: &Range<usize>) {
        let Some(address) = session.map.address_of(pages.start) else { return };
        let source_offset = session.map.source_offset_of(pages.start);
        let len = session.map.bytes(pages.len());
        if let Some(last) = self.ranges.last_mut()
            && last.address + last.len == address
            && last.source_offset.map(|offset| offset + last.len) == source_offset
        {
            last.len += len;
        } else {
            self.ranges.push(DirtyRange { address, len, source_offset });
        }
    }
}
