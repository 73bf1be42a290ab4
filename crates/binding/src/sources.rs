//! Sources of pages by number: files, and JavaScript that is asked.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use napi::bindgen_prelude::{Float64Array, Function, Object};
use napi::threadsafe_function::ThreadsafeFunctionCallMode;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{
    CallbackOptions, CallbackSource, Fetcher, FileOptions, FileSource, LayeredSource, MemorySource, Overlay,
    OverlaySource, PageSource, PagerError, ZeroSource,
};

use crate::environment::{self, SOURCES};
use crate::jobs::{self, Product};
use crate::notices::{Wake, wake_by};
use crate::thread;
use crate::values::NativeError;
use crate::views::View;

/// A source, and where its requests wait if it is JavaScript's.
pub(crate) struct Source {
    pub(crate) pages: Arc<dyn PageSource>,
    asked: Option<(Arc<CallbackSource>, Arc<Requests>)>,
}

impl Source {
    pub(crate) fn new(pages: Arc<dyn PageSource>) -> Self {
        Self { pages, asked: None }
    }

    /// Nobody answers any more. Others go on for the sessions that have them.
    pub(crate) fn close(&self) {
        if let Some((source, _)) = &self.asked {
            source.close();
        }
    }
}

#[napi(object, object_from_js = false)]
#[derive(Default)]
pub struct NativeSource {
    pub error: Option<NativeError>,
    pub handle: f64,
}

type Opened = std::result::Result<Arc<dyn PageSource>, PagerError>;

/// Opens a source on another thread: it may wait for a disk.
fn open_elsewhere(env: &Env, open: impl FnOnce() -> Opened + Send + 'static) -> Result<Object<'_>> {
    let env_id = environment::of(env)?;
    jobs::run(env, &jobs::OPENINGS, move || {
        let source = open().map_err(|error| NativeError::from(&error))?;
        let handle = SOURCES.insert(Arc::new(Source::new(source)), env_id);
        Ok(Product { handle: Some(handle), ..Product::default() })
    })
}

fn opened(env: &Env, source: Opened) -> Result<NativeSource> {
    match source {
        Ok(source) => {
            let handle = SOURCES.insert(Arc::new(Source::new(source)), environment::of(env)?);
            Ok(NativeSource { error: None, handle })
        }
        Err(error) => Ok(NativeSource { error: Some((&error).into()), ..NativeSource::default() }),
    }
}

/// An image in a file; `direct`: past the page cache; `may_change`: it may be written to meanwhile.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn open_file_source(env: &Env, path: String, direct: bool, may_change: bool) -> Result<Object<'_>> {
    open_elsewhere(env, move || {
        Ok(Arc::new(FileSource::open_with(Path::new(&path), FileOptions { direct, may_change })?))
    })
}

/// Diffs over a base, the later ones on top.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn open_layered_source(env: &Env, base: f64, diffs: Vec<String>) -> Result<Object<'_>> {
    let base = SOURCES.get(base);
    open_elsewhere(env, move || {
        let base = base.ok_or_else(|| PagerError::Callback("the base is closed".to_owned()))?;
        let diffs: Vec<PathBuf> = diffs.into_iter().map(PathBuf::from).collect();
        Ok(Arc::new(LayeredSource::new(Arc::clone(&base.pages), &diffs)?))
    })
}

/// The bytes of a view, copied.
#[napi(catch_unwind)]
pub fn buffer_source(env: &Env, #[napi(ts_arg_type = "Uint8Array")] bytes: View) -> Result<NativeSource> {
    opened(env, Ok(Arc::new(MemorySource::new(copied(&bytes)))))
}

#[napi(catch_unwind)]
pub fn zero_source(env: &Env, size: f64) -> Result<NativeSource> {
    opened(env, Ok(Arc::new(ZeroSource::new(size as u64))))
}

/// Bytes over a base: of each overlay where it starts and how long it is, and the bytes of all of them.
#[napi(catch_unwind)]
pub fn overlay_source(
    env: &Env,
    base: f64,
    places: Vec<f64>,
    #[napi(ts_arg_type = "Uint8Array")] bytes: View,
) -> Result<NativeSource> {
    let Some(base) = SOURCES.get(base) else {
        return opened(env, Err(PagerError::Callback("the base is closed".to_owned())));
    };
    let bytes = copied(&bytes);
    let (places, _) = places.as_chunks::<2>();
    let mut at = 0;
    let overlays = places.iter().map(|&[offset, len]| {
        let part = bytes.get(at..at + len as usize).unwrap_or_default().to_vec();
        at += len as usize;
        Overlay { offset: offset as u64, bytes: part }
    });
    let source = OverlaySource::new(Arc::clone(&base.pages), overlays.collect());
    opened(env, source.map(|source| Arc::new(source) as Arc<dyn PageSource>))
}

