//! How a session ends: never by just closing its uffd, because that would give zeros to whoever waits and to
//! every page still missing.
//!
//! What is missing is swept up first, in steps between which the event loop serves everybody else: poisoned, or
//! populated from the source. Then the regions are unregistered (removed pages read zero from the kernel from
//! then on, all others are present or poisoned), then the uffd is closed. A process that cannot be poisoned is
//! killed; if even that is impossible, the uffd stays open, so that its threads wait instead of reading zeros.

use std::time::{Duration, Instant};

use crate::policy::{EndReason, FailurePolicy, Hold, Rest, SessionEnd};
use crate::resolve::{Filling, Stop};
use crate::session::{CHANGING_PAUSE, Context, Session};
use crate::supervise::Supervised;

/// Pages poisoned in one step: a few milliseconds at most.
const POISON_STEP: usize = 4096;
/// How long a killed process may take to vanish before its session is reported all the same.
const DYING_DEADLINE: Duration = Duration::from_secs(5);

/// Where in its life a session is.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Faults are answered from the source.
    Serving,
    /// Faults are kept until somebody says how it goes on.
    Held(Hold),
    /// What is still missing is dealt with, page after page.
    Sweeping { rest: Rest, next: usize, not_before: Option<Instant>, end: SessionEnd },
    /// The process has been sent SIGKILL.
    Dying { end: SessionEnd, since: Instant },
    /// Nothing is left to do but to close the uffd, or, with `leave_open`, not even that.
    Over { end: SessionEnd, leave_open: bool },
}

/// When a session wants to be looked at again without an event of its own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// At once: there is more to sweep.
    Now,
    /// Not before this moment.
    At(Instant),
    /// Only when something happens.
    Idle,
}

impl Phase {
    /// Whether a fault on a missing page is poisoned instead of served.
    pub(crate) fn poisons(&self) -> bool {
        matches!(self, Self::Sweeping { rest: Rest::Poison, .. })
    }

    /// Whether nothing has ended or is ending yet.
    pub(crate) fn serves(&self) -> bool {
        matches!(self, Self::Serving)
    }

    /// Whether faults are kept.
    pub(crate) fn holds(&self) -> bool {
        matches!(self, Self::Held(_))
    }

    /// Whether faults are still answered at all, now or later.
    pub(crate) fn answers(&self) -> bool {
        matches!(self, Self::Serving | Self::Held(_) | Self::Sweeping { .. })
    }

    /// Starts to close on purpose. A session that is ending already goes on doing that.
    fn close(&mut self, rest: Rest) {
        let error = match self {
            Self::Serving => None,
            Self::Held(hold) => hold.failure.take().and_then(|failure| failure.error),
            _ => return,
        };
        *self = Self::sweep(rest, SessionEnd { reason: EndReason::Closed, error });
    }

    /// Kills or poisons, unless an earlier failure already did.
    pub(crate) fn fail(&mut self, end: SessionEnd, policy: FailurePolicy, process: Option<&Supervised>) {
        if !self.answers() || self.poisons() {
            return;
        }
        *self = match (policy, process) {
            (FailurePolicy::Kill, Some(process)) => match process.kill() {
                Ok(()) => Self::Dying { end, since: Instant::now() },
                // Not ours to kill, or gone: what is missing is poisoned, which a dead process will not mind.
                Err(_) => Self::sweep(Rest::Poison, end),
            },
            _ => Self::sweep(Rest::Poison, end),
        };
    }

    /// The kernel cannot poison: the process is killed, or at least never given zeros.
    pub(crate) fn cannot_poison(&mut self, process: Option<&Supervised>) {
        let Some(end) = self.take_end() else { return };
        *self = if process.is_some_and(|process| process.kill().is_ok()) {
            Self::Dying { end, since: Instant::now() }
        } else {
            Self::Over { end, leave_open: true }
        };
    }

    /// The process has exited. If that was not the plan, it is the reason.
    pub(crate) fn peer_gone(&mut self) {
        let error = match self {
            Self::Held(hold) => hold.failure.take().and_then(|failure| failure.error),
            _ => None,
        };
        let end = self.take_end().unwrap_or(SessionEnd { reason: EndReason::PeerExited, error });
        *self = Self::Over { end, leave_open: false };
    }

    /// What a child forked in this phase begins with: the same, from its first page on.
    pub(crate) fn of_child(&self) -> Self {
        match self {
            Self::Sweeping { rest, end, .. } => Self::sweep(*rest, end.clone()),
            Self::Held(hold) => Self::Held(hold.clone()),
            _ => Self::Serving,
        }
    }

    pub(crate) fn sweep(rest: Rest, end: SessionEnd) -> Self {
        Self::Sweeping { rest, next: 0, not_before: None, end }
    }

