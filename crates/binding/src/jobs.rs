//! A bounded pool of threads for what may wait for a page: libuv's own pool is left to those who do not.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use napi::bindgen_prelude::{Buffer, Object};
use napi::{Env, JsDeferred, Result};
use napi_derive::napi;

use crate::values::NativeError;

/// Threads at most: what all of them wait for must not depend on another job.
const MOST_THREADS: usize = 16;
/// How long a thread stays without work.
const IDLE: Duration = Duration::from_secs(2);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);
static MORE: Condvar = Condvar::new();

/// Only whole values are put in and taken out under this lock.
fn lock() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a job came to.
#[napi(object, object_from_js = false)]
pub struct NativeJob {
    pub error: Option<NativeError>,
    pub bytes: Option<Buffer>,
}

pub(crate) type Outcome = std::result::Result<Option<Vec<u8>>, NativeError>;

/// Does something on a thread of the pool; the promise it returns is resolved with what came of it.
pub(crate) fn run<'env>(
    env: &'env Env,
    act: impl FnOnce() -> Outcome + Send + 'static,
) -> Result<Object<'env>> {
    type Resolver = Box<dyn FnOnce(Env) -> Result<NativeJob>>;
    let (deferred, promise): (JsDeferred<NativeJob, Resolver>, _) = env.create_deferred()?;
    submit(Box::new(move || {
        let outcome = act();
        deferred.resolve(Box::new(move |_| {
            Ok(match outcome {
                Ok(bytes) => NativeJob { error: None, bytes: bytes.map(Buffer::from) },
                Err(error) => NativeJob { error: Some(error), bytes: None },
            })
        }));
    }))
    .map_err(|error| napi::Error::from_reason(format!("no thread could be started: {error}")))?;
    Ok(promise)
}

fn submit(job: Job) -> std::io::Result<()> {
    let mut guard = lock();
    let state = guard.get_or_insert_default();
    state.queue.push_back(job);
    if state.idle >= state.queue.len() || state.threads == MOST_THREADS {
        MORE.notify_one();
        return Ok(());
    }
    match std::thread::Builder::new().name("uffd-job".into()).spawn(work) {
        Ok(_) => state.threads += 1,
        // Those that run will come to it.
        Err(_) if state.threads > 0 => {}
        Err(error) => {
            state.queue.pop_back();
            return Err(error);
        }
    }
    Ok(())
}

fn work() {
    while let Some(job) = next() {
        // A panic must not take the thread out of the count.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
    }
}

fn next() -> Option<Job> {
    let mut guard = lock();
    loop {
        let state = guard.get_or_insert_default();
        if let Some(job) = state.queue.pop_front() {
            return Some(job);
        }
        state.idle += 1;
        let (again, waited) = MORE.wait_timeout(guard, IDLE).unwrap_or_else(PoisonError::into_inner);
        guard = again;
        let state = guard.get_or_insert_default();
        state.idle -= 1;
        if waited.timed_out() && state.queue.is_empty() {
            state.threads -= 1;
            return None;
        }
    }
}
