//! What sessions are to replay, as clients have sent it: kept, so that the next daemon replays what is missing then.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pager::{PagerError, Replay};
use serde_json::Value;

use crate::channel::Message;
use crate::daemon::Daemon;
use crate::keeping::{PLAN, plan_key};
use crate::sources::bytes_of;

/// By number.
#[derive(Default)]
pub(crate) struct Plans(BTreeMap<u64, Arc<Replay>>);

impl Plans {
    pub(crate) fn get(&self, id: u64) -> Option<Arc<Replay>> {
        self.0.get(&id).cloned()
    }

    pub(crate) fn are_there(&self) -> bool {
        !self.0.is_empty()
    }

    /// Lets go of what no session and no server replays any more.
    pub(crate) fn sweep(&mut self) -> Vec<u64> {
        let unused = self.0.iter().filter(|(_, plan)| Arc::strong_count(plan) == 1);
        let unused: Vec<u64> = unused.map(|(&id, _)| id).collect();
        for id in &unused {
            self.0.remove(id);
        }
        unused
    }
}

impl Daemon {
    /// Takes one from a client; its number.
    pub(crate) fn take_plan(&mut self, memfd: OwnedFd) -> Result<u64, PagerError> {
        let failed = |_| PagerError::Exhausted("no descriptor is free for what is to be replayed".to_owned());
        let plan = Replay::unpack(&bytes_of(memfd.try_clone().map_err(failed)?)?)?;
        let id = self.next();
        self.control.line.say(&Message::Keep { key: plan_key(id), value: Value::Null }, &[memfd.as_fd()])?;
        self.plans.0.insert(id, Arc::new(plan));
        Ok(id)
    }

    /// Takes one from an earlier daemon.
    pub(crate) fn resume_plan(&mut self, key: &str, mut fds: Vec<OwnedFd>) -> Result<(), PagerError> {
        let missing = || PagerError::Internal("it did not come".to_owned());
        let id = key.strip_prefix(PLAN).and_then(|id| id.parse().ok()).ok_or_else(missing)?;
        let plan = Replay::unpack(&bytes_of(fds.pop().ok_or_else(missing)?)?)?;
        self.plans.0.insert(id, Arc::new(plan));
        Ok(())
    }
}
