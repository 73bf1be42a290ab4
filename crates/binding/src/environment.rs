//! The native objects of an environment (the main thread, or a worker) end with it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use napi::{Env, Result};
use pager::{Guarded, Trace, WorkingSet};
use uffd::Userfaultfd;

use crate::buffers::Mapped;
use crate::handlers::{self, Handling};
use crate::signals;
use crate::slots::Slots;
use crate::sources::Source;

/// Userfaultfds by number.
pub(crate) static UFFDS: Slots<Guarded> = Slots::new();
/// Mappings by number.
pub(crate) static MAPPINGS: Slots<Mapped> = Slots::new();

/// Handlers by number.
pub(crate) static HANDLERS: Slots<Handling> = Slots::new();

/// Sources by number.
pub(crate) static SOURCES: Slots<Source> = Slots::new();

/// What is done about working sets, by number.
pub(crate) static WORKING_SETS: Slots<WorkingSet> = Slots::new();

/// Recordings by number.
pub(crate) static TRACES: Slots<Trace> = Slots::new();

/// The program ends.
static EXITING: AtomicBool = AtomicBool::new(false);

pub(crate) fn begin_exit() {
    EXITING.store(true, Ordering::SeqCst);
}

fn is_exiting() -> bool {
    EXITING.load(Ordering::SeqCst)
}

static KNOWN: Mutex<Option<HashSet<usize>>> = Mutex::new(None);

/// The environment as a number; the first time, sees to it that its objects end with it.
pub(crate) fn of(env: &Env) -> Result<usize> {
    let id = env.raw() as usize;
    // Only whole values are put in under this lock.
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.get_or_insert_default().insert(id) {
        napi::bindgen_prelude::retain_current_module_for_unload_safety();
        env.add_env_cleanup_hook(id, end)?;
    }
    Ok(id)
}

fn end(id: usize) {
    if let Some(known) = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        known.remove(&id);
    }
    for source in SOURCES.remove_of(id) {
        source.close();
    }
    handlers::forget_last();
    for handling in HANDLERS.remove_of(id) {
        handling.stop();
        if is_exiting() && handling.handler.is_own() {
            // Whoever waits has nobody, and gets neither poison nor zeros: a thread ends the program in spite of it.
            std::mem::forget(handling);
        } else {
            // A kernel that cannot poison: closing is all that is left.
            let _ = handling.handler.end(true, "the thread of a fault handler has ended");
        }
    }
    for uffd in UFFDS.remove_of(id) {
        if uffd.is_handled() || (is_exiting() && uffd.is_of_this_process()) {
            std::mem::forget(uffd);
            continue;
        }
        uffd.end_guard();
        poison_if_last(&uffd);
    }
    signals::forget(id);
    drop(WORKING_SETS.remove_of(id));
    drop(TRACES.remove_of(id));
    drop(MAPPINGS.remove_of(id));
}

/// Whoever still waits gets SIGBUS and not zeros. (A kernel before 6.6 cannot: there closing is all that is left.)
pub(crate) fn poison_if_last(uffd: &Arc<Guarded>) {
    if Arc::strong_count(uffd) == 1 {
        poison_if_waiting(uffd);
    }
}

pub(crate) fn poison_if_waiting(uffd: &Guarded) {
    let somebody_waits = uffd.waiting().map_or(true, |waiting| waiting.total > 0);
    if somebody_waits {
        let _ = uffd.poison_missing();
    }
}

/// Puts a userfaultfd where JavaScript can name it.
pub(crate) fn keep(env: &Env, uffd: Userfaultfd) -> Result<f64> {
    Ok(UFFDS.insert(Arc::new(Guarded::new(uffd)), of(env)?))
}
