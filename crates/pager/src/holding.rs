//! A session that is held: faults are kept until somebody says how it goes on. Nobody gets poison, zeros or a signal meanwhile.
//!
//! Events are read as ever, so what the process does to its memory is followed: a page that it discards while it is held reads
//! zero afterwards. Nothing is installed and nothing is read: reads that are under way are given up, and what still comes of
//! them is thrown away, because it is bytes of the source that has failed. Faults are kept as they were read, by address, once
//! for each page and kind. However the session goes on (resumed, closed, poisoned), they are queued again and answered by that.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ahead::DeliverPopulated;
use crate::deferred::{Deferred, Wanted};
use crate::error::PagerError;
use crate::last_words;
use crate::notice::Notice;
use crate::owed::Owed;
use crate::pager::{Message, Pager};
use crate::policy::{EndReason, FailurePolicy, Hold, Rest, SessionEnd};
use crate::self_fault::sleeps_in_fault;
use crate::session::Session;
use crate::source::PageSource;
use crate::sweep::{Next, Phase};

/// Something that lives as long as a session.
pub type Backing = Arc<dyn Any + Send + Sync>;

/// Between attempts to read events that cannot be read (no descriptor is free for a forked child) while it is held.
pub(crate) const UNREADABLE_PAUSE: Duration = Duration::from_millis(50);

/// Looks at a thread that may wait for itself, and how often it has to be found asleep.
const LOOKS: u32 = 200;
const LOOK_PAUSE: Duration = Duration::from_millis(5);
const ASLEEP: u32 = 2;

/// What a session knows about being held.
#[derive(Debug, Default)]
pub(crate) struct Holding {
    /// Faults that are kept.
    pub(crate) faults: Deferred,
    /// It is held since nobody was told.
    pub(crate) news: bool,
    /// Something has happened to its memory that was not understood: nothing can be installed any more.
    pub(crate) lost_track: bool,
    /// The last attempt to read its events has failed.
    pub(crate) unreadable: bool,
    /// No descriptor is free: children that are forked cannot be served.
    pub(crate) crowded: bool,
    /// The thread without which a hold does not end, and the page of its last fault.
    owner: Option<(u32, Option<u64>)>,
    suspect: Option<Suspect>,
}

/// What speaks for the owner waiting for itself.
#[derive(Debug)]
struct Suspect {
    address: u64,
    looks: u32,
    asleep: u32,
    next: Instant,
}

impl Holding {
    pub(crate) fn of(owner: Option<u32>) -> Self {
        Self { owner: owner.map(|thread| (thread, None)), ..Self::default() }
    }

    /// Takes down where the owner waits.
    pub(crate) fn note(&mut self, thread: Option<u32>, address: u64) {
        if let Some((owner, place)) = &mut self.owner
            && thread == Some(*owner)
        {
            *place = Some(address);
        }
    }
}

impl Pager {
    /// Keeps a session's faults from now on, without an answer; nothing is brought. What its process does to its memory is
    /// followed all the same. `deliver` hears that it is so; or [`PagerError::SessionOver`].
    pub fn hold(&self, session: u64, deliver: DeliverPopulated) {
        self.mailbox.send(Message::Hold { id: session, answer: Owed::new(deliver) });
    }

    /// Goes on with a session that is held, from another source where one is given; every fault that was kept is answered.
    /// One that is not held goes on as it was, from the other source. Reads that were under way are made again, so a failure
    /// from before this holds it no more. `deliver` hears when it is so;
    /// [`PagerError::Protocol`] where the source is too short, or its process cannot be followed any more (it is held on);
    /// or [`PagerError::SessionOver`].
    pub fn resume(&self, session: u64, source: Option<Arc<dyn PageSource>>, deliver: DeliverPopulated) {
        self.mailbox.send(Message::Resume { id: session, source, answer: Owed::new(deliver) });
    }

    /// Answers [`Notice::Held`] that asks. An answer that comes too late is dropped.
    ///
    /// [`Notice::Held`]: crate::Notice::Held
    pub fn decide(&self, session: u64, policy: FailurePolicy) {
        self.mailbox.send(Message::Decide { id: session, policy });
    }
}

impl Session {
    /// Holds it because of a failure; the first is the one that is told.
    pub(crate) fn hold_for(&mut self, failure: SessionEnd, timeout: Option<Duration>, asks: bool) {
        let failed_before = matches!(&self.phase, Phase::Held(hold) if hold.failure.is_some());
        if !self.phase.answers() || failed_before {
            return;
        }
        let until = timeout.map(|timeout| Instant::now() + timeout);
        self.begin_hold(Hold { failure: Some(failure), until, asks });
    }

    /// Holds it because its owner wants that, for as long as it takes.
    pub(crate) fn hold(&mut self, mut answer: Owed<()>) {
        let failure = match &mut self.phase {
            Phase::Serving if self.info.filled.get().is_some() => None,
            Phase::Held(hold) => hold.failure.take(),
            _ => return answer.give(Err(PagerError::SessionOver)),
        };
        self.begin_hold(Hold { failure, until: None, asks: false });
        answer.give(Ok(()));
    }

    fn begin_hold(&mut self, hold: Hold) {
        self.phase = Phase::Held(hold);
        self.keep_ending();
        self.holding.news = true;
        self.give_up_reads();
        // Those that were put off are kept like all others.
        let deferred: Vec<Wanted> = self.deferred.take_all().collect();
        for wanted in deferred {
            self.keep_fault(wanted);
        }
    }

