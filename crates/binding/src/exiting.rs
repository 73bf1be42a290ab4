//! The program ends, whatever waits for a page.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use napi_derive::napi;
use pager::Guarded;

use crate::environment::{self, HANDLERS, UFFDS};
use crate::handlers::Handling;

/// How often it is looked whether the end is held up.
const LOOK: Duration = Duration::from_millis(200);

/// What serves memory of other processes.
pub(crate) trait ServesOthers: Send + Sync {
    /// The program ends: their memory has met its policy when this returns.
    fn abandon_others(&self);
    /// JavaScript hears of what has happened.
    fn tell(&self);
}

/// Of all environments.
static SERVING: Mutex<Vec<Weak<dyn ServesOthers>>> = Mutex::new(Vec::new());

/// Has `one` abandoned when the program ends, as long as there is one.
pub(crate) fn serves(one: Weak<dyn ServesOthers>) {
    // Only whole values are put in and taken out under this lock.
    let mut serving = SERVING.lock().unwrap_or_else(PoisonError::into_inner);
    serving.retain(|known| known.strong_count() > 0);
    serving.push(one);
}

fn serving() -> Vec<Arc<dyn ServesOthers>> {
    let serving = SERVING.lock().unwrap_or_else(PoisonError::into_inner);
    serving.iter().filter_map(Weak::upgrade).collect()
}

/// Memory of other processes meets its policy, whichever environment serves it.
pub(crate) fn abandon_all() {
    for one in serving() {
        one.abandon_others();
    }
    for handling in HANDLERS.all() {
        if !handling.handler.is_own() {
            // A kernel that cannot poison: nothing is left.
            let _ = handling.handler.end(true, "the program has ended");
        }
    }
    for uffd in UFFDS.all() {
        if !uffd.is_handled() && !uffd.is_of_this_process() {
            environment::poison_if_waiting(&uffd);
        }
    }
}

/// A signal is about to end the program.
static ABANDONING: AtomicBool = AtomicBool::new(false);

/// JavaScript runs on meanwhile: it is not to hear of ends that it could take for a reason to end otherwise, nor to begin anything.
pub(crate) fn is_abandoning() -> bool {
    ABANDONING.load(Ordering::SeqCst)
}

/// Abandons everything, then ends the program.
pub(crate) fn abandoning(end: impl FnOnce()) {
    ABANDONING.store(true, Ordering::SeqCst);
    abandon_all();
    end();
    // Still there: somebody has begun to listen in the meantime.
    std::thread::sleep(LOOK);
    ABANDONING.store(false, Ordering::SeqCst);
    for one in serving() {
        one.tell();
    }
}

/// Memory of this process, from the moment at which the program ends: environments give up what is theirs meanwhile.
struct Own {
    handlers: Vec<Arc<Handling>>,
    uffds: Vec<Arc<Guarded>>,
}

impl Own {
    fn waiting(&self) -> u64 {
        let handled = self.handlers.iter().map(|handling| &**handling.handler);
        let all = handled.chain(self.uffds.iter().map(|uffd| &**uffd));
        all.map(|uffd| uffd.waiting().map_or(0, |waiting| waiting.total)).sum()
    }
}

/// Called on the main thread when the program ends. Other processes get what their policy says, and never zeros. Threads of this
/// process that wait get neither poison, which would end it by a signal, nor zeros: the program ends with its status in spite
/// of them, once there has been time to end without.
#[napi(catch_unwind)]
pub fn exit_in_spite_of_faults(status: i32) {
    environment::begin_exit();
    // First: nothing ends the program before it is done.
    abandon_all();
    let handlers = HANDLERS.all().into_iter().filter(|handling| handling.handler.is_own()).collect();
    let unhandled = UFFDS.all().into_iter().filter(|uffd| !uffd.is_handled());
    let uffds = unhandled.filter(|uffd| uffd.is_of_this_process()).collect();
    let own = Own { handlers, uffds };
    if own.handlers.is_empty() && own.uffds.is_empty() {
        return;
    }
    // Where no thread is to be had, nothing is lost but the ending in time.
    let _ = std::thread::Builder::new().name("uffd-exit".into()).spawn(move || {
        loop {
            std::thread::sleep(LOOK);
            let waiting = own.waiting();
            if waiting > 0 {
                eprintln!(
                    "userfaultfd: the program ends with status {status} although {waiting} threads wait for pages that \
                     nobody can bring any more"
                );
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(status) };
            }
        }
    });
}
