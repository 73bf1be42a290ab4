//! A bounded pool of threads for what may wait for a page: libuv's own pool is left to those who do not.

use std::collections::VecDeque;
use std::os::fd::{IntoRawFd, OwnedFd};
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
pub(crate) struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// Threads that share a queue.
pub(crate) struct Pool {
    state: Mutex<Option<State>>,
    more: Condvar,
}

/// For what may wait for a page.
pub(crate) static ACCESSES: Pool = Pool::new();
/// For what waits for a descriptor, at most 100 ms at a time. Apart from the accesses, because those may wait for what comes
/// of it.
pub(crate) static WAITS: Pool = Pool::new();
/// For the opening of images. Apart from the accesses, because those may wait for a page of one of them.
pub(crate) static OPENINGS: Pool = Pool::new();
/// For reads of sources on behalf of a pager elsewhere. Apart from all others: those may wait for what that pager brings.
pub(crate) static READS: Pool = Pool::new();

/// What a job came to.
#[napi(object, object_from_js = false)]
pub struct NativeJob {
    pub error: Option<NativeError>,
    pub bytes: Option<Buffer>,
    pub fds: Option<Vec<i32>>,
    pub ready: Option<bool>,
    pub handle: Option<f64>,
}

/// What a job gives.
#[derive(Default)]
pub(crate) struct Product {
    pub(crate) bytes: Option<Vec<u8>>,
    pub(crate) fds: Option<Vec<OwnedFd>>,
    pub(crate) ready: Option<bool>,
    pub(crate) handle: Option<f64>,
}

pub(crate) type Outcome = std::result::Result<Product, NativeError>;

/// Does something on a thread of a pool; the promise it returns is resolved with what came of it.
pub(crate) fn run<'env>(
    env: &'env Env,
    pool: &'static Pool,
    act: impl FnOnce() -> Outcome + Send + 'static,
) -> Result<Object<'env>> {
    type Resolver = Box<dyn FnOnce(Env) -> Result<NativeJob>>;
    let (deferred, promise): (JsDeferred<NativeJob, Resolver>, _) = env.create_deferred()?;
    pool.submit(Box::new(move || {
        let outcome = act();
        deferred.resolve(Box::new(move |_| Ok(job_of(outcome))));
    }))
    .map_err(|error| napi::Error::from_reason(format!("no thread could be started: {error}")))?;
    Ok(promise)
}

/// Descriptors become JavaScript's here: a job nobody hears of closes them.
fn job_of(outcome: Outcome) -> NativeJob {
    match outcome {
        Ok(product) => NativeJob {
            error: None,
            bytes: product.bytes.map(Buffer::from),
            fds: product.fds.map(|fds| fds.into_iter().map(OwnedFd::into_raw_fd).collect()),
            ready: product.ready,
            handle: product.handle,
        },
        Err(error) => NativeJob { error: Some(error), bytes: None, fds: None, ready: None, handle: None },
    }
}

impl Pool {
    const fn new() -> Self {
        Self { state: Mutex::new(None), more: Condvar::new() }
    }

    /// Only whole values are put in and taken out under this lock.
    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn submit(&'static self, job: Job) -> std::io::Result<()> {
        let mut guard = self.lock();
        let state = guard.get_or_insert_default();
        state.queue.push_back(job);
        if state.idle >= state.queue.len() || state.threads == MOST_THREADS {
            self.more.notify_one();
            return Ok(());
        }
        match std::thread::Builder::new().name("uffd-job".into()).spawn(|| self.work()) {
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

    fn work(&self) {
        while let Some(job) = self.next() {
            // A panic must not take the thread out of the count.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        }
    }

    fn next(&self) -> Option<Job> {
        let mut guard = self.lock();
        loop {
            let state = guard.get_or_insert_default();
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            state.idle += 1;
            let (again, waited) = self.more.wait_timeout(guard, IDLE).unwrap_or_else(PoisonError::into_inner);
            guard = again;
            let state = guard.get_or_insert_default();
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}
