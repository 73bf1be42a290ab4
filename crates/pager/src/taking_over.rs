//! A session that is kept, and one that is taken over: its record, the ring its messages are read into, and what was left there.

use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use uffd::{AdoptError, Event, EventBuffer, Features, Left, UffdError, Userfaultfd, left_in};

use crate::error::PagerError;
use crate::keep::{Keeper, KeptDescriptors, KeptSession};
use crate::left::LeftTable;
use crate::policy::{EndReason, Rest, SessionEnd};
use crate::record::{Applied, Course, Ending, Record, damaged};
use crate::session::Session;
use crate::sweep::Phase;

/// Where memory of a process can begin, for waking whoever waits at any address of it.
const LOWEST_ADDRESS: u64 = 1 << 20;

/// A session's record while it is being served.
pub(crate) struct Keeping {
    record: Record,
    /// `None` while it is being read into.
    ring: Option<EventBuffer>,
    /// Of the read under way: the message that is being dealt with, counted from 1.
    message: u64,
    /// What was put down last.
    ending: Option<Ending>,
    keeper: Option<Arc<dyn Keeper>>,
    server: Option<u64>,
}

/// What a session is taken over with.
pub(crate) struct TakingOver {
    record: Option<(Record, Applied)>,
    /// What is left of the table that its ring is of.
    table: LeftTable,
    /// Put it through its failure policy, for this reason.
    pub(crate) failing: Option<PagerError>,
    /// Nobody knows where all of its memory is.
    scattered: Option<PagerError>,
}

impl TakingOver {
    pub(crate) fn new(record: Record, applied: Applied, table: LeftTable) -> Self {
        Self { record: Some((record, applied)), table, failing: None, scattered: None }
    }

    /// Of what can only be failed.
    pub(crate) fn without_record(uffd: &Userfaultfd, why: PagerError) -> Self {
        // Without these events, memory that is moved is not registered any more: then it is where it was, or nobody's.
        let moves = uffd.enabled_features().is_none_or(|features| features.intersects(Features::EVENT_REMAP));
        Self { record: None, table: LeftTable::default(), failing: None, scattered: moves.then_some(why) }
    }
}

impl Keeping {
    pub(crate) fn keeper(&self) -> Option<&Arc<dyn Keeper>> {
        self.keeper.as_ref()
    }

    /// The ring, for reads of at most `most` messages; to be given back.
    pub(crate) fn lend_ring(&mut self, most: usize) -> Option<EventBuffer> {
        let mut ring = self.ring.take()?;
        ring.limit(most);
        Some(ring)
    }

    pub(crate) fn give_back(&mut self, ring: EventBuffer) {
        self.ring = Some(ring);
    }

    /// A read begins: the messages of the one before it are finished with.
    pub(crate) fn begin_read(&mut self) {
        self.record.begin_read();
        self.message = 0;
    }

    /// The next message of the read is dealt with from now on.
    pub(crate) fn next_message(&mut self) {
        self.message += 1;
    }

    fn applied(&self) -> Applied {
        Applied { read: self.record.reads(), messages: self.message }
    }
}

impl Record {
    /// Makes sure that what was left in the ring can be what the kernel says.
    ///
    /// # Errors
    ///
    /// [`PagerError::Record`] names the message that cannot.
    pub(crate) fn check_ring(&self) -> Result<(), PagerError> {
        let possible = |start: u64, end: u64| start < end && end <= 1 << 57;
        for (position, left) in left_in(&self.ring()?) {
            let fine = match left {
                Left::Event(Event::Remove { start, end } | Event::Unmap { start, end }) => {
                    possible(start, end)
                }
                // The map checks it.
                Left::Event(Event::Remap { .. } | Event::Fault(_)) | Left::Fork { .. } => true,
                Left::Event(Event::Fork { .. } | Event::Unknown { .. }) => false,
            };
            if !fine {
                return Err(damaged(format!("message {position} of its ring cannot be")));
            }
        }
        Ok(())
    }

