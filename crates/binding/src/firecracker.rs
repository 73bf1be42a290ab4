//! `serveFirecracker`, as TypeScript drives it.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use napi::bindgen_prelude::{Function, Object};
use napi::{CleanupEnvHook, Env, Result};
use napi_derive::napi;
use pager::{Images, Listener, Observer, Pager, PagerError, Rest, ServerOptions, WorkingSet};

use crate::exiting::{self, ServesOthers};
use crate::filling::fill_of;
use crate::holding::{self, NativePolicy};
use crate::images::{Memory, NativeImage};
use crate::jobs;
use crate::notices::{NativeNotice, Notices, wake_by};
use crate::populating::{self, NativePopulateOptions};
use crate::recording::{self, Earlier, NativeReplay};
use crate::shared_pager;
use crate::values::NativeStats;

/// How long an environment that ends waits for its sessions to be put through their policy.
pub(crate) const TEARDOWN: Duration = Duration::from_secs(5);

#[napi(object, object_to_js = false)]
pub struct NativeServerOptions {
    /// Where to listen; absent where `fd` listens already.
    pub socket_path: Option<String>,
    pub fd: Option<i32>,
    /// Absent where each process is asked about (`asking`).
    pub memory: Option<String>,
    /// In the place of the file that `memory` names: a source by its number.
    pub source: Option<f64>,
    pub on_failure: NativePolicy,
    pub window: Option<u32>,
    #[napi(ts_type = "'windows' | 'fill' | 'huge-fill' | 'replay'")]
    pub mode: String,
    pub collapse: bool,
    /// Milliseconds.
    pub source_timeout: u32,
    pub peer_uid: Option<u32>,
    pub handshake_timeout: u32,
    pub max_sessions: u32,
    /// Where the faults of each session are recorded.
    pub record: Option<String>,
    pub replay: Option<NativeReplay>,
    pub cpu: Option<u32>,
}

/// The pager in use and the server's id in it, from listening until released.
type Running = Mutex<Option<(Arc<Pager>, u64)>>;

struct Shared {
    notices: Arc<Notices>,
    running: Running,
    /// The environment has ended: a server that starts only now is closed at once.
    ended: AtomicBool,
    /// Held while it is abandoned.
    abandoning: Mutex<()>,
}

impl ServesOthers for Shared {
    fn abandon_others(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.abandon();
    }

    fn tell(&self) {
        self.notices.tell();
    }
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&Pager, u64) -> T) -> Option<T> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|(pager, id)| act(pager, *id))
    }

    fn pager(&self) -> Option<Arc<Pager>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|(pager, _)| Arc::clone(pager))
    }

    /// Nobody will close it any more: its sessions meet their failure policy.
    fn abandon(&self) {
        // Who comes second waits as well: it goes on to end the program.
        let _one = self.abandoning.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((pager, id)) = self.take() {
            pager.abandon_server(id);
            self.notices.wait_closed(TEARDOWN);
        }
    }

    fn take(&self) -> Option<(Arc<Pager>, u64)> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[napi]
pub struct NativeServer {
    shared: Arc<Shared>,
    /// The thread that starts the server, until its notice has been taken.
    starting: Option<JoinHandle<()>>,
    teardown: Option<CleanupEnvHook<Weak<Shared>>>,
}

/// Starts a server on a thread of its own, because opening the image may wait for a disk. What becomes of it is the
/// first notice: `listening` or `failed`.
#[napi(catch_unwind)]
pub fn start_firecracker_server(
    env: &Env,
    options: NativeServerOptions,
    notify: Function<'_, (), ()>,
) -> Result<NativeServer> {
    let wake = wake_by(&notify)?;
    let shared = Arc::new(Shared {
        notices: Arc::new(Notices::new(wake)),
        running: Mutex::new(None),
        ended: AtomicBool::new(exiting::is_abandoning()),
        abandoning: Mutex::new(()),
    });
    let weak = Arc::downgrade(&shared);
    exiting::serves(Weak::<Shared>::clone(&weak));
    let teardown = env.add_env_cleanup_hook(weak, |shared| {
        if let Some(shared) = shared.upgrade() {
            shared.abandon_others();
        }
    })?;
    let starting = Arc::clone(&shared);
    let earlier = options.replay.as_ref().map(Earlier::of).transpose();
    let memory = options.memory.as_ref().map(|memory| Memory::named(memory, options.source));
    let spawned = std::thread::Builder::new()
        .name("uffd-start".into())
        .spawn(move || start(&starting, options, memory, earlier));
    if let Err(error) = &spawned {
        let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
        let error =
            PagerError::Exhausted(format!("no thread could be started for the server (errno {errno})"));
        shared.notices.push(NativeNotice::failed(&error));
    }
    Ok(NativeServer { shared, starting: spawned.ok(), teardown: Some(teardown) })
}

fn start(shared: &Shared, options: NativeServerOptions, memory: Option<Memory>, earlier: Known) {
    match try_start(shared, options, memory, earlier) {
        Ok(path) => {
            shared.notices.push(NativeNotice { path: Some(path), ..NativeNotice::new("listening") });
        }
        Err(error) => shared.notices.push(NativeNotice::failed(&error)),
    }
}

/// What is to be replayed, if there is anything.
type Known = std::result::Result<Option<Earlier>, PagerError>;

