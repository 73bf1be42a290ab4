//! Who serves the session of a record: one process at a time.

use uffd::liveness;

use super::layout::at;
use super::{Record, damaged};
use crate::error::PagerError;

impl Record {
    /// This process serves it from now on.
    ///
    /// # Errors
    ///
    /// [`PagerError::Record`] while another process does: its threads could still install pages.
    pub(crate) fn take_ownership(&self) -> Result<(), PagerError> {
        if self.is_in_use() {
            let owner = self.get(at::OWNER);
            return Err(damaged(format!(
                "process {owner} serves its session still: take it over when that has ended"
            )));
        }
        let own = u64::from(std::process::id());
        self.put(at::OWNER, 0);
        self.put(at::OWNER_STARTED, started_at(own).unwrap_or(0));
        self.put(at::OWNER, own);
        Ok(())
    }

    /// Whether another process serves it.
    pub(crate) fn is_in_use(&self) -> bool {
        let (owner, started) = (self.get(at::OWNER), self.get(at::OWNER_STARTED));
        owner != 0
            && owner != u64::from(std::process::id())
            && started_at(owner).is_some_and(|now| now == started)
    }

    /// The ring is this process's from now on: nothing is in it that another has read.
    pub(crate) fn take_ring(&self) {
        self.put(at::TABLE, u64::from(std::process::id()));
    }

    /// In whose table the descriptors are that the ring names; 0 where that is not known.
    pub(crate) fn ring_of(&self) -> i32 {
        i32::try_from(self.get(at::TABLE)).unwrap_or(0)
    }

    /// Counts that it was taken over; how often it was.
    pub(crate) fn count_take_over(&self) -> u64 {
        let count = self.get(at::TAKEN_OVER).wrapping_add(1);
        self.put(at::TAKEN_OVER, count);
        count
    }
}

fn started_at(pid: u64) -> Option<u64> {
    liveness::started_at(i32::try_from(pid).ok()?)
}