    /// The descriptors of children that its ring names.
    ///
    /// # Errors
    ///
    /// [`PagerError::System`] when it cannot be read.
    pub(crate) fn forks(&self) -> Result<Vec<i32>, PagerError> {
        let ring = self.ring()?;
        let forks = left_in(&ring).filter_map(|(_, left)| match left {
            Left::Fork { fd } => Some(fd),
            Left::Event(_) => None,
        });
        Ok(forks.collect())
    }
}

impl Session {
    /// Makes a record of the session and hands it to the keeper. Nothing has been answered so far.
    ///
    /// # Errors
    ///
    /// Why it cannot be kept.
    pub(crate) fn keep(&mut self, keeper: &Arc<dyn Keeper>, server: Option<u64>) -> Result<(), PagerError> {
        if self.brings_to_file() {
            return Err(PagerError::Unsupported(
                "a session of minor faults cannot be kept for a successor: what it has brought to its memfd could be brought \
                 again over what was written since"
                    .to_owned(),
            ));
        }
        let record = Record::create(self.info.id, &self.map, self.tracking.is_some())?;
        let mut states = record.states()?;
        states.adopt(&self.states);
        if let Some(tracking) = self.tracking.as_mut() {
            tracking.move_to(record.written()?);
        }
        if let Some(info) = Arc::get_mut(&mut self.info) {
            let stats = record.stats()?;
            stats.adopt(&info.stats);
            info.stats = stats;
        }
        self.states = states;
        self.attach(record, Some(keeper), server)?;
        self.keep_ending();
        let Some(kept) = &self.kept else { return Ok(()) };
        let fd =
            kept.record.fd().ok_or(PagerError::System { syscall: "memfd_create", errno: Errno::EBADF })?;
        let kept_by = keeper.keep(&self.described(server), self.descriptors(fd));
        if kept_by.is_err() {
            self.kept = None;
        }
        kept_by
    }

    fn attach(
        &mut self,
        record: Record,
        keeper: Option<&Arc<dyn Keeper>>,
        server: Option<u64>,
    ) -> Result<(), PagerError> {
        let ring = Some(EventBuffer::in_words(record.ring()?));
        let keeper = keeper.map(Arc::clone);
        self.kept = Some(Box::new(Keeping { record, ring, message: 0, ending: None, keeper, server }));
        Ok(())
    }

    fn described(&self, server: Option<u64>) -> KeptSession {
        let info = &self.info;
        KeptSession {
            id: info.id,
            label: info.label.clone(),
            server,
            parent: info.parent,
            peer: info.peer,
            regions: info.regions.clone(),
            page_size: info.page_size,
            policy: self.policy,
            window: self.window_bytes,
            fill: self.fill_options,
            source_timeout: self.source_timeout,
            write_protect: self.tracking.is_some(),
        }
    }

    fn descriptors<'a>(&'a self, record: std::os::fd::BorrowedFd<'a>) -> KeptDescriptors<'a> {
        use std::os::fd::AsFd;
        KeptDescriptors {
            uffd: self.uffd.as_fd(),
            record,
            process: self.process.as_ref().map(AsFd::as_fd),
            connection: self.connection.as_ref().map(AsFd::as_fd),
        }
    }

    /// Keeps the session of a child that was forked, before the message that told of it is finished with.
    pub(crate) fn keep_child(&self, child: &mut Self) {
        let Some(kept) = &self.kept else { return };
        let Some(keeper) = kept.keeper() else { return };
        if let Err(error) = child.keep(keeper, kept.server) {
            child.fail(EndReason::PagerLost, error);
        }
    }

    /// Puts down that memory was moved, or is gone.
    ///
    /// # Errors
    ///
    /// When there is no room for so many pieces.
    pub(crate) fn keep_map(&self) -> Result<(), PagerError> {
        let Some(kept) = &self.kept else { return Ok(()) };
        kept.record.publish_map(&self.map, kept.applied())
    }

    /// Puts down that the session is ending or held, or is not any more.
    pub(crate) fn keep_ending(&mut self) {
        let Some(kept) = self.kept.as_deref_mut() else { return };
        if kept.ending.is_none() && self.phase.serves() {
            return;
        }
        let ending = Ending::of(&self.phase, self.holding.lost_track);
        if kept.ending != ending {
            kept.record.put_ending(ending.as_ref());
            kept.ending = ending;
        }
    }

