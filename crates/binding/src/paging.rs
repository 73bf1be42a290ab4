//! `Pager`, as TypeScript drives it: memory that is served without a handshake.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use napi::bindgen_prelude::{BigInt, Function, Object};
use napi::{CleanupEnvHook, Env, Result};
use napi_derive::napi;
use pager::{MinorMemory, Observer, PageSource, Pager, Prepared, Region, Rest, SessionModes, SessionOptions};
use uffd::liveness::PidFd;
use uffd::{CreateOptions, Factory, Features, Modes, Userfaultfd};

use crate::environment::{MAPPINGS, SOURCES, UFFDS};
use crate::exiting::{self, ServesOthers};
use crate::failures;
use crate::filling::fill_of;
use crate::firecracker::{TEARDOWN, rest_of};
use crate::holding::{self, NativePolicy};
use crate::notices::{NativeNotice, Notices, wake_by};
use crate::populating::{self, NativePopulateOptions};
use crate::recording;
use crate::shared_pager;
use crate::thread;
use crate::tracking;
use crate::values::{NativeError, NativeStats};
use crate::waiting::copy;

#[napi(object, object_to_js = false)]
pub struct NativeServeOptions {
    pub source: f64,
    pub on_failure: NativePolicy,
    pub window: Option<u32>,
    #[napi(ts_type = "'windows' | 'fill' | 'huge-fill' | 'replay'")]
    pub mode: String,
    pub collapse: bool,
    /// Milliseconds.
    pub source_timeout: u32,
    /// Which faults are answered.
    pub missing: bool,
    pub minor: bool,
    pub write_protect: bool,
    /// What is done about the working set, by its number.
    pub working_set: Option<f64>,
}

impl NativeServeOptions {
    /// What memory is registered for, and what a userfaultfd must have for that.
    fn registration(&self) -> (Modes, Features) {
        let mut modes = Modes::empty();
        let mut require = Features::empty();
        modes.set(Modes::MISSING, self.missing);
        modes.set(Modes::MINOR, self.minor);
        modes.set(Modes::WRITE_PROTECT, self.write_protect);
        require.set(Features::MINOR_SHMEM, self.minor);
        require.set(Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM, self.write_protect);
        require.set(Features::WP_UNPOPULATED, self.write_protect && !self.missing);
        (modes, require)
    }

    fn session(
        &self,
        regions: Vec<Region>,
        page_size: u64,
        source: Arc<dyn PageSource>,
        minor: Option<MinorMemory>,
    ) -> std::result::Result<SessionOptions, NativeError> {
        Ok(SessionOptions {
            label: String::new(),
            regions,
            page_size,
            source,
            policy: (&self.on_failure).into(),
            window: self.window.map(u64::from),
            fill: fill_of(&self.mode, self.collapse),
            source_timeout: Duration::from_millis(u64::from(self.source_timeout)),
            process: None,
            modes: SessionModes { missing: self.missing, minor, write_protect: self.write_protect },
            working_set: recording::prepared(self.working_set)?,
            owner: Some(thread::current()),
            backing: None,
        })
    }
}

#[napi(object, object_to_js = false)]
pub struct NativeServedRegion {
    pub address: BigInt,
    pub length: f64,
    pub source_offset: f64,
    /// Where its first byte is in the memfd, of memory that is brought by writing to one.
    pub memfd_offset: Option<f64>,
}

/// The number of a session, or why there is none.
#[napi(object, object_from_js = false)]
#[derive(Default)]
pub struct NativeServed {
    pub error: Option<NativeError>,
    pub id: f64,
}

type Outcome = std::result::Result<u64, NativeError>;

fn served(outcome: Outcome) -> NativeServed {
    match outcome {
        Ok(id) => NativeServed { error: None, id: id as f64 },
        Err(error) => NativeServed { error: Some(error), ..NativeServed::default() },
    }
}

struct Shared {
    notices: Arc<Notices>,
    pager: Mutex<Option<Arc<Pager>>>,
    /// Sessions of memory of this process.
    own: Mutex<HashSet<u64>>,
}

impl ServesOthers for Shared {
    fn abandon_others(&self) {
        let Some(pager) = self.pager() else { return };
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for id in self.notices.alive() {
            if !own.contains(&id) {
                pager.close_session(id, Rest::Poison);
            }
        }
        self.notices.wait_none_but(&own, TEARDOWN);
    }

    fn tell(&self) {
        self.notices.tell();
    }
}

impl Shared {
    fn pager(&self) -> Option<Arc<Pager>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nobody will close them any more: what is missing is poisoned, so that whoever waits does not wait for ever.
    fn abandon(&self) {
        // First: poison can end this process where its own memory has it.
        self.abandon_others();
        let Some(pager) = self.pager.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        for id in self.notices.alive() {
            pager.close_session(id, Rest::Poison);
        }
        self.notices.wait_idle(TEARDOWN);
    }
}

#[napi]
pub struct NativePager {
    shared: Arc<Shared>,
    teardown: Option<CleanupEnvHook<Weak<Shared>>>,
}

