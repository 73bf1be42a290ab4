//! Bringing pages that no fault has asked for.

use std::ops::Range;

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{DeliverPopulated, Pager, PagerError, PopulateOptions};

use crate::promised::{Failed, Promised};
use crate::values::NativeError;

/// What is to be brought.
#[napi(object, object_to_js = false)]
pub struct NativePopulateOptions {
    /// What it is given up by.
    pub request: f64,
    /// Address and bytes, one after the other; everything where absent.
    pub ranges: Option<Vec<f64>>,
    /// Bytes a second.
    pub rate: Option<f64>,
}

impl From<&NativePopulateOptions> for PopulateOptions {
    fn from(options: &NativePopulateOptions) -> Self {
        let range = |pair: &[f64]| -> Option<Range<u64>> {
            let (start, len) = (*pair.first()? as u64, *pair.get(1)? as u64);
            Some(start..start.saturating_add(len))
        };
        let ranges = options.ranges.as_ref().map(|words| words.chunks(2).filter_map(range).collect());
        Self { ranges, rate: options.rate.map(|rate| rate as u64) }
    }
}

/// Nothing is missing any more, or why not.
#[napi(object, object_from_js = false)]
pub struct NativePopulated {
    pub error: Option<NativeError>,
}

impl Failed for NativePopulated {
    fn failed(error: &PagerError) -> Self {
        Self { error: Some(NativeError::from(error)) }
    }
}

/// Gives the memory of a session that is all there back to its process; without a pager the session is over.
pub(crate) fn detach<'env>(env: &'env Env, pager: Option<&Pager>, session: f64) -> Result<Object<'env>> {
    let (promised, promise) = Promised::<NativePopulated>::new(env)?;
    if let Some(pager) = pager {
        pager.detach(session as u64, keep(promised));
    }
    Ok(promise)
}

/// What keeps a promise.
pub(crate) fn keep(mut promised: Promised<NativePopulated>) -> DeliverPopulated {
    Box::new(move |answer| {
        promised.keep(
            answer.map_or_else(|error| NativePopulated::failed(&error), |()| NativePopulated { error: None }),
        );
    })
}

/// Asks for it; without a pager the session is over.
pub(crate) fn populate<'env>(
    env: &'env Env,
    pager: Option<&Pager>,
    session: f64,
    options: &NativePopulateOptions,
) -> Result<Object<'env>> {
    let (promised, promise) = Promised::<NativePopulated>::new(env)?;
    if let Some(pager) = pager {
        pager.populate(session as u64, options.request as u64, options.into(), keep(promised));
    }
    Ok(promise)
}
