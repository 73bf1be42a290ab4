//! What the holder keeps, in the order in which it came; where a service manager has a store for descriptors, there as well.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::Value;
use uffd::liveness::started_at;

use super::notify::Notify;
use super::stash::{Change, StartedDaemon, Stash};
use crate::keeping::END;
use crate::kept::Kept;
use crate::left::{self, LEFT};
use crate::policy;

/// Ends of sessions that are kept for clients that come back.
const MOST_ENDS: usize = 256;
/// How long the service manager may take for what it is told last.
const FAREWELL: Duration = Duration::from_secs(1);

pub(crate) struct Custody {
    /// What lies over another came after it.
    pub(super) kept: Vec<Kept>,
    /// Sessions that are over, and whose descriptors must stay until their process has ended.
    pub(super) lingering: Vec<Kept>,
    pub(super) stash: Option<Stash>,
    pub(super) notify: Notify,
}

impl Custody {
    pub(crate) fn kept(&self) -> &[Kept] {
        &self.kept
    }

    pub(crate) fn lingering(&self) -> &[Kept] {
        &self.lingering
    }

    pub(crate) fn notify(&mut self) -> &mut Notify {
        &mut self.notify
    }

    pub(crate) fn notified(&self) -> &Notify {
        &self.notify
    }

    /// Whether what is kept outlives this process.
    pub(crate) fn is_stored(&self) -> bool {
        self.stash.is_some()
    }

    /// Keeps something, in the place of what has had its key.
    pub(crate) fn keep(&mut self, kept: Kept) {
        self.change(&[Change::Keep(&kept)]);
        self.kept.retain(|other| other.key != kept.key);
        self.kept.push(kept);
    }

    pub(crate) fn forget(&mut self, key: &str) {
        self.change(&[Change::Forget(key)]);
        self.kept.retain(|kept| kept.key != key);
    }

    /// A session is over: how takes its place. With `still_open`, its descriptors stay.
    pub(crate) fn ended(&mut self, key: &str, end: String, value: Value, still_open: bool) {
        let at = self.kept.iter().position(|kept| kept.key == key);
        let over = at.map(|at| self.kept.remove(at));
        let oldest = remember_end(&mut self.kept, end, value);
        let session = match over.as_ref().filter(|_| still_open) {
            Some(over) => Change::Lingers(over),
            None => Change::Forget(key),
        };
        let end = self.kept.last().map(Change::Keep);
        let oldest = oldest.as_deref().map(Change::Forget);
        let changes: Vec<Change<'_>> = end.into_iter().chain([session]).chain(oldest).collect();
        if let Some(stash) = &mut self.stash {
            stash.change(&changes, &mut self.notify);
        }
        self.lingering.extend(over.filter(|_| still_open));
        self.settle();
    }

    /// What the table of a dead daemon had, as its heir hands it over.
    pub(crate) fn left(&mut self, process: i32, numbers: &[i32], fds: Vec<OwnedFd>, all: bool) {
        left::keep(&mut self.kept, process, numbers, fds, all);
        self.compare();
    }

    /// The next daemon has made something of that.
    pub(crate) fn left_is_taken_over(&mut self) {
        self.kept.retain(|kept| !kept.key.starts_with(LEFT));
        self.compare();
    }

    /// Lets go of what lingered until it was over.
    pub(crate) fn linger_only(&mut self, still: impl Fn(&Kept) -> bool) {
        self.lingering.retain(still);
        self.compare();
    }

    /// Puts every session through its failure policy; how many there were.
    pub(crate) fn fail_all(&mut self, why: &str) -> usize {
        let count = policy::apply(&mut self.kept, &mut self.lingering, why);
        self.compare();
        count
    }

    /// A daemon has been started, which will have the sessions.
    pub(crate) fn daemon_started(&mut self, epoch: u64, pid: i32) {
        if let Some(stash) = &mut self.stash {
            stash.daemon_started(StartedDaemon { epoch, pid, started: started_at(pid) });
        }
    }

    /// An end in order, after which nobody is to find anything; but what must stay open stays in the store.
    pub(crate) fn end(&mut self) {
        self.kept.clear();
        self.compare();
        if let Some(stash) = self.stash.as_mut().filter(|_| self.lingering.is_empty()) {
            stash.clear(&mut self.notify);
        }
        self.notify.finish(FAREWELL);
    }

    /// Whoever comes next finds everything.
    pub(crate) fn leave(&mut self) {
        self.notify.finish(FAREWELL);
    }

    fn change(&mut self, changes: &[Change<'_>]) {
        if let Some(stash) = &mut self.stash {
            stash.change(changes, &mut self.notify);
            self.settle();
        }
    }

    /// Has the store what is here now, after changes that were not told of one by one.
    pub(super) fn compare(&mut self) {
        if let Some(stash) = &mut self.stash {
            stash.compare(&self.kept, &self.lingering, &mut self.notify);
            self.settle();
        }
    }

    fn settle(&mut self) {
        if let Some(stash) = &mut self.stash {
            stash.settle(&self.kept, &self.lingering, &mut self.notify);
        }
    }
}

/// Keeps how a session ended, and not too many of those; the key of the one that is not kept any more.
pub(crate) fn remember_end(kept: &mut Vec<Kept>, key: String, value: Value) -> Option<String> {
    let is_end = |kept: &Kept| kept.key.starts_with(END);
    let full = kept.iter().filter(|kept| is_end(kept)).count() >= MOST_ENDS;
    let oldest = kept.iter().position(is_end).filter(|_| full).map(|at| kept.remove(at).key);
    kept.push(Kept { key, value, fds: Vec::new() });
    oldest
}
