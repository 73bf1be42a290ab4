//! What threads share things by. One place, so that tests can put a model in its stead, which runs the same code in every
//! order of its threads (`tests/concurrency.rs`).

use std::os::fd::{AsFd, BorrowedFd};

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

pub(crate) use std::sync::atomic::{AtomicU8, Ordering};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
pub(crate) use std::thread;

/// An eventfd: rung by anybody, watched by the event loop.
pub(crate) struct Bell(EventFd);

impl Bell {
    pub(crate) fn new() -> Result<Self, Errno> {
        EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(Self)
    }

    pub(crate) fn ring(&self) {
        // The counter cannot overflow: the loop empties it, and a full one wakes it just as well.
        let _ = self.0.write(1);
    }

    pub(crate) fn silence(&self) {
        // Nothing to read: it was silent.
        let _ = self.0.read();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Looks for a while whether something has come to be.
pub(crate) fn look(long: Duration, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() && began.elapsed() < long {
        std::hint::spin_loop();
    }
}

/// Runs a test once, with threads of the system; the model runs it in many orders.
#[cfg(test)]
pub(crate) fn check(test: impl Fn() + Send + Sync + 'static) {
    test();
}
