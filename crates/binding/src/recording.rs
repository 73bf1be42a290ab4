//! What sessions do about their working sets: recording.

use std::path::Path;
use std::sync::Arc;

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{Pager, RecordTo, Recording, RecordingState, WorkingSet};

use crate::environment::{self, RECORDINGS, SOURCES};
use crate::failures;
use crate::jobs::{self, Product};
use crate::populating::{NativePopulated, keep};
use crate::promised::Promised;
use crate::values::NativeError;

/// Where faults are recorded, checked on another thread: it reads a few pages of the source.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn prepare_recording(env: &Env, path: String, source: f64) -> Result<Object<'_>> {
    let env_id = environment::of(env)?;
    jobs::run(env, &jobs::OPENINGS, move || {
        let source = SOURCES.get(source).ok_or_else(|| failures::closed("source"))?;
        let to = RecordTo::new(Path::new(&path), &source.pages).map_err(|error| NativeError::from(&error))?;
        let handle = RECORDINGS.insert(Arc::new(to), env_id);
        Ok(Product { handle: Some(handle), ..Product::default() })
    })
}

/// The session it was for has it, or never came to be.
#[napi(catch_unwind)]
pub fn forget_recording(recording: f64) {
    drop(RECORDINGS.remove(recording));
}

/// What is known by a number.
pub(crate) fn working_set(record: Option<f64>) -> std::result::Result<WorkingSet, NativeError> {
    let record = record.map(|handle| RECORDINGS.get(handle).ok_or_else(|| failures::closed("recording")));
    let record = record.transpose()?.map(|to| RecordTo::clone(&to));
    Ok(WorkingSet { record })
}

#[napi(object, object_from_js = false)]
pub struct NativeRecording {
    pub path: String,
    #[napi(ts_type = "'recording' | 'written' | 'failed'")]
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
