//! The one place where what TypeScript says of a memory image becomes a source of pages.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::environment::SOURCES;
use crate::filling::fill_of;
use napi_derive::napi;
use pager::{FileSource, Image, PageSource, PagerError};

use crate::holding::NativePolicy;
use crate::recording::{Earlier, NativeReplay, working_set};

/// What a process is served from, and how.
#[napi(object, object_to_js = false)]
pub struct NativeImage {
    /// The path of a file; or, in its place, a source by its number.
    pub memory: String,
    pub source: Option<f64>,
    pub on_failure: NativePolicy,
    pub window: Option<u32>,
    #[napi(ts_type = "'windows' | 'fill' | 'huge-fill' | 'replay'")]
    pub mode: String,
    /// Where its faults are recorded.
    pub record: Option<String>,
    pub replay: Option<NativeReplay>,
    pub collapse: bool,
    /// Milliseconds.
    pub source_timeout: u32,
}

impl NativeImage {
    /// May wait for a disk or a network: never on JavaScript's thread, nor on the pager's.
    pub(crate) fn open(&self, earlier: Option<&Earlier>) -> Result<Image, PagerError> {
        let source = open(&self.memory, self.source)?;
        Ok(Image {
            label: String::new(),
            working_set: working_set(&source, self.record.as_deref(), earlier)?,
            source,
            policy: (&self.on_failure).into(),
            window: self.window.map(u64::from),
            fill: fill_of(&self.mode, self.collapse),
            source_timeout: Duration::from_millis(u64::from(self.source_timeout)),
        })
    }
}

/// As [`NativeImage::open`].
pub(crate) fn open(memory: &str, source: Option<f64>) -> Result<Arc<dyn PageSource>, PagerError> {
    if let Some(handle) = source {
        let source =
            SOURCES.get(handle).ok_or_else(|| PagerError::NoImage("the source is closed".to_owned()))?;
        return Ok(Arc::clone(&source.pages));
    }
    Ok(Arc::new(FileSource::open(Path::new(memory))?))
}
