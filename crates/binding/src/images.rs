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
use crate::sources::Source;

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
    pub(crate) fn open(&self, memory: Memory, earlier: Option<&Earlier>) -> Result<Image, PagerError> {
        let source = memory.open()?;
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

/// What is opened elsewhere, named here: a source may be closed in the meantime by who has named it.
pub(crate) enum Memory {
    Source(Option<Arc<Source>>),
    File(String),
}

impl Memory {
    pub(crate) fn named(memory: &str, source: Option<f64>) -> Self {
        match source {
            Some(handle) => Self::Source(SOURCES.get(handle)),
            None => Self::File(memory.to_owned()),
        }
    }

    /// As [`NativeImage::open`].
    pub(crate) fn open(self) -> Result<Arc<dyn PageSource>, PagerError> {
        match self {
            Self::Source(Some(source)) => Ok(Arc::clone(&source.pages)),
            Self::Source(None) => Err(PagerError::NoImage("the source is closed".to_owned())),
            Self::File(path) => Ok(Arc::new(FileSource::open(Path::new(&path))?)),
        }
    }
}