pub(crate) fn copied(view: &View) -> Vec<u8> {
    let mut copy = vec![0_u8; view.len];
    // SAFETY: a view is valid for its length during the call; the copy is ours. Others may write the view meanwhile, which
    // mixes bytes and breaks nothing.
    unsafe { std::ptr::copy_nonoverlapping(view.data, copy.as_mut_ptr(), view.len) };
    copy
}

#[napi(object, object_to_js = false)]
pub struct NativeCallbackOptions {
    pub size: f64,
    pub chunk: u32,
    pub concurrency: u32,
    pub cache_bytes: f64,
}

/// What JavaScript is asked for and has not taken yet.
struct Requests {
    queue: Mutex<VecDeque<[f64; 3]>>,
    wake: Wake,
}

impl Requests {
    /// Only whole requests are put in and taken out under this lock.
    fn lock(&self) -> MutexGuard<'_, VecDeque<[f64; 3]>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the source calls.
struct Asks(Arc<Requests>);

impl Fetcher for Asks {
    fn request(&self, id: u64, offset: u64, len: usize) {
        self.0.lock().push_back([id as f64, offset as f64, len as f64]);
        // A full queue has a call in it that will take this request too; a closing one belongs to an environment that
        // ends, which closes the source.
        self.0.wake.call((), ThreadsafeFunctionCallMode::NonBlocking);
    }

    fn cancel(&self, id: u64) {
        let id = id as f64;
        let mut queue = self.0.lock();
        let asked = queue.len();
        queue.retain(|request| request[0] != id);
        // JavaScript has it already.
        if queue.len() == asked {
            queue.push_back([-id, 0.0, 0.0]);
        }
        drop(queue);
        self.0.wake.call((), ThreadsafeFunctionCallMode::NonBlocking);
    }
}

/// A source that asks: `notify` is called on this thread when there is something to take.
#[napi(catch_unwind)]
pub fn callback_source(
    env: &Env,
    options: NativeCallbackOptions,
    notify: Function<'_, (), ()>,
) -> Result<NativeSource> {
    let wake = wake_by(&notify)?;
    let requests = Arc::new(Requests { queue: Mutex::default(), wake });
    let options = CallbackOptions {
        size: options.size as u64,
        chunk: options.chunk as usize,
        concurrency: options.concurrency as usize,
        cache_bytes: options.cache_bytes as usize,
        thread: Some(thread::current()),
    };
    let source = match CallbackSource::new(options, Box::new(Asks(Arc::clone(&requests)))) {
        Ok(source) => Arc::new(source),
        Err(error) => return Ok(NativeSource { error: Some((&error).into()), ..NativeSource::default() }),
    };
    let pages: Arc<dyn PageSource> = Arc::<CallbackSource>::clone(&source);
    let both = Source { pages, asked: Some((source, requests)) };
    Ok(NativeSource { error: None, handle: SOURCES.insert(Arc::new(both), environment::of(env)?) })
}

/// What is asked for: id, offset, length, and again. A negative id: that request is not wanted any more.
#[napi(catch_unwind)]
pub fn take_requests(handle: f64) -> Float64Array {
    let source = SOURCES.get(handle);
    let taken: Vec<f64> = match source.as_ref().and_then(|source| source.asked.as_ref()) {
        Some((_, requests)) => requests.lock().drain(..).flatten().collect(),
        None => Vec::new(),
    };
    taken.into()
}

/// The bytes of a request.
#[napi(catch_unwind)]
pub fn answer_request(handle: f64, id: f64, #[napi(ts_arg_type = "Uint8Array")] bytes: View) {
    let Some(source) = SOURCES.get(handle) else { return };
    let Some((source, _)) = &source.asked else { return };
    source.answer(id as u64, Ok(&copied(&bytes)));
}

/// Why a request has no bytes.
#[napi(catch_unwind)]
pub fn fail_request(handle: f64, id: f64, message: String) {
    let Some(source) = SOURCES.get(handle) else { return };
    if let Some((source, _)) = &source.asked {
        source.answer(id as u64, Err(PagerError::Callback(message)));
    }
}

/// Bytes of the image; -1 where it was closed.
#[napi(catch_unwind)]
pub fn source_size(handle: f64) -> f64 {
    SOURCES.get(handle).map_or(-1.0, |source| source.pages.size() as f64)
}

/// Forgets the number. With `ended`, nobody answers any more; else sessions that have the source go on.
#[napi(catch_unwind)]
pub fn close_source(handle: f64, ended: bool) {
    if let Some(source) = SOURCES.remove(handle)
        && ended
    {
        source.close();
    }
}

/// Tells the engine of what an object of it stands for: it collects the sooner.
#[napi(catch_unwind)]
pub fn weigh(env: &Env, bytes: f64) -> Result<()> {
    env.adjust_external_memory(bytes as i64).map(drop)
}
