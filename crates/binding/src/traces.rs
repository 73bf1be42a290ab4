//! Recordings by number: read, made of others, looked into, written.

use std::path::Path;
use std::sync::Arc;

use napi::bindgen_prelude::{Float64Array, Object};
use napi::{Env, Result};
use napi_derive::napi;
use pager::{PagerError, Trace, TraceEnd, TraceFault, TraceKind};

use crate::environment::{self, SOURCES, TRACES};
use crate::failures;
use crate::jobs::{self, Product};
use crate::sources::copied;
use crate::values::NativeError;
use crate::views::View;

type Made = std::result::Result<Trace, NativeError>;

/// Makes a recording on another thread: it may wait for a disk, or take a while.
fn make_elsewhere(env: &Env, make: impl FnOnce() -> Made + Send + 'static) -> Result<Object<'_>> {
    let env_id = environment::of(env)?;
    jobs::run(env, &jobs::OPENINGS, move || {
        let handle = TRACES.insert(Arc::new(make()?), env_id);
        Ok(Product { handle: Some(handle), ..Product::default() })
    })
}

fn refused(error: PagerError) -> NativeError {
    NativeError::from(&error)
}

fn trace_of(handle: f64) -> std::result::Result<Arc<Trace>, NativeError> {
    TRACES.get(handle).ok_or_else(|| failures::closed("recording"))
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn read_trace(env: &Env, path: String) -> Result<Object<'_>> {
    make_elsewhere(env, move || Trace::read(Path::new(&path)).map_err(refused))
}

/// What all of them wanted, or (`any`) what any of them did.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn combine_traces(env: &Env, traces: Vec<f64>, any: bool) -> Result<Object<'_>> {
    make_elsewhere(env, move || {
        let traces = traces.into_iter().map(trace_of).collect::<std::result::Result<Vec<_>, _>>()?;
        let traces: Vec<&Trace> = traces.iter().map(AsRef::as_ref).collect();
        if any { Trace::merge(&traces) } else { Trace::intersect(&traces) }.map_err(refused)
    })
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn write_trace(env: &Env, trace: f64, path: String) -> Result<Object<'_>> {
    jobs::run(env, &jobs::OPENINGS, move || {
        trace_of(trace)?.write(Path::new(&path)).map_err(refused)?;
        Ok(Product::default())
    })
}

/// Whether it is of this image.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn check_trace(env: &Env, trace: f64, source: f64) -> Result<Object<'_>> {
    jobs::run(env, &jobs::OPENINGS, move || {
        let source = SOURCES.get(source).ok_or_else(|| failures::closed("source"))?;
        trace_of(trace)?.check(&source.pages).map_err(refused)?;
        Ok(Product::default())
    })
}

/// Bytes of a recording that another process has made, written to a file on another thread, whole or not at all.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn write_recording<'env>(
    env: &'env Env,
    path: String,
    #[napi(ts_arg_type = "Uint8Array")] bytes: View,
) -> Result<Object<'env>> {
    let bytes = copied(&bytes);
    jobs::run(env, &jobs::OPENINGS, move || {
        pager::write_whole(Path::new(&path), &bytes).map_err(refused)?;
        Ok(Product::default())
    })
}

pub(crate) fn in_digits(identity: &[u8]) -> String {
    identity.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[napi(object, object_from_js = false)]
pub struct NativeTrace {
    pub page_size: f64,
    pub image_size: f64,
    /// In hexadecimal digits.
    pub identity: String,
    /// Milliseconds since the epoch.
    pub started: f64,
    pub faults: f64,
    pub dropped: f64,
    #[napi(ts_type = "'complete' | 'full' | 'torn'")]
    pub end: String,
}

/// What a recording says of itself; nothing where it was forgotten.
#[napi(catch_unwind)]
pub fn describe_trace(trace: f64) -> Option<NativeTrace> {
    let trace = TRACES.get(trace)?;
    Some(NativeTrace {
        page_size: f64::from(trace.header.page_size),
        image_size: trace.header.image_size as f64,
        identity: in_digits(&trace.header.identity),
        started: trace.header.started_ms as f64,
        faults: trace.faults.len() as f64,
        dropped: trace.dropped as f64,
        end: match trace.end {
            TraceEnd::Complete => "complete",
            TraceEnd::Full => "full",
            TraceEnd::Torn => "torn",
        }
        .to_owned(),
    })
}

/// Faults from the `from`-th on, `count` at most, seven words each: nanoseconds, kind, write, offset, offset and bytes of what
/// was brought, nanoseconds it took.
#[napi(catch_unwind)]
pub fn trace_faults(trace: f64, from: f64, count: f64) -> Float64Array {
    let rows: Vec<f64> = TRACES.get(trace).map_or_else(Vec::new, |trace| {
        let page_size = u64::from(trace.header.page_size);
        let faults = trace.faults.iter().skip(from as usize).take(count as usize);
        faults.flat_map(|fault| row_of(fault, page_size)).collect()
    });
    rows.into()
}

fn row_of(fault: &TraceFault, page_size: u64) -> [f64; 7] {
    let kind = match fault.kind {
        TraceKind::Missing => 0,
        TraceKind::Minor => 1,
        TraceKind::WriteProtect => 2,
    };
    let brought = fault.brought();
    let bytes = (brought.end - brought.start) * page_size;
    [
        fault.time_ns as f64,
        f64::from(kind),
        f64::from(u8::from(fault.write)),
        (fault.page * page_size) as f64,
        (brought.start * page_size) as f64,
        bytes as f64,
        fault.latency_ns as f64,
    ]
}

/// The working set, in its order: offset and bytes, and again.
#[napi(catch_unwind)]
pub fn trace_ranges(trace: f64) -> Float64Array {
    let words: Vec<f64> = TRACES.get(trace).map_or_else(Vec::new, |trace| {
        let page_size = u64::from(trace.header.page_size);
        let words = trace.working_set().into_iter();
        words
            .flat_map(|pages| [pages.start * page_size, (pages.end - pages.start) * page_size])
            .map(|word| word as f64)
            .collect()
    });
    words.into()
}

#[napi(catch_unwind)]
pub fn forget_trace(trace: f64) {
    drop(TRACES.remove(trace));
}