    /// What still comes of them finds nothing to fill.
    fn give_up_reads(&mut self) {
        if let Some(replaying) = self.replaying.as_deref_mut() {
            replaying.forget_reads();
        }
        for page in self.drop_reads() {
            match self.map.address_of(page) {
                Some(address) => self.keep_fault(Wanted::missing(address)),
                // Who waited for it was woken when it left.
                None => self.info.stats.unanswered.add(1),
            }
        }
    }

    /// Keeps a fault until it is known what becomes of it.
    pub(crate) fn keep_fault(&mut self, wanted: Wanted) {
        let page_size = self.map.page_size();
        if self.own
            && matches!(self.phase, Phase::Held(Hold { until: None, .. }))
            && let Some((_, Some(address))) = self.holding.owner
            && address & !(page_size - 1) == wanted.address
        {
            // It is told before it sleeps; and it may be another thread that waits here now.
            self.holding.suspect = Some(Suspect { address, looks: 0, asleep: 0, next: Instant::now() });
        }
        if !self.holding.faults.park(wanted, Instant::now()) {
            self.info.stats.joined.add(1);
        }
    }

    /// Queues what was kept, once it is held no more. What is to become zeros is the kernel's to answer.
    pub(crate) fn release_faults(&mut self) {
        let is_zeros = matches!(self.phase, Phase::Sweeping { rest: Rest::Zero, .. });
        if !self.phase.holds() && !is_zeros && self.holding.faults.len() > 0 {
            self.queue.extend(self.holding.faults.take_all());
        }
    }

    /// Goes on, from another source where one is given.
    pub(crate) fn resume(&mut self, source: Option<Arc<dyn PageSource>>, mut answer: Owed<()>) {
        answer.give(self.try_resume(source));
    }

    fn try_resume(&mut self, source: Option<Arc<dyn PageSource>>) -> Result<(), PagerError> {
        if !self.phase.serves() && !self.phase.holds() {
            return Err(PagerError::SessionOver);
        }
        if self.holding.lost_track {
            let why =
                "the session cannot go on: what its process did to its memory was not understood; close it";
            return Err(PagerError::Protocol(why.to_owned()));
        }
        if let Some(source) = &source {
            let ends = self.info.regions.iter().map(|region| region.source_offset.saturating_add(region.len));
            let (len, needed) = (source.size(), ends.max().unwrap_or_default());
            if len < needed {
                return Err(PagerError::Protocol(format!(
                    "the memory image has {len} bytes, the session needs {needed}"
                )));
            }
        }
        // What was asked before is asked again: neither are bytes of another source wanted, nor does a failure from before this hold
        // it once more. Who waits is answered by what is read from now on.
        self.give_up_reads();
        match source {
            Some(source) => self.source = source,
            None if self.phase.holds() => self.source.put_right(),
            None => {}
        }
        self.phase = Phase::Serving;
        self.keep_ending();
        self.holding.suspect = None;
        self.holding.news = false;
        self.elsewhere.forget();
        self.forget_rounds();
        Ok(())
    }

    /// The answer to what was asked.
    pub(crate) fn decide(&mut self, policy: FailurePolicy) {
        let Phase::Held(hold) = &mut self.phase else { return };
        if !hold.asks {
            return;
        }
        match policy {
            FailurePolicy::Hold { timeout } if self.info.filled.get().is_some() => {
                hold.asks = false;
                hold.until = timeout.map(|timeout| Instant::now() + timeout);
                self.holding.news = true;
            }
            policy => self.give_up_hold(policy.at_once()),
        }
    }

    /// It has been held for long enough.
    fn give_up_hold(&mut self, policy: FailurePolicy) {
        let Phase::Held(hold) = &mut self.phase else { return };
        let end = hold.failure.take().unwrap_or(SessionEnd { reason: EndReason::Closed, error: None });
        self.apply(end, policy);
    }

    /// Looks whether its time is up.
    pub(crate) fn step_held(&mut self, now: Instant) -> Next {
        let Phase::Held(hold) = &self.phase else { return Next::Now };
        match hold.until {
            Some(moment) if moment <= now => {
                self.give_up_hold(FailurePolicy::Poison);
                Next::Now
            }
            until => {
                let look = self.look_at_owner(now);
                let soonest = [until, look].into_iter().flatten().min();
                self.gather_dirty(now).unwrap_or_else(|| soonest.map_or(Next::Idle, Next::At))
            }
        }
    }

    /// Ends the program if the thread that alone could resume the session waits for it; when to look again.
    fn look_at_owner(&mut self, now: Instant) -> Option<Instant> {
        let (suspect, (owner, _)) = (self.holding.suspect.as_mut()?, self.holding.owner?);
        if now >= suspect.next {
            suspect.next = now + LOOK_PAUSE;
            suspect.looks += 1;
            suspect.asleep = if sleeps_in_fault(owner) { suspect.asleep + 1 } else { 0 };
            if suspect.asleep >= ASLEEP {
                last_words::held_for_ever(suspect.address);
            }
            if suspect.looks >= LOOKS {
                self.holding.suspect = None;
                return None;
            }
        }
        Some(suspect.next)
    }

    /// What is to be told about it.
    pub(crate) fn take_news(&mut self) -> Option<Notice> {
        if !std::mem::take(&mut self.holding.news) {
            return None;
        }
        let Phase::Held(hold) = &self.phase else { return None };
        Some(Notice::Held { id: self.info.id, peer: self.info.peer, hold: hold.clone() })
    }
}
