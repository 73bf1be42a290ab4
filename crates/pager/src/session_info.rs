//! What anybody may know of a session.

use std::sync::{Arc, OnceLock};

use crate::address_map::Region;
use crate::fill::Filled;
use crate::stats::Stats;
use crate::supervise::Peer;
use crate::trace::Recording;

/// What is public about a session.
#[derive(Debug)]
pub struct SessionInfo {
    /// Unique in this process, never used again.
    pub id: u64,
    /// Who is served. The process id is 0 for a forked child, which the kernel names by its memory only.
    pub peer: Peer,
    /// The session of the process that this one was forked from, where it was.
    pub parent: Option<u64>,
    /// The memory served as it lay when the session began, in address order.
    pub regions: Vec<Region>,
    /// Bytes of a page.
    pub page_size: u64,
    /// Live counters.
    pub stats: Stats,
    /// What had come of it when it was announced; set by then.
    pub filled: OnceLock<Filled>,
    /// The recording of its faults, where it is recorded.
    pub recording: Option<Arc<Recording>>,
    /// What its maker calls it: see [`SessionOptions::label`](crate::SessionOptions::label).
    pub label: String,
    /// How often another process went on with it, after the one that served it was gone.
    pub taken_over: u64,
    /// Children that were forked in the moment in which that process was killed: nobody serves their memory, what was missing of it
    /// reads zero.
    pub lost_children: u64,
    /// Whether an earlier run is replayed; [`StatsSnapshot`] counts it.
    ///
    /// [`StatsSnapshot`]: crate::StatsSnapshot
    pub replays: bool,
}
