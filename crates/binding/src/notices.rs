//! From the pager's thread to JavaScript: a bounded queue, and one wake-up however much is in it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use napi::Status;
use napi::bindgen_prelude::{Function, retain_current_module_for_unload_safety};
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi_derive::napi;
use pager::{Notice, Observer, PagerError, SessionInfo};

use crate::exiting;
use crate::values::{NativeError, NativePeer, NativeSession, NativeStats};

/// Rejections kept for JavaScript to look at. Started and ended sessions are always kept: `maxSessions` bounds them.
const MOST_REJECTIONS: usize = 256;

/// Weak: it does not keep the process alive. One call in the queue is enough, since a call takes everything.
pub(crate) type Wake = ThreadsafeFunction<(), (), (), Status, false, true, 1>;

/// What other threads wake JavaScript by: `notify` is called on this thread. The addon stays loaded from now on, because
/// they may still be in it when the environment has gone.
pub(crate) fn wake_by(notify: &Function<'_, (), ()>) -> napi::Result<Wake> {
    retain_current_module_for_unload_safety();
    notify
        .build_threadsafe_function()
        .weak::<true>()
        .callee_handled::<false>()
        .max_queue_size::<1>()
        .build_callback(|_| Ok(()))
}

/// Something that happened, for TypeScript to make events and promises of.
#[napi(object, object_from_js = false)]
pub struct NativeNotice {
    #[napi(
        ts_type = "'listening' | 'failed' | 'asking' | 'session' | 'held' | 'resumed' | 'ended' | 'rejected' | 'closed'"
    )]
    pub kind: String,
    /// Milliseconds since the epoch.
    pub at: f64,
    /// Where the server listens.
    pub path: Option<String>,
    pub id: Option<f64>,
    pub session: Option<NativeSession>,
    pub reason: Option<String>,
    pub error: Option<NativeError>,
    pub peer: Option<NativePeer>,
    /// When what is held is poisoned, in milliseconds since the epoch.
    pub until: Option<f64>,
    /// `decide` is to be called.
    pub asks: Option<bool>,
    /// Rejections before this one that did not fit into the queue.
    pub dropped: Option<u32>,
}

impl NativeNotice {
    pub(crate) fn new(kind: &str) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            kind: kind.to_owned(),
            at: at.as_secs_f64() * 1000.0,
            path: None,
            id: None,
            session: None,
            reason: None,
            error: None,
            peer: None,
            until: None,
            asks: None,
            dropped: None,
        }
    }

    pub(crate) fn failed(error: &PagerError) -> Self {
        Self { error: Some(error.into()), ..Self::new("failed") }
    }
}

#[derive(Default)]
struct State {
    queue: VecDeque<NativeNotice>,
    rejections: usize,
    dropped: u32,
    sessions: HashMap<u64, Arc<SessionInfo>>,
    /// Sessions that have not ended.
    alive: HashSet<u64>,
    closed: bool,
}

/// What one server has to tell.
pub(crate) struct Notices {
    state: Mutex<State>,
    closed: Condvar,
    wake: Wake,
}

impl Notices {
    pub(crate) fn new(wake: Wake) -> Self {
        Self { state: Mutex::default(), closed: Condvar::new(), wake }
    }

