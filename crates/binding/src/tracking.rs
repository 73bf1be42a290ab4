//! What was written to, as it is told to JavaScript.

use napi::bindgen_prelude::{BigInt, Object};
use napi::{Env, Result};
use napi_derive::napi;
use pager::{DirtyPages, DirtyRange, Pager, PagerError};

use crate::promised::{Failed, Promised};
use crate::values::NativeError;

#[napi(object, object_from_js = false)]
pub struct NativeDirtyRange {
    pub address: BigInt,
    pub length: f64,
    pub source_offset: Option<f64>,
}

impl From<&DirtyRange> for NativeDirtyRange {
    fn from(range: &DirtyRange) -> Self {
        Self {
            address: BigInt::from(range.address),
            length: range.len as f64,
            source_offset: range.source_offset.map(|offset| offset as f64),
        }
    }
}

/// Memory that was written to, or why it cannot be told.
#[napi(object, object_from_js = false)]
pub struct NativeDirty {
    pub error: Option<NativeError>,
    pub ranges: Vec<NativeDirtyRange>,
    /// There were more than were asked for.
    pub more: bool,
}

impl From<std::result::Result<DirtyPages, PagerError>> for NativeDirty {
    fn from(answer: std::result::Result<DirtyPages, PagerError>) -> Self {
        match answer {
            Ok(DirtyPages { ranges, more }) => {
                Self { error: None, ranges: ranges.iter().map(NativeDirtyRange::from).collect(), more }
            }
            Err(error) => Self::failed(&error),
        }
    }
}

impl Failed for NativeDirty {
    fn failed(error: &PagerError) -> Self {
        Self { error: Some(NativeError::from(error)), ranges: Vec::new(), more: false }
    }
}

/// Asks for what was written to since the last time; without a pager the session is over.
pub(crate) fn take<'env>(
    env: &'env Env,
    pager: Option<&Pager>,
    session: u64,
    most: usize,
) -> Result<Object<'env>> {
    let (mut promised, promise) = Promised::<NativeDirty>::new(env)?;
    if let Some(pager) = pager {
        pager.take_dirty_with(session, most, Box::new(move |answer| promised.keep(answer.into())));
    }
    Ok(promise)
}
