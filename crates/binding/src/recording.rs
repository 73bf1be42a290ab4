//! What sessions do about their working sets: recording, replaying.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{
    PageSource, Pager, PagerError, RecordTo, Recording, RecordingState, Replay, StatsSnapshot, Trace,
    WorkingSet,
};
use uffd::fd_passing::in_memfd;

use crate::environment::{self, SOURCES, TRACES, WORKING_SETS};
use crate::failures;
use crate::jobs::{self, Product};
use crate::populating::{NativePopulated, keep};
use crate::promised::Promised;
use crate::traces::in_digits;
use crate::values::NativeError;

/// A recording to be replayed.
#[napi(object, object_to_js = false)]
pub struct NativeReplay {
    /// Of a file; or, in its place, one that was read already.
    pub path: Option<String>,
    pub trace: Option<f64>,
    /// Hold back one page in 64.
    pub estimate_waste: bool,
}

/// The same, whatever JavaScript forgets meanwhile.
pub(crate) struct Earlier {
    trace: Option<Arc<Trace>>,
    path: String,
    estimate_waste: bool,
}

impl Earlier {
    pub(crate) fn of(replay: &NativeReplay) -> std::result::Result<Self, PagerError> {
        let path = replay.path.clone().unwrap_or_default();
        let known = |handle| {
            let reason = "it was forgotten".to_owned();
            TRACES.get(handle).ok_or(PagerError::Trace { path: PathBuf::from("recording"), reason })
        };
        let trace = replay.trace.map(known).transpose()?;
        Ok(Self { trace, path, estimate_waste: replay.estimate_waste })
    }

    /// Reads it, if it was not, and a few pages of the image: may wait for a disk.
    fn open(&self, source: &Arc<dyn PageSource>) -> std::result::Result<Arc<Replay>, PagerError> {
        let trace = match &self.trace {
            Some(trace) => Arc::clone(trace),
            None => Arc::new(Trace::read(Path::new(&self.path))?),
        };
        trace.check(source)?;
        Ok(Arc::new(Replay::new(&trace, self.estimate_waste)))
    }
}

/// What is done about the working set of sessions that have this source. May wait for a disk.
pub(crate) fn working_set(
    source: &Arc<dyn PageSource>,
    record: Option<&str>,
    replay: Option<&Earlier>,
) -> std::result::Result<WorkingSet, PagerError> {
    let replay = replay.map(|earlier| earlier.open(source)).transpose()?;
    let record = record.map(|path| RecordTo::new(Path::new(path), source)).transpose()?;
    Ok(WorkingSet { record, replay })
}

/// What is done about the working set of a session, opened on another thread.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn prepare_working_set(
    env: &Env,
    source: f64,
    record: Option<String>,
    replay: Option<NativeReplay>,
) -> Result<Object<'_>> {
    let env_id = environment::of(env)?;
    let earlier = replay.as_ref().map(Earlier::of).transpose();
    jobs::run(env, &jobs::OPENINGS, move || {
        let source = SOURCES.get(source).ok_or_else(|| failures::closed("source"))?;
        let prepared = earlier
            .and_then(|earlier| working_set(&source.pages, record.as_deref(), earlier.as_ref()))
            .map_err(|error| NativeError::from(&error))?;
        let handle = WORKING_SETS.insert(Arc::new(prepared), env_id);
        Ok(Product { handle: Some(handle), ..Product::default() })
    })
}

/// The session it was for has it, or never came to be.
#[napi(catch_unwind)]
pub fn forget_working_set(prepared: f64) {
    drop(WORKING_SETS.remove(prepared));
}

/// A working set, for a pager in another process.
#[napi(object, object_from_js = false)]
pub struct NativePackedSet {
    pub error: Option<NativeError>,
    /// What tells the image from others, in hexadecimal digits; where there is something to record.
    pub identity: Option<String>,
    /// A memfd with what is to be replayed.
    pub replay: Option<i32>,
}

/// What a pager in another process needs to know of it.
#[napi(catch_unwind)]
pub fn pack_working_set(prepared: f64) -> NativePackedSet {
    let none = NativePackedSet { error: None, identity: None, replay: None };
    let Some(set) = WORKING_SETS.get(prepared) else {
        return NativePackedSet { error: Some(failures::closed("recording")), ..none };
    };
    let identity = set.record.as_ref().map(|record| in_digits(&record.header().identity));
    match set.replay.as_ref().map(|replay| in_memfd(c"uffd-replay", &replay.pack())).transpose() {
        Ok(memfd) => {
            NativePackedSet { identity, replay: memfd.map(std::os::fd::IntoRawFd::into_raw_fd), ..none }
        }
        Err(error) => NativePackedSet { error: Some(failures::system("memfd_create", &error)), ..none },
    }
}

/// What is known by a number.
pub(crate) fn prepared(handle: Option<f64>) -> std::result::Result<WorkingSet, NativeError> {
    let known = |handle| WORKING_SETS.get(handle).ok_or_else(|| failures::closed("recording"));
    Ok(handle.map(known).transpose()?.map(|prepared| WorkingSet::clone(&prepared)).unwrap_or_default())
}

/// How far a replay has come.
#[napi(object, object_from_js = false)]
pub struct NativeReplayStats {
    pub pages: f64,
    pub installed: f64,
    pub late: f64,
    pub missed: f64,
    pub done: bool,
    pub held_back: f64,
    pub held_back_faults: f64,
    pub held_back_hidden: f64,
}

impl From<&StatsSnapshot> for NativeReplayStats {
    fn from(stats: &StatsSnapshot) -> Self {
        Self {
            pages: stats.replay_pages as f64,
            installed: stats.replay_installed as f64,
            late: stats.replay_late as f64,
            missed: stats.replay_missed as f64,
            done: stats.replay_done > 0,
            held_back: stats.replay_held as f64,
            held_back_faults: stats.replay_held_faults as f64,
            held_back_hidden: stats.replay_held_hidden as f64,
        }
    }
}

#[napi(object, object_from_js = false)]
pub struct NativeRecording {
    pub path: String,
    #[napi(ts_type = "'recording' | 'written' | 'torn' | 'failed'")]
    pub state: String,
    pub faults: f64,
    pub dropped: f64,
    pub bytes: f64,
    pub full: bool,
    pub error: Option<NativeError>,
}

impl From<&Recording> for NativeRecording {
    fn from(recording: &Recording) -> Self {
        let (state, error) = match recording.state() {
            RecordingState::Running => ("recording", None),
            RecordingState::Written => ("written", None),
            RecordingState::Failed(error) => ("failed", Some(NativeError::from(&error))),
        };
        Self {
            path: recording.path.to_string_lossy().into_owned(),
            state: state.to_owned(),
            faults: recording.faults() as f64,
            dropped: recording.dropped() as f64,
            bytes: recording.bytes() as f64,
            full: recording.is_full(),
            error,
        }
    }
}

/// Ends a recording; without a pager the session is over.
pub(crate) fn stop<'env>(env: &'env Env, pager: Option<&Pager>, session: f64) -> Result<Object<'env>> {
    let (promised, promise) = Promised::<NativePopulated>::new(env)?;
    if let Some(pager) = pager {
        pager.stop_recording(session as u64, keep(promised));
    }
    Ok(promise)
}

/// Waits for a replay; without a pager the session is over.
pub(crate) fn replayed<'env>(env: &'env Env, pager: Option<&Pager>, session: f64) -> Result<Object<'env>> {
    let (promised, promise) = Promised::<NativePopulated>::new(env)?;
    if let Some(pager) = pager {
        pager.await_replay(session as u64, keep(promised));
    }
    Ok(promise)
}
