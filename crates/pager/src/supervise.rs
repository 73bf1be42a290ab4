//! The served process: knowing when it is gone, and ending it when its memory cannot be served.

use std::os::fd::{AsFd, BorrowedFd};

use nix::libc::SIGKILL;
use uffd::fd_passing::Credentials;
use uffd::liveness::{LivenessError, PidFd};

/// A process, held by pidfd: its number is never mistaken for another's.
#[derive(Debug)]
pub(crate) struct Supervised {
    pidfd: PidFd,
}

impl Supervised {
    pub(crate) const fn new(pidfd: PidFd) -> Self {
        Self { pidfd }
    }

    /// The process at the other end of a Unix socket, or `None` when it has already exited.
    ///
    /// # Errors
    ///
    /// When the kernel gives no pidfd (before 5.3, or no descriptors left).
    pub(crate) fn of_peer(socket: BorrowedFd<'_>) -> Result<Option<Self>, LivenessError> {
        match PidFd::of_peer(socket) {
            Ok(pidfd) => Ok(Some(Self { pidfd })),
            Err(LivenessError::Gone) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) const fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Whether it has exited.
    pub(crate) fn has_exited(&self) -> bool {
        // A pidfd that cannot be polled says nothing; the next ioctl on the uffd will.
        self.pidfd.has_exited().unwrap_or(false)
    }

    /// Kills it. Its faulting threads sleep killably, whatever they wait for.
    ///
    /// # Errors
    ///
    /// EPERM for a process of another user; ESRCH when it is gone already.
    pub(crate) fn kill(&self) -> std::io::Result<()> {
        self.pidfd.send_signal(SIGKILL)
    }
}

impl AsFd for Supervised {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Who is served, as the kernel told when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl From<Credentials> for Peer {
    fn from(credentials: Credentials) -> Self {
        Self { pid: credentials.pid, uid: credentials.uid, gid: credentials.gid }
    }
}
