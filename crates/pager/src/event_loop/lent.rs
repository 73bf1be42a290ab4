//! What the event loop has once and lends to one session after the other.

use std::os::fd::{BorrowedFd, OwnedFd};

use uffd::EventBuffer;

use crate::in_two::InTwo;
use crate::session::{Context, Session};
use crate::staging::Staging;
use crate::workers::{Deliver, Workers};

/// Messages per read(2). One faulting thread needs one; many threads overlap.
const MESSAGES_PER_READ: usize = 64;
/// The same where there are other sessions: reading a removal wakes a thread, which takes 2 us.
const FEW_MESSAGES: usize = 8;
/// The largest window, and a huge page.
const STAGING: usize = 2 << 20;

pub(super) struct Lent {
    events: EventBuffer,
    few_events: EventBuffer,
    staging: Staging,
    pub(super) in_two: InTwo,
    workers: Workers,
    /// Sessions of children that were forked, and of which session, until they are taken over.
    pub(super) forked: Vec<(u64, Session)>,
    /// Open for nothing but to be closed where none is free, so that who has forked goes on.
    spare: Option<OwnedFd>,
}

impl Lent {
    /// Reads that can block are made by up to `workers` threads.
    pub(super) fn new(workers: usize, deliver: Deliver) -> Self {
        Self {
            events: EventBuffer::new(MESSAGES_PER_READ),
            few_events: EventBuffer::new(FEW_MESSAGES),
            staging: Staging::new(STAGING),
            in_two: InTwo::new(),
            workers: Workers::new(workers, deliver),
            forked: Vec::new(),
            spare: None,
        }
    }

    /// Makes sure of a spare descriptor, where one can be had.
    pub(super) fn keep_spare(&mut self, any: BorrowedFd<'_>) {
        if self.spare.is_none() {
            self.spare = any.try_clone_to_owned().ok();
        }
    }

    /// For a session that is the only one, or not.
    pub(super) fn context(&mut self, alone: bool) -> Context<'_> {
        Context {
            events: if alone { &mut self.events } else { &mut self.few_events },
            staging: self.staging.bytes(),
            in_two: &mut self.in_two,
            workers: &self.workers,
            alone,
            forked: &mut self.forked,
            spare: &mut self.spare,
        }
    }
}