/// A pager: the shared one, or one of its own pinned to `cpu`. Without one there are no threads or descriptors left.
#[napi(catch_unwind)]
pub fn create_pager(env: &Env, cpu: Option<u32>, notify: Function<'_, (), ()>) -> Result<NativePager> {
    let wake = wake_by(&notify)?;
    let notices = Arc::new(Notices::new(wake));
    let pager = match shared_pager::acquire(cpu.map(|cpu| cpu as usize)) {
        Ok(pager) => Some(pager),
        Err(error) => {
            notices.push(NativeNotice::failed(&error));
            None
        }
    };
    let shared = Arc::new(Shared { notices, pager: Mutex::new(pager), own: Mutex::default() });
    let weak = Arc::downgrade(&shared);
    exiting::serves(Weak::<Shared>::clone(&weak));
    let teardown = env.add_env_cleanup_hook(weak, |shared| {
        if let Some(shared) = shared.upgrade() {
            shared.abandon();
        }
    })?;
    Ok(NativePager { shared, teardown: Some(teardown) })
}

#[napi]
impl NativePager {
    /// Registers a whole mapping and serves it.
    #[napi(catch_unwind)]
    pub fn serve(&self, mapping: f64, options: NativeServeOptions) -> NativeServed {
        served(self.try_serve(mapping, &options))
    }

    fn try_serve(&self, mapping: f64, options: &NativeServeOptions) -> Outcome {
        let mapping = MAPPINGS.get(mapping).ok_or_else(|| failures::closed("mapping"))?;
        let source = SOURCES.get(options.source).ok_or_else(|| failures::closed("source"))?;
        // What becomes of the memory is followed; forks are not: their child would be another process's memory.
        let prefer = Features::EVENT_REMOVE
            | Features::EVENT_UNMAP
            | Features::EVENT_REMAP
            | Features::THREAD_ID
            | Features::EXACT_ADDRESS;
        let (modes, require) = options.registration();
        // Refused before anything is registered.
        let minor = options
            .minor
            .then(|| MinorMemory::of(&mapping))
            .transpose()
            .map_err(|error| NativeError::from(&error))?;
        let uffd = Factory::open().create(&CreateOptions { require, prefer, ..CreateOptions::default() })?;
        let (address, len) = (mapping.address(), mapping.len() as u64);
        // SAFETY: memory of a mapping of the package's own, of which no reference exists.
        unsafe { uffd.register(address, len, modes) }?;
        let region = Region { address, len, source_offset: 0 };
        let page_size = mapping.page_size() as u64;
        let session = options.session(vec![region], page_size, Arc::clone(&source.pages), minor)?;
        let session = SessionOptions { backing: Some(mapping), ..session };
        let prepared = session.prepare(&uffd).map_err(|error| NativeError::from(&error))?;
        let id = self.start(|| Ok(uffd), prepared)?;
        let alive: HashSet<u64> = self.shared.notices.alive().into_iter().collect();
        let mut own = self.shared.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.retain(|known| alive.contains(known));
        own.insert(id);
        Ok(id)
    }

    /// Serves what is registered with a userfaultfd, which is the pager's from then on.
    #[napi(catch_unwind)]
    pub fn adopt(
        &self,
        uffd: f64,
        regions: Vec<NativeServedRegion>,
        page_size: f64,
        pidfd: Option<i32>,
        memfd: Option<i32>,
        options: NativeServeOptions,
    ) -> NativeServed {
        served(self.try_adopt(uffd, regions, page_size, pidfd, memfd, &options))
    }

    fn try_adopt(
        &self,
        handle: f64,
        regions: Vec<NativeServedRegion>,
        page_size: f64,
        pidfd: Option<i32>,
        memfd: Option<i32>,
        options: &NativeServeOptions,
    ) -> Outcome {
        let source = SOURCES.get(options.source).ok_or_else(|| failures::closed("source"))?;
        let process = pidfd.map(process_of).transpose()?;
        let offsets = regions.iter().map(|region| region.memfd_offset.unwrap_or_default() as u64).collect();
        let minor = memfd.map(copy).transpose()?.map(|memfd| MinorMemory { memfd, offsets });
        let region = |region: NativeServedRegion| Region {
            address: region.address.get_u64().1,
            len: region.length as u64,
            source_offset: region.source_offset as u64,
        };
        let regions = regions.into_iter().map(region).collect();
        let session = options.session(regions, page_size as u64, Arc::clone(&source.pages), minor)?;
        let session = SessionOptions { process, ..session };
        let uffd = UFFDS.get(handle).ok_or_else(|| failures::closed("userfaultfd"))?;
        let prepared = session.prepare(&uffd).map_err(|error| NativeError::from(&error))?;
        drop(uffd);
        // Taken last: whatever was wrong, it is still the caller's.
        let take = || match UFFDS.take(handle) {
            None => Err(failures::closed("userfaultfd")),
            Some(Err(_)) => Err(failures::in_use()),
            Some(Ok(guarded)) => guarded.into_userfaultfd().map_err(|_| failures::in_use()),
        };
        self.start(take, prepared)
    }

