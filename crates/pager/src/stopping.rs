//! Stopping a process for a while, so that nothing of it runs.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use uffd::errno_of;
use uffd::liveness::PidFd;

use crate::error::PagerError;

/// How long its threads may take until all of them have stopped. One that waits for a page stops when that is there.
const DEADLINE: Duration = Duration::from_secs(1);

/// A process that is being stopped, or has been. It goes on when this is dropped, unless it was stopped before.
pub(crate) struct Stopped {
    process: PidFd,
    deadline: Instant,
    /// It is ours to let it go on.
    ours: bool,
}

impl Stopped {
    /// Has it stop (SIGSTOP).
    ///
    /// # Errors
    ///
    /// When it is gone, or not ours to stop.
    pub(crate) fn begin(process: PidFd) -> Result<Self, Errno> {
        let ours = !has_stopped(process.pid());
        if ours {
            process.send_signal(libc::SIGSTOP).map_err(|error| errno_of(&error))?;
        }
        Ok(Self { process, deadline: Instant::now() + DEADLINE, ours })
    }

    pub(crate) fn process(&self) -> &PidFd {
        &self.process
    }

    /// Whether none of its threads runs.
    pub(crate) fn is_complete(&self) -> bool {
        // Twice: a thread that the first look has not seen was made by one that ran then, and is seen by the second.
        has_stopped(self.process.pid()) && has_stopped(self.process.pid())
    }

    /// Why it is no use to wait any longer, if it is none.
    pub(crate) fn too_late(&self) -> Option<PagerError> {
        let ms = DEADLINE.as_millis() as u64;
        (Instant::now() >= self.deadline)
            .then_some(PagerError::Timeout { what: "the threads of the process did not stop", ms })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.ours {
            // It may be gone.
            let _ = self.process.send_signal(libc::SIGCONT);
        }
    }
}

/// Whether all threads are stopped, by a signal or a tracer, or have ended.
fn has_stopped(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.into_iter().all(|thread| {
        let Ok(thread) = thread else { return false };
        match std::fs::read_to_string(thread.path().join("stat")) {
            // Behind the name, which may have anything in it.
            Ok(stat) => stat
                .rsplit_once(") ")
                .is_some_and(|(_, rest)| matches!(rest.as_bytes().first(), Some(b'T' | b't' | b'Z' | b'X'))),
            Err(error) => matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
        }
    })
}
