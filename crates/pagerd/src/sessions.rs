//! What is served, by the numbers that clients know it by: the pager's own.
//!
//! Those outlive the process that gave them: each start of the daemon numbers from a place of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use pager::SessionInfo;
use serde_json::Value;

/// Ends that are kept for clients that ask later.
const MOST_ENDS: usize = 4096;

/// A session that is alive.
pub(crate) struct Alive {
    /// Known once it was announced.
    pub(crate) info: Option<Arc<SessionInfo>>,
    pub(crate) server: Option<u64>,
    /// Its counters when clients last heard of them.
    pub(crate) told: u64,
    /// It is held: how clients were told.
    pub(crate) held: Option<Value>,
}

/// Sessions, and how those ended that are over.
#[derive(Default)]
pub(crate) struct Sessions {
    pub(crate) alive: BTreeMap<u64, Alive>,
    ends: VecDeque<(u64, Value)>,
}

impl Sessions {
    /// One that has begun, and was not announced yet.
    pub(crate) fn begin(&mut self, id: u64, server: Option<u64>) {
        self.alive.entry(id).or_insert(Alive { info: None, server, told: u64::MAX, held: None });
    }

    /// It is over; its last state.
    pub(crate) fn end(&mut self, id: u64) -> Option<Alive> {
        self.alive.remove(&id)
    }

    /// How one ended, for those who ask.
    pub(crate) fn remember(&mut self, id: u64, end: Value) {
        if self.ends.len() >= MOST_ENDS {
            self.ends.pop_front();
        }
        self.ends.push_back((id, end));
    }

    /// Those that are remembered, the earliest first.
    pub(crate) fn ends(&self) -> Vec<&Value> {
        self.ends.iter().map(|(_, end)| end).collect()
    }

    pub(crate) fn ended(&self, id: u64) -> Option<&Value> {
        self.ends.iter().rev().find(|(ended, _)| *ended == id).map(|(_, end)| end)
    }
}
