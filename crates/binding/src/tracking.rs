//! What was written to, as it is told to JavaScript.

use napi::bindgen_prelude::{BigInt, Object};
use napi::{Env, JsDeferred, Result};
use napi_derive::napi;
use pager::{DirtyPages, DirtyRange, Pager, PagerError};

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
            Err(error) => Self { error: Some(NativeError::from(&error)), ranges: Vec::new(), more: false },
        }
    }
}

type Resolver = Box<dyn FnOnce(Env) -> Result<NativeDirty>>;

/// A promise of an answer. Dropped without one, by a pager that has ended, it tells that the session is over.
struct Promised(Option<JsDeferred<NativeDirty, Resolver>>);

impl Promised {
    fn keep(&mut self, answer: std::result::Result<DirtyPages, PagerError>) {
        if let Some(deferred) = self.0.take() {
            deferred.resolve(Box::new(move |_| Ok(answer.into())));
        }
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        self.keep(Err(PagerError::SessionOver));
    }
}

/// Asks for what was written to since the last time; without a pager the session is over.
pub(crate) fn take<'env>(
    env: &'env Env,
    pager: Option<&Pager>,
    session: u64,
    most: usize,
) -> Result<Object<'env>> {
    let (deferred, promise) = env.create_deferred()?;
    let mut promised = Promised(Some(deferred));
    if let Some(pager) = pager {
        pager.take_dirty_with(session, most, Box::new(move |answer| promised.keep(answer)));
    }
    Ok(promise)
}
