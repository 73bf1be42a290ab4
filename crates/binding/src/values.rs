//! What crosses the boundary, as plain data.

use napi::bindgen_prelude::{BigInt, Float64Array};
use napi_derive::napi;
use pager::{Cause, FillMode, Histogram, LATENCY_BUCKETS, Latencies, PagerError, Peer, Region, SessionInfo};

use crate::recording::{NativeRecording, NativeReplayStats};

/// A failure. TypeScript throws it.
#[napi(object, object_from_js = false)]
pub struct NativeError {
    pub code: String,
    pub message: String,
    pub errno: Option<i32>,
    pub syscall: Option<String>,
    /// What to do about it.
    pub hint: Option<&'static str>,
    /// What is behind it, the nearest first.
    pub causes: Option<Vec<NativeCause>>,
}

/// One link of what is behind a failure.
#[napi(object, object_from_js = false)]
pub struct NativeCause {
    /// A code of this package, or the name of an errno.
    pub code: String,
    pub message: String,
    pub errno: Option<i32>,
    pub syscall: Option<String>,
}

impl From<Cause> for NativeCause {
    fn from(Cause { code, message, errno, syscall }: Cause) -> Self {
        Self { code, message, errno, syscall }
    }
}

impl From<&PagerError> for NativeError {
    fn from(error: &PagerError) -> Self {
        Self {
            code: error.code().to_owned(),
            message: error.to_string(),
            errno: error.errno(),
            syscall: error.syscall(),
            hint: error.hint(),
            causes: Some(error.causes().into_iter().map(NativeCause::from).collect::<Vec<_>>())
                .filter(|causes| !causes.is_empty()),
        }
    }
}

#[napi(object, object_from_js = false)]
pub struct NativePeer {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

impl From<Peer> for NativePeer {
    fn from(peer: Peer) -> Self {
        Self { pid: peer.pid, uid: peer.uid, gid: peer.gid }
    }
}

#[napi(object, object_from_js = false)]
pub struct NativeRegion {
    pub address: BigInt,
    pub length: f64,
    pub source_offset: f64,
}

#[napi(object, object_from_js = false)]
pub struct NativeSession {
    pub id: f64,
    /// The session of the process that it was forked from.
    pub parent: Option<f64>,
    pub peer: NativePeer,
    pub page_size: f64,
    pub regions: Vec<NativeRegion>,
    /// How its memory was brought before this was told, and how many milliseconds that took.
    #[napi(ts_type = "'windows' | 'fill' | 'huge-fill' | 'replay'")]
    pub mode: String,
    pub filled_in: f64,
    /// Why it is not the mode that was wanted, where it is not.
    pub fallback: Option<NativeError>,
}

impl NativeSession {
    pub(crate) fn new(id: u64, peer: Peer, regions: &[Region], page_size: u64) -> Self {
        let regions = regions.iter().map(|region| NativeRegion {
            address: BigInt::from(region.address),
            length: region.len as f64,
            source_offset: region.source_offset as f64,
        });
        Self {
            id: id as f64,
            parent: None,
            peer: peer.into(),
            page_size: page_size as f64,
            regions: regions.collect(),
            mode: FillMode::Windows.as_str().to_owned(),
            filled_in: 0.0,
            fallback: None,
        }
    }
}

impl From<&SessionInfo> for NativeSession {
    fn from(info: &SessionInfo) -> Self {
        let mut session = Self::new(info.id, info.peer, &info.regions, info.page_size);
        session.parent = info.parent.map(|id| id as f64);
        if let Some(filled) = info.filled.get() {
            session.mode = filled.mode.as_str().to_owned();
            session.fallback = filled.fallback.as_ref().map(NativeError::from);
            session.filled_in = filled.took.as_secs_f64() * 1000.0;
        }
        session
    }
}

#[napi(object, object_from_js = false)]
pub struct NativeStats {
    /// How far the recording of its faults has come, where they are recorded.
    pub recording: Option<NativeRecording>,
    /// How far the replay has come, where there is one.
    pub replay: Option<NativeReplayStats>,
    pub faults: f64,
    pub faults_installed: f64,
    pub faults_zeroed: f64,
    pub faults_poisoned: f64,
    pub faults_unprotected: f64,
    pub joined: f64,
    pub unanswered: f64,
    pub pages_installed: f64,
    pub pages_zeroed: f64,
    pub pages_zero: f64,
    pub pages_poisoned: f64,
    pub pages_removed: f64,
    pub pages_prefetched: f64,
    pub pages_joined: f64,
    pub blocks_not_joined: f64,
    pub bytes_installed: f64,
    pub windows: f64,
    pub already_present: f64,
    pub deferred: f64,
    pub worker_reads: f64,
    pub busy_ns: f64,
    /// Queue, source, install, prefetch_source, prefetch_install: of each how often by bucket, then nanoseconds altogether.
    pub latencies: Float64Array,
}

impl From<&SessionInfo> for NativeStats {
    fn from(info: &SessionInfo) -> Self {
        let live = &info.stats;
        let stats = live.snapshot();
        Self {
            recording: info.recording.as_deref().map(NativeRecording::from),
            replay: info.replays.then(|| NativeReplayStats::from(&stats)),
            faults: stats.faults as f64,
            faults_installed: stats.faults_installed as f64,
            faults_zeroed: stats.faults_zeroed as f64,
            faults_poisoned: stats.faults_poisoned as f64,
            faults_unprotected: stats.faults_unprotected as f64,
            joined: stats.joined as f64,
            unanswered: stats.unanswered as f64,
            pages_installed: stats.pages_installed as f64,
            pages_zeroed: stats.pages_zeroed as f64,
            pages_zero: stats.pages_zero as f64,
            pages_poisoned: stats.pages_poisoned as f64,
            pages_removed: stats.pages_removed as f64,
            pages_prefetched: stats.pages_prefetched as f64,
            pages_joined: stats.pages_joined as f64,
            blocks_not_joined: stats.blocks_not_joined as f64,
            bytes_installed: stats.bytes_installed as f64,
            windows: stats.windows as f64,
            already_present: stats.already_present as f64,
            deferred: stats.deferred as f64,
            worker_reads: stats.worker_reads as f64,
            busy_ns: stats.busy_ns as f64,
            latencies: words_of(&live.latencies()),
        }
    }
}

fn words_of(latencies: &Latencies) -> Float64Array {
    let Latencies { queue, source, install, prefetch_source, prefetch_install } = latencies;
    let words = [queue, source, install, prefetch_source, prefetch_install]
        .into_iter()
        .flat_map(|histogram| histogram.counts.iter().chain([&histogram.sum_ns]).map(|&word| word as f64));
    Float64Array::new(words.collect())
}

/// Nanoseconds that everything in a bucket of `latencies` stays below, bucket after bucket; infinite for the last.
#[napi(catch_unwind)]
pub fn latency_bounds() -> Vec<f64> {
    let bound = |bucket| Histogram::bound(bucket).map_or(f64::INFINITY, |bound| bound as f64);
    (0..LATENCY_BUCKETS).map(bound).collect()
}
