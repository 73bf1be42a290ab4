//! What becomes of a fault that could not be answered, and of its session: the failure policy.

use std::time::Instant;

use crate::deferred::Wanted;
use crate::error::PagerError;
use crate::last_words;
use crate::policy::{EndReason, FailurePolicy, SessionEnd};
use crate::resolve::Stop;
use crate::session::Session;
use crate::sweep::Phase;

impl Session {
    /// What becomes of the fault on `page` after an attempt to answer it.
    pub(crate) fn settle(&mut self, page: usize, wanted: Wanted, outcome: Result<(), Stop>) {
        match outcome {
            Ok(()) => {}
            Err(stop) if self.was_answered(page) => self.stopped(stop),
            Err(stop) => self.put_off(wanted, stop),
        }
    }

    /// The fault could not be answered now. Whatever happens to the session, it still waits.
    pub(crate) fn put_off(&mut self, wanted: Wanted, stop: Stop) {
        if matches!(stop, Stop::Changing(_)) {
            self.info.stats.deferred.add(1);
        }
        if !self.deferred.park(wanted, Instant::now()) {
            self.info.stats.joined.add(1);
        }
        self.stopped(stop);
    }

    /// Puts the session through its failure policy. The first failure is the one that is told.
    pub(crate) fn fail(&mut self, reason: EndReason, error: PagerError) {
        let end = SessionEnd { reason, error: Some(error) };
        match self.policy_for(&end) {
            FailurePolicy::Hold { timeout } => self.hold_for(end, timeout, false),
            FailurePolicy::Ask { timeout } => self.hold_for(end, Some(timeout), true),
            policy => self.apply(end, policy),
        }
    }

    /// Kills or poisons.
    pub(crate) fn apply(&mut self, end: SessionEnd, policy: FailurePolicy) {
        if self.own && matches!(self.phase, Phase::Serving | Phase::Held(_)) {
            if let Some(error) = &end.error {
                last_words::cannot_be_served(&self.map, error);
            }
            if policy == FailurePolicy::Kill {
                std::process::abort();
            }
        }
        self.phase.fail(end, policy, self.process.as_ref());
        // Before anything is answered by it: a successor is not to serve what was failed.
        self.keep_ending();
    }

    /// What a failure comes to now.
    pub(crate) fn policy_for(&self, end: &SessionEnd) -> FailurePolicy {
        let nobody = end.reason == EndReason::PagerLost || matches!(self.phase, Phase::Sweeping { .. });
        let unknown = self.info.filled.get().is_none();
        match self.policy {
            policy if nobody => policy.at_once(),
            FailurePolicy::Hold { .. } if unknown => FailurePolicy::Poison,
            policy => policy,
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

/// The memory's own file could not be written to.
pub(crate) fn unwritable(error: PagerError) -> Stop {
    let reason = match error.errno() {
        Some(libc::ENOSPC | libc::ENOMEM) => EndReason::Exhausted,
        _ => EndReason::Protocol,
    };
    Stop::Failed(reason, error)
}
