//! Sessions of forked children, and of other processes of which nothing but their memory is known.
//!
//! The kernel hands out a child's userfaultfd, not its process: nothing tells when it has exited. An ioctl on its memory
//! does, so those sessions are asked, all together, once a second; where there is none, nothing happens at all.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};

use super::{EventLoop, NO_SERVER};
use crate::error::PagerError;
use crate::policy::EndReason;

/// How long a process can be gone before it is known, when none of its faults tell.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Sessions of forked children that may exist at one time beside those of servers, which have a limit of their own.
const MOST_FORKED: usize = 1024;

impl EventLoop {
    /// Takes over the sessions of children that were forked. One too many is not left to the kernel, which would give it
    /// zeros: what it misses is poisoned.
    pub(super) fn adopt_forked(&mut self) {
        for (parent, mut session) in std::mem::take(&mut self.lent.forked) {
            let Some(entry) = self.sessions.get(&parent) else { continue };
            let (server, observer) = (entry.server, Arc::clone(&entry.observer));
            if let Some(error) = self.one_too_many(server) {
                session.fail(EndReason::Exhausted, error);
            }
            self.adopt_session(session, server, &observer);
        }
    }

    fn one_too_many(&self, server: u64) -> Option<PagerError> {
        let (taken, most, limit) = match self.servers.get(&server) {
            Some(server) => (server.alive, server.options.max_sessions, "of this server (`maxSessions`)"),
            None => {
                let forked = self
                    .sessions
                    .values()
                    .filter(|entry| entry.server == NO_SERVER && entry.session.info.parent.is_some());
                (forked.count(), MOST_FORKED, "for forked children")
            }
        };
        (taken >= most).then(|| {
            PagerError::Exhausted(format!(
                "the served process forked, and all {most} sessions {limit} are taken: what the child misses is poisoned"
            ))
        })
    }

    /// From now on it is looked whether the session's process still lives.
    pub(super) fn start_probing(&mut self, id: u64) {
        if self.unwatched.is_empty() {
            let interval = Expiration::Interval(TimeSpec::from_duration(PROBE_INTERVAL));
            // It fails only for times that cannot be.
            let _ = self.probe.set(interval, TimerSetTimeFlags::empty());
        }
        self.unwatched.insert(id);
    }

    pub(super) fn stop_probing(&mut self, id: u64) {
        if self.unwatched.remove(&id) && self.unwatched.is_empty() {
            // As above.
            let _ = self.probe.unset();
        }
    }

    pub(super) fn probe_unwatched(&mut self) {
        let _ = self.probe.wait();
        for &id in &self.unwatched {
            let Some(entry) = self.sessions.get_mut(&id) else { continue };
            if entry.session.uffd.is_dead() {
                entry.session.phase.peer_gone();
                self.restless.insert(id);
            }
        }
    }
}