    /// Only whole values are put in and taken out under this lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, notice: NativeNotice) {
        self.lock().queue.push_back(notice);
        self.tell();
    }

    /// Has JavaScript take what there is.
    pub(crate) fn tell(&self) {
        // A full queue has a call in it that will take this notice too; a closing one has nobody to tell.
        self.wake.call((), ThreadsafeFunctionCallMode::NonBlocking);
    }

    pub(crate) fn take(&self) -> Vec<NativeNotice> {
        let mut state = self.lock();
        if exiting::is_abandoning() {
            return Vec::new();
        }
        state.rejections = 0;
        state.queue.drain(..).collect()
    }

    pub(crate) fn stats(&self, session: u64) -> Option<NativeStats> {
        let info = self.lock().sessions.get(&session).cloned()?;
        Some((&*info).into())
    }

    /// Waits until the server is closed.
    pub(crate) fn wait_closed(&self, deadline: Duration) {
        self.wait_until(deadline, |state| state.closed);
    }

    fn wait_until(&self, deadline: Duration, done: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + deadline;
        let mut state = self.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.closed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Starts a session. It counts as alive before anything can be told of it.
    pub(crate) fn begin<E>(&self, start: impl FnOnce() -> Result<u64, E>) -> Result<u64, E> {
        let mut state = self.lock();
        let id = start()?;
        state.alive.insert(id);
        Ok(id)
    }

    /// The sessions that have not ended.
    pub(crate) fn alive(&self) -> Vec<u64> {
        self.lock().alive.iter().copied().collect()
    }

    /// Waits until all sessions have ended.
    pub(crate) fn wait_idle(&self, deadline: Duration) {
        self.wait_until(deadline, |state| state.alive.is_empty());
    }

    /// Waits until all sessions but these have ended.
    pub(crate) fn wait_none_but(&self, others: &HashSet<u64>, deadline: Duration) {
        self.wait_until(deadline, |state| state.alive.is_subset(others));
    }

    /// What there is to tell of a rejection, unless too many wait already.
    fn rejection(&self, notice: NativeNotice) -> Option<NativeNotice> {
        let mut state = self.lock();
        if state.rejections >= MOST_REJECTIONS {
            state.dropped = state.dropped.saturating_add(1);
            return None;
        }
        state.rejections += 1;
        let dropped = std::mem::take(&mut state.dropped);
        Some(NativeNotice { dropped: Some(dropped).filter(|&dropped| dropped > 0), ..notice })
    }
}

impl Observer for Notices {
    fn notice(&self, notice: Notice) {
        let notice = match notice {
            Notice::SessionStarted(info) => {
                let session = NativeSession::from(&*info);
                let mut state = self.lock();
                state.alive.insert(info.id);
                state.sessions.insert(info.id, info);
                drop(state);
                NativeNotice { session: Some(session), ..NativeNotice::new("session") }
            }
            Notice::SessionEnded { id, end } => {
                self.lock().alive.remove(&id);
                self.closed.notify_all();
                NativeNotice {
                    id: Some(id as f64),
                    reason: Some(end.reason.as_str().to_owned()),
                    error: end.error.as_ref().map(NativeError::from),
                    ..NativeNotice::new("ended")
                }
            }
            Notice::Held { id, peer, hold } => {
                let notice = NativeNotice::new("held");
                let until = hold.until.map(|moment| moment.saturating_duration_since(Instant::now()));
                let (reason, error) = hold.failure.map_or((None, None), |failure| {
                    (Some(failure.reason.as_str().to_owned()), failure.error.as_ref().map(NativeError::from))
                });
                NativeNotice {
                    id: Some(id as f64),
                    reason,
                    error,
                    peer: Some(peer.into()),
                    until: until.map(|left| notice.at + left.as_secs_f64() * 1000.0),
                    asks: Some(hold.asks),
                    ..notice
                }
            }
            Notice::Asking { id, peer, regions, page_size } => {
                let session = NativeSession::new(id, peer, &regions, page_size);
                NativeNotice { session: Some(session), ..NativeNotice::new("asking") }
            }
            Notice::Rejected { asked, peer, error } => {
                let notice = NativeNotice {
                    id: asked.map(|id| id as f64),
                    error: Some(NativeError::from(&error)),
                    peer: peer.map(NativePeer::from),
                    ..NativeNotice::new("rejected")
                };
                // Whoever was asked has to hear of it.
                if asked.is_some() {
                    notice
                } else {
                    match self.rejection(notice) {
                        Some(notice) => notice,
                        None => return,
                    }
                }
            }
            Notice::ServerClosed => {
                self.lock().closed = true;
                self.closed.notify_all();
                NativeNotice::new("closed")
            }
        };
        self.push(notice);
    }
}

impl Notices {
    /// Forgets a session that has ended and returns its last counters.
    pub(crate) fn forget(&self, session: u64) -> Option<NativeStats> {
        let info = self.lock().sessions.remove(&session)?;
        Some((&*info).into())
    }
}