    fn start(
        &self,
        uffd: impl FnOnce() -> std::result::Result<Userfaultfd, NativeError>,
        prepared: Prepared,
    ) -> Outcome {
        let pager = self.shared.pager().filter(|_| !exiting::is_abandoning());
        let Some(pager) = pager else { return Err(failures::closed("pager")) };
        let uffd = uffd()?;
        let observer: Arc<dyn Observer> = Arc::<Notices>::clone(&self.shared.notices);
        self.shared.notices.begin(|| Ok(pager.adopt_prepared(uffd, prepared, observer)))
    }

    /// Everything that has happened since the last call.
    #[napi(catch_unwind)]
    pub fn take_notices(&self) -> Vec<NativeNotice> {
        self.shared.notices.take()
    }

    #[napi(catch_unwind)]
    pub fn stats(&self, session: f64) -> Option<NativeStats> {
        self.shared.notices.stats(session as u64)
    }

    /// The last counters of a session that has ended; it is unknown afterwards.
    #[napi(catch_unwind)]
    pub fn forget(&self, session: f64) -> Option<NativeStats> {
        self.shared.notices.forget(session as u64)
    }

    /// What was written to since the last call, up to `most` ranges.
    #[napi(catch_unwind, ts_return_type = "Promise<NativeDirty>")]
    pub fn take_dirty<'env>(&self, env: &'env Env, session: f64, most: u32) -> Result<Object<'env>> {
        tracking::take(env, self.shared.pager().as_deref(), session as u64, most as usize)
    }

    /// Brings what no fault has asked for.
    #[napi(catch_unwind, ts_return_type = "Promise<NativePopulated>")]
    pub fn populate<'env>(
        &self,
        env: &'env Env,
        session: f64,
        options: NativePopulateOptions,
    ) -> Result<Object<'env>> {
        populating::populate(env, self.shared.pager().as_deref(), session, &options)
    }

    /// Ends a session whose memory is all there; the answer comes before its end.
    #[napi(catch_unwind, ts_return_type = "Promise<NativePopulated>")]
    pub fn detach<'env>(&self, env: &'env Env, session: f64) -> Result<Object<'env>> {
        populating::detach(env, self.shared.pager().as_deref(), session)
    }

    /// Gives up a request of `populate`.
    #[napi(catch_unwind)]
    pub fn cancel_populate(&self, session: f64, request: f64) {
        if let Some(pager) = self.shared.pager() {
            pager.cancel_populate(session as u64, request as u64);
        }
    }

    /// Waits until everything that a session replays has been brought.
    #[napi(catch_unwind, ts_return_type = "Promise<NativePopulated>")]
    pub fn replayed<'env>(&self, env: &'env Env, session: f64) -> Result<Object<'env>> {
        recording::replayed(env, self.shared.pager().as_deref(), session)
    }

    /// Ends the recording of a session's faults.
    #[napi(catch_unwind, ts_return_type = "Promise<NativePopulated>")]
    pub fn stop_recording<'env>(&self, env: &'env Env, session: f64) -> Result<Object<'env>> {
        recording::stop(env, self.shared.pager().as_deref(), session)
    }

    /// Keeps the session's faults, without an answer.
    #[napi(catch_unwind, ts_return_type = "Promise<NativePopulated>")]
    pub fn hold<'env>(&self, env: &'env Env, session: f64) -> Result<Object<'env>> {
        holding::hold(env, self.shared.pager().as_deref(), session)
    }

    /// Goes on with a session that is held.
    #[napi(catch_unwind, ts_return_type = "Promise<NativePopulated>")]
    pub fn resume<'env>(&self, env: &'env Env, session: f64, source: Option<f64>) -> Result<Object<'env>> {
        holding::resume(env, self.shared.pager().as_deref(), session, source)
    }

    /// Answers a notice `held` that asks.
    #[napi(catch_unwind)]
    pub fn decide(&self, session: f64, policy: NativePolicy) {
        if let Some(pager) = self.shared.pager() {
            pager.decide(session as u64, (&policy).into());
        }
    }

    #[napi(catch_unwind)]
    pub fn close_session(
        &self,
        session: f64,
        #[napi(ts_arg_type = "'poison' | 'populate' | 'zero'")] rest: String,
    ) {
        if let Some(pager) = self.shared.pager() {
            pager.close_session(session as u64, rest_of(&rest));
        }
    }

    /// The program ends without having closed it.
    #[napi(catch_unwind)]
    pub fn abandon(&self) {
        self.shared.abandon();
    }

    /// Lets go of the pager, when no session is left; the last to do so joins its thread.
    #[napi(catch_unwind)]
    pub fn release(&mut self, env: &Env) -> Result<()> {
        drop(self.shared.pager.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.teardown.take().map_or(Ok(()), |hook| env.remove_env_cleanup_hook(hook))
    }
}

fn process_of(pidfd: i32) -> std::result::Result<PidFd, NativeError> {
    PidFd::from_fd(copy(pidfd)?).map_err(|error| {
        let source = std::io::Error::other(error.to_string());
        failures::system("pidfd", &source)
    })
}
