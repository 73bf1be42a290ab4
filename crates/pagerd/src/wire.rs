//! What the daemon tells, as JSON: the shapes in which the addon gives the same things to TypeScript, with addresses as
//! hexadecimal text.

use std::time::{SystemTime, UNIX_EPOCH};

use pager::{
    Cause, DirtyPages, FillMode, Latencies, PagerError, Peer, Recording, RecordingState, Region, SessionInfo,
};
use serde_json::{Value, json};

/// A failure: code, message, and what is behind it.
pub(crate) fn error(error: &PagerError) -> Value {
    let mut told = json!({ "code": error.code(), "message": error.to_string() });
    if let Some(errno) = error.errno() {
        told["errno"] = errno.into();
    }
    if let Some(syscall) = error.syscall() {
        told["syscall"] = syscall.into();
    }
    if let Some(hint) = error.hint() {
        told["hint"] = hint.into();
    }
    let causes: Vec<Value> = error.causes().into_iter().map(cause).collect();
    if !causes.is_empty() {
        told["causes"] = causes.into();
    }
    told
}

fn cause(Cause { code, message, errno, syscall }: Cause) -> Value {
    let mut told = json!({ "code": code, "message": message });
    if let Some(errno) = errno {
        told["errno"] = errno.into();
    }
    if let Some(syscall) = syscall {
        told["syscall"] = syscall.into();
    }
    told
}

/// Milliseconds since the epoch.
pub(crate) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0
}

pub(crate) fn peer(peer: Peer) -> Value {
    json!({ "pid": peer.pid, "uid": peer.uid, "gid": peer.gid })
}

fn region(region: &Region) -> Value {
    json!({
        "address": format!("{:#x}", region.address),
        "length": region.len,
        "sourceOffset": region.source_offset,
    })
}

/// A process that waits to be told its image.
pub(crate) fn asking(id: u64, who: Peer, regions: &[Region], page_size: u64) -> Value {
    json!({
        "id": id,
        "peer": peer(who),
        "pageSize": page_size,
        "regions": regions.iter().map(region).collect::<Vec<_>>(),
        "mode": FillMode::Windows.as_str(),
        "filledIn": 0,
    })
}

/// A session.
pub(crate) fn session(info: &SessionInfo) -> Value {
    let mut session = asking(info.id, info.peer, &info.regions, info.page_size);
    if let Some(filled) = info.filled.get() {
        session["mode"] = filled.mode.as_str().into();
        session["filledIn"] = (filled.took.as_secs_f64() * 1000.0).into();
        if let Some(fallback) = &filled.fallback {
            session["fallback"] = error(fallback);
        }
    }
    if let Some(parent) = info.parent {
        session["parent"] = parent.into();
    }
    session
}

/// The counters of a session.
pub(crate) fn stats(info: &SessionInfo) -> Value {
    let stats = info.stats.snapshot();
    let mut told = json!({
        "faults": stats.faults,
        "faultsInstalled": stats.faults_installed,
        "faultsZeroed": stats.faults_zeroed,
        "faultsPoisoned": stats.faults_poisoned,
        "faultsUnprotected": stats.faults_unprotected,
        "joined": stats.joined,
        "unanswered": stats.unanswered,
        "pagesInstalled": stats.pages_installed,
        "pagesZeroed": stats.pages_zeroed,
        "pagesZero": stats.pages_zero,
        "pagesPoisoned": stats.pages_poisoned,
        "pagesRemoved": stats.pages_removed,
        "pagesPrefetched": stats.pages_prefetched,
        "pagesJoined": stats.pages_joined,
        "blocksNotJoined": stats.blocks_not_joined,
        "bytesInstalled": stats.bytes_installed,
        "windows": stats.windows,
        "alreadyPresent": stats.already_present,
        "deferred": stats.deferred,
        "workerReads": stats.worker_reads,
        "busyNs": stats.busy_ns,
        "latencies": latencies(&info.stats.latencies()),
    });
    if let Some(recorded) = &info.recording {
        told["recording"] = recording(recorded);
    }
    if info.replays {
        told["replay"] = json!({
            "pages": stats.replay_pages,
            "installed": stats.replay_installed,
            "late": stats.replay_late,
            "missed": stats.replay_missed,
            "done": stats.replay_done > 0,
            "heldBack": stats.replay_held,
            "heldBackFaults": stats.replay_held_faults,
            "heldBackHidden": stats.replay_held_hidden,
        });
    }
    told
}

/// How far a recording has come. Whole in memory, it is on its way to its file.
pub(crate) fn recording(recording: &Recording) -> Value {
    let mut told = json!({
        "path": recording.path,
        "state": "recording",
        "faults": recording.faults(),
        "dropped": recording.dropped(),
        "bytes": recording.bytes(),
        "full": recording.is_full(),
    });
    if let RecordingState::Failed(why) = recording.state() {
        told["state"] = "failed".into();
        told["error"] = error(&why);
    }
    told
}

fn latencies(latencies: &Latencies) -> Vec<u64> {
    let Latencies { queue, source, install, prefetch_source, prefetch_install } = latencies;
    [queue, source, install, prefetch_source, prefetch_install]
        .into_iter()
        .flat_map(|histogram| histogram.counts.iter().copied().chain([histogram.sum_ns]))
        .collect()
}

pub(crate) fn dirty(pages: &DirtyPages) -> Value {
    let range = |range: &pager::DirtyRange| {
        let mut told = json!({ "address": format!("{:#x}", range.address), "length": range.len });
        if let Some(offset) = range.source_offset {
            told["sourceOffset"] = offset.into();
        }
        told
    };
    json!({ "ranges": pages.ranges.iter().map(range).collect::<Vec<_>>(), "more": pages.more })
}