    /// Goes on where another process was killed: what it had read is applied, then whoever waits faults again.
    ///
    /// # Errors
    ///
    /// What makes it impossible after all. The session has to fail then.
    pub(crate) fn take_over(
        &mut self,
        taking_over: TakingOver,
        keeper: Option<&Arc<dyn Keeper>>,
        server: Option<u64>,
        forked: &mut Vec<(u64, Self)>,
    ) -> Result<(), PagerError> {
        let mut table = taking_over.table;
        let Some((record, applied)) = taking_over.record else {
            if let Some(error) = taking_over.scattered {
                self.phase = Phase::sweep(
                    Rest::Poison,
                    SessionEnd { reason: EndReason::PagerLost, error: Some(error) },
                );
                self.phase.cannot_poison(self.process.as_ref());
            }
            return Ok(());
        };
        let read = record.reads();
        let ring = record.ring()?;
        self.states = record.states()?;
        // What the map does not have is nobody's to bring: it says so itself, unless it is damaged in a way that cannot be seen.
        let nowhere: Vec<Range<usize>> = self.map.nowhere().collect();
        nowhere.into_iter().for_each(|pages| self.states.set_gone(pages));
        let times = record.count_take_over();
        let mut lost = 0;
        if let Some(info) = Arc::get_mut(&mut self.info) {
            info.stats = record.stats()?;
            info.stats.drop_unfinished();
            info.taken_over = times;
        }
        if let Some(replaying) = self.replaying.as_deref_mut() {
            replaying.go_on(&self.info.stats);
        }
        let ending = record.ending();
        self.attach(record, keeper, server)?;
        if let Some(ending) = ending {
            if let Course::Held { lost_track, .. } = ending.course {
                self.holding.lost_track = lost_track;
                self.holding.news = true;
            }
            if let Some(kept) = self.kept.as_deref_mut() {
                kept.ending = Some(ending.clone());
            }
            self.phase = ending.into_phase();
        }
        let mut outcome = Ok(());
        for (position, left) in left_in(&ring) {
            let message = position as u64 + 1;
            let in_map = applied.read == read && message <= applied.messages;
            if let Some(kept) = self.kept.as_deref_mut() {
                kept.message = message;
            }
            match left {
                Left::Fork { fd } => match table.take(fd) {
                    // Nothing was installed since: the process that read of it has done no more.
                    Some(Ok(child)) => outcome = outcome.and(self.note(Event::Fork { child }, forked)),
                    // It has exited; or else it was kept, or poisoned, before the message could be marked.
                    Some(Err(AdoptError::ProcessGone)) => {}
                    None if table.whole => {}
                    Some(Err(_)) | None => lost += 1,
                },
                // Who waits for it comes again.
                Left::Event(Event::Fault(_)) => {}
                Left::Event(Event::Unmap { .. } | Event::Remap { .. }) if in_map => {}
                Left::Event(event) => outcome = outcome.and(self.note(event, forked)),
            }
            EventBuffer::finish_left(&ring, position);
        }
        if let Some(kept) = &self.kept {
            kept.record.take_ring();
        }
        if let Some(info) = Arc::get_mut(&mut self.info) {
            info.lost_children = lost;
        }
        outcome
    }

    /// Wakes every thread that waits for this memory, wherever that is: those whose faults were read and not answered would
    /// never be heard of again.
    pub(crate) fn wake_everybody(&self) {
        let wake = |addresses: Range<u64>| self.uffd.wake(addresses.start, addresses.end - addresses.start);
        for (addresses, _) in self.map.memory() {
            // An error would say that no process can have such addresses.
            let _ = wake(addresses);
        }
        // A mapping may have grown, which nothing tells before a fault does. How far addresses go depends on the machine.
        let page = self.map.page_size();
        for bits in (38..=56).rev() {
            match wake(LOWEST_ADDRESS..(1 << bits) - page) {
                Err(UffdError::System { errno: Errno::EINVAL, .. }) => {}
                _ => return,
            }
        }
    }
}
