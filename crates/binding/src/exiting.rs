//! The program ends, whatever waits for a page.

use std::sync::Arc;
use std::time::Duration;

use napi_derive::napi;
use pager::Guarded;

use crate::environment::{self, HANDLERS, UFFDS};
use crate::handlers::Handling;

/// How often it is looked whether the end is held up.
const LOOK: Duration = Duration::from_millis(200);

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
    let (handlers, others): (Vec<_>, Vec<_>) =
        HANDLERS.all().into_iter().partition(|handling| handling.handler.is_own());
    for handling in others {
        // A kernel that cannot poison: nothing is left.
        let _ = handling.handler.end(true, "the program has ended");
    }
    let unhandled = UFFDS.all().into_iter().filter(|uffd| !uffd.is_handled());
    let (uffds, others): (Vec<_>, Vec<_>) = unhandled.partition(|uffd| uffd.is_of_this_process());
    for uffd in others {
        environment::poison_if_waiting(&uffd);
    }
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
