//! What an earlier daemon had kept, as it comes from the holder.

use std::os::fd::OwnedFd;

use pager::FailurePolicy;
use serde_json::Value;

use crate::keeping::{SERVER, ServerValue};
use crate::protocol::Listen;
use crate::serving::policy_of;

/// One thing of it.
pub(crate) struct Kept {
    pub(crate) key: String,
    pub(crate) value: Value,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Kept {
    /// Of a server: its number, and its failure policy.
    pub(crate) fn server(&self) -> Option<(u64, FailurePolicy)> {
        let value = Some(&self.value).filter(|_| self.key.starts_with(SERVER))?;
        let value: ServerValue = serde_json::from_value(value.clone()).ok()?;
        let listen: Listen = serde_json::from_value(value.listen).ok()?;
        Some((value.server, policy_of(listen.serving.on_failure)))
    }
}

/// Takes out what is kept under keys that begin like this.
pub(crate) fn take(kept: &mut Vec<Kept>, beginning: &str) -> Vec<Kept> {
    kept.extract_if(.., |kept| kept.key.starts_with(beginning)).collect()
}