    fn over(&mut self) {
        if let Some(end) = self.take_end() {
            *self = Self::Over { end, leave_open: false };
        }
    }

    /// The end this phase leads to, if it leads to one.
    fn take_end(&self) -> Option<SessionEnd> {
        match self {
            Self::Serving | Self::Held(_) => None,
            Self::Sweeping { end, .. } | Self::Dying { end, .. } | Self::Over { end, .. } => {
                Some(end.clone())
            }
        }
    }
}

impl Session {
    /// Starts to close on purpose.
    pub(crate) fn close(&mut self, rest: Rest) {
        self.phase.close(rest);
        self.keep_ending();
    }

    /// How it ended, and whether its uffd has to stay open.
    pub(crate) fn ended(&self) -> Option<(SessionEnd, bool)> {
        match &self.phase {
            Phase::Over { end, leave_open } => Some((end.clone(), *leave_open)),
            _ => None,
        }
    }

    /// Does the next piece of what ending takes.
    pub(crate) fn step(&mut self, now: Instant, cx: &mut Context<'_>) -> Next {
        self.keep_ending();
        match &self.phase {
            Phase::Serving => self.gather_dirty(now).unwrap_or_else(|| self.next_retry()),
            Phase::Held(_) => self.step_held(now),
            Phase::Over { .. } => Next::Now,
            Phase::Dying { since, .. } => {
                let deadline = *since + DYING_DEADLINE;
                if now < deadline && !self.process.as_ref().is_some_and(Supervised::has_exited) {
                    return Next::At(deadline);
                }
                self.phase.over();
                Next::Now
            }
            Phase::Sweeping { not_before: Some(moment), .. } if *moment > now => Next::At(*moment),
            Phase::Sweeping { rest: Rest::Zero, .. } => self.finish(cx),
            Phase::Sweeping { rest: Rest::Poison, next, .. } => {
                let next = *next;
                self.sweep_poison(next, cx)
            }
            Phase::Sweeping { rest: Rest::Populate, next, .. } => {
                let next = *next;
                self.sweep_populate(next, cx)
            }
        }
    }

    fn next_retry(&self) -> Next {
        self.deferred.due().map_or(Next::Idle, Next::At)
    }

    fn sweep_poison(&mut self, from: usize, cx: &mut Context<'_>) -> Next {
        // Those that wait go first: what they wait for is still told apart from what nobody has asked for.
        if let Some(moment) = self.deferred.due() {
            return Next::At(moment);
        }
        let Some(run) = self.states.next_missing(from, POISON_STEP) else { return self.finish(cx) };
        let run = self.map.clip(run);
        let outcome = self.fill(run.clone(), Filling::Poison, &[]);
        self.swept(run.end, outcome)
    }

    fn sweep_populate(&mut self, from: usize, cx: &mut Context<'_>) -> Next {
        let Some(run) = self.next_to_bring(from..usize::MAX, self.window()) else {
            if self.reads_in_flight() > 0 {
                return Next::Idle;
            }
            if self.states.next_missing(0, 1).is_none() {
                return self.finish(cx);
            }
            // Passed over while a worker read them, and then refused by the kernel.
            self.advance(0, None);
            return Next::Now;
        };
        match self.bring(run.clone(), cx) {
            // As many reads are under way as may be: the next completion comes back here.
            Ok(false) => Next::Idle,
            Ok(true) => self.swept(run.end, Ok(())),
            Err(stop) => self.swept(run.end, Err(stop)),
        }
    }

    /// Records how far a sweep has come.
    fn swept(&mut self, end: usize, outcome: Result<(), Stop>) -> Next {
        match outcome {
            Ok(()) => self.advance(end, None),
            Err(Stop::Changing(page)) => {
                let moment = Instant::now() + CHANGING_PAUSE;
                self.advance(page, Some(moment));
                return Next::At(moment);
            }
            Err(stop) => self.stopped(stop),
        }
        Next::Now
    }

    fn advance(&mut self, to: usize, pause: Option<Instant>) {
        if let Phase::Sweeping { next, not_before, .. } = &mut self.phase {
            *next = to;
            *not_before = pause;
        }
    }

    /// Nothing is missing any more: the kernel may serve this memory itself.
    fn finish(&mut self, cx: &mut Context<'_>) -> Next {
        for (addresses, _) in self.map.memory() {
            // A process that is gone has nothing left to unregister. Memory it has unmapped likewise.
            let _ = self.uffd.unregister(addresses.start, addresses.end - addresses.start);
        }
        // Threads of the process wait until their events are read; a forked child is left its own memory.
        while matches!(self.uffd.read_events(cx.events), Ok(count) if count > 0) {
            cx.events.drain().for_each(drop);
        }
        self.phase.over();
        Next::Now
    }
}