/// Where it listens.
fn try_start(
    shared: &Shared,
    options: NativeServerOptions,
    memory: Option<Memory>,
    earlier: Known,
) -> std::result::Result<String, PagerError> {
    let mut working_set = WorkingSet::default();
    let images = match memory {
        Some(memory) => {
            let source = memory.open()?;
            working_set = recording::working_set(&source, options.record.as_deref(), earlier?.as_ref())?;
            Images::One(source)
        }
        None => Images::Asked,
    };
    let pager = shared_pager::acquire(options.cpu.map(|cpu| cpu as usize))?;
    let listener = listener_of(&options)?;
    let path = listener.path().to_string_lossy().into_owned();
    let options = ServerOptions {
        images,
        policy: (&options.on_failure).into(),
        window: options.window.map(u64::from),
        fill: fill_of(&options.mode, options.collapse),
        source_timeout: Duration::from_millis(u64::from(options.source_timeout)),
        peer_uid: options.peer_uid,
        handshake_timeout: Duration::from_millis(u64::from(options.handshake_timeout)),
        max_sessions: options.max_sessions as usize,
        working_set,
        label: String::new(),
    };
    let observer: Arc<dyn Observer> = Arc::<Notices>::clone(&shared.notices);
    let id = pager.serve_firecracker(listener, options, observer);
    *shared.running.lock().unwrap_or_else(PoisonError::into_inner) = Some((pager, id));
    if shared.ended.load(Ordering::SeqCst) {
        shared.abandon();
    }
    Ok(path)
}

/// The last that can fail, so that an inherited socket is the server's exactly when there is a server.
fn listener_of(options: &NativeServerOptions) -> std::result::Result<Listener, PagerError> {
    let Some(fd) = options.fd else {
        let path = Path::new(options.socket_path.as_deref().unwrap_or_default());
        return Listener::bind(path, options.peer_uid);
    };
    // SAFETY: only borrowed for the call below, which refuses a number that is no open socket. Not -1: TypeScript has
    // checked.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    Listener::check(borrowed)?;
    // SAFETY: it is open, and the caller's contract is that nobody else in this process owns it.
    Listener::inherit(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[napi]
impl NativeServer {
    /// Everything that has happened since the last call.
    #[napi(catch_unwind)]
    pub fn take_notices(&mut self) -> Vec<NativeNotice> {
        let notices = self.shared.notices.take();
        if notices.iter().any(|notice| matches!(notice.kind.as_str(), "listening" | "failed"))
            && let Some(starting) = self.starting.take()
        {
            // Its notice was the last it did: no thread of it is left when JavaScript hears of it.
            let _ = starting.join();
        }
        notices
    }

    /// Answers `asking`. The image is opened on a thread of its own; what becomes of the process is the next notice of it.
    #[napi(catch_unwind)]
    pub fn answer(&self, asked: f64, image: NativeImage) {
        let shared = Arc::clone(&self.shared);
        let earlier = image.replay.as_ref().map(Earlier::of).transpose();
        let memory = Memory::named(&image.memory, image.source);
        let open = move || {
            let image = earlier.and_then(|earlier| image.open(memory, earlier.as_ref()));
            shared.with(|pager, _| pager.answer(asked as u64, image));
        };
        if let Err(error) = jobs::OPENINGS.submit(Box::new(open)) {
            let error =
                PagerError::Exhausted(format!("no thread could be started to open the image: {error}"));
            self.shared.with(|pager, _| pager.answer(asked as u64, Err(error)));
        }
    }

    /// Answers `asking`: it gets no image, and is turned away.
    #[napi(catch_unwind)]
    pub fn refuse(&self, asked: f64, reason: String) {
        self.shared.with(|pager, _| pager.answer(asked as u64, Err(PagerError::NoImage(reason))));
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
        self.shared.with(|pager, _| pager.cancel_populate(session as u64, request as u64));
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
        self.shared.with(|pager, _| pager.close_session(session as u64, rest_of(&rest)));
    }

    #[napi(catch_unwind)]
    pub fn close(&self, #[napi(ts_arg_type = "'poison' | 'populate' | 'zero'")] rest: String) {
        self.shared.with(|pager, id| pager.close_server(id, rest_of(&rest)));
    }

    /// Stops listening; what has begun goes on.
    #[napi(catch_unwind)]
    pub fn drain(&self) {
        self.shared.with(Pager::drain_server);
    }

    /// Stops listening; what has begun meets its failure policy.
    #[napi(catch_unwind)]
    pub fn give_up(&self) {
        self.shared.with(Pager::abandon_server);
    }

    /// The program ends without having closed it: its sessions meet their failure policy before this returns.
    #[napi(catch_unwind)]
    pub fn abandon(&self) {
        self.shared.abandon_others();
    }

    /// Lets go of the pager, after `closed`; the last to do so joins its thread, which has nothing left to do.
    #[napi(catch_unwind)]
    pub fn release(&mut self, env: &Env) -> Result<()> {
        drop(self.shared.take());
        self.teardown.take().map_or(Ok(()), |hook| env.remove_env_cleanup_hook(hook))
    }
}

pub(crate) fn rest_of(rest: &str) -> Rest {
    match rest {
        "populate" => Rest::Populate,
        "zero" => Rest::Zero,
        _ => Rest::Poison,
    }
}
