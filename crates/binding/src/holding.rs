//! The failure policy as data, and sessions that are held.

use std::sync::Arc;
use std::time::Duration;

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{FailurePolicy, Pager};

use crate::environment::SOURCES;
use crate::failures;
use crate::populating::{NativePopulated, keep};
use crate::promised::Promised;

/// What happens to memory that cannot be served.
#[napi(object, object_to_js = false)]
#[derive(Clone)]
pub struct NativePolicy {
    #[napi(ts_type = "'poison' | 'kill' | 'hold' | 'ask'")]
    pub kind: String,
    /// Milliseconds: of a hold at most (absent: for as long as it takes), or for an answer.
    pub timeout: Option<u32>,
}

impl From<&NativePolicy> for FailurePolicy {
    fn from(policy: &NativePolicy) -> Self {
        let timeout = policy.timeout.map(|ms| Duration::from_millis(u64::from(ms)));
        match policy.kind.as_str() {
            "kill" => Self::Kill,
            "hold" => Self::Hold { timeout },
            "ask" => Self::Ask { timeout: timeout.unwrap_or_default() },
            _ => Self::Poison,
        }
    }
}

/// Keeps the faults of a session; without a pager it is over.
pub(crate) fn hold<'env>(env: &'env Env, pager: Option<&Pager>, session: f64) -> Result<Object<'env>> {
    let (promised, promise) = Promised::<NativePopulated>::new(env)?;
    if let Some(pager) = pager {
        pager.hold(session as u64, keep(promised));
    }
    Ok(promise)
}

/// Goes on with one, from another source where one is named.
pub(crate) fn resume<'env>(
    env: &'env Env,
    pager: Option<&Pager>,
    session: f64,
    source: Option<f64>,
) -> Result<Object<'env>> {
    let (mut promised, promise) = Promised::<NativePopulated>::new(env)?;
    let source = match source.map(|handle| SOURCES.get(handle)) {
        None => None,
        Some(Some(source)) => Some(Arc::clone(&source.pages)),
        Some(None) => {
            promised.keep(NativePopulated { error: Some(failures::closed("source")) });
            return Ok(promise);
        }
    };
    if let Some(pager) = pager {
        pager.resume(session as u64, source, keep(promised));
    }
    Ok(promise)
}
