//! Calls of this package that may make the calling thread wait until a message is read: the guards are called beforehand, and
//! read at once instead of at their pace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Calls on their way.
static ANNOUNCED: AtomicUsize = AtomicUsize::new(0);
static BELLS: Mutex<Vec<Arc<Bell>>> = Mutex::new(Vec::new());

/// What a guard sleeps by.
#[derive(Debug)]
pub(crate) struct Bell {
    rung: EventFd,
    stopped: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let rung = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let bell = Arc::new(Self { rung, stopped: AtomicBool::new(false) });
        // Only whole elements are put in and taken out under this lock.
        BELLS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&bell));
        Ok(bell)
    }

    /// Ends the guard's waiting for good.
    pub(crate) fn stop(self: &Arc<Self>) {
        BELLS.lock().unwrap_or_else(PoisonError::into_inner).retain(|bell| !Arc::ptr_eq(bell, self));
        self.stopped.store(true, Ordering::SeqCst);
        let _ = self.rung.write(1);
    }

    /// Whether somebody is in a call that may cause a message.
    pub(crate) fn is_expecting(&self) -> bool {
        ANNOUNCED.load(Ordering::SeqCst) > 0
    }

    /// Sleeps until it is rung, the time is up, or there is a message; whether the guard is to go on.
    pub(crate) fn wait(&self, uffd: Option<BorrowedFd<'_>>, time: Duration) -> bool {
        let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
        let rung = PollFd::new(self.rung.as_fd(), PollFlags::POLLIN);
        // Interrupted: looked at again at the next tick.
        let _ = match uffd {
            Some(uffd) => poll(&mut [rung, PollFd::new(uffd, PollFlags::POLLIN)], timeout),
            None => poll(&mut [rung], timeout),
        };
        // Nothing to read where it was not rung.
        let _ = self.rung.read();
        !self.stopped.load(Ordering::SeqCst)
    }
}

/// A call that may make this thread wait until a message is read, for as long as it lives.
#[derive(Debug)]
pub struct Announced(());

impl Announced {
    /// Has every guard wait for messages from now on.
    #[must_use]
    pub fn new() -> Self {
        ANNOUNCED.fetch_add(1, Ordering::SeqCst);
        for bell in BELLS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = bell.rung.write(1);
        }
        Self(())
    }
}

impl Default for Announced {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        ANNOUNCED.fetch_sub(1, Ordering::SeqCst);
    }
}
