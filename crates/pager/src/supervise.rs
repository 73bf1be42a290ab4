//! The served process: knowing when it is gone, and ending it when its memory cannot be served.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc::SIGKILL;
use uffd::Userfaultfd;
use uffd::fd_passing::Credentials;
use uffd::liveness::{LivenessError, PidFd};

use crate::error::PagerError;
use crate::policy::FailurePolicy;

/// A process, held by pidfd: its number is never mistaken for another's.
#[derive(Debug)]
pub(crate) struct Supervised {
    pidfd: PidFd,
}

impl Supervised {
    pub(crate) const fn new(pidfd: PidFd) -> Self {
        Self { pidfd }
    }

    /// The process at the other end of a Unix socket, which has handed over its memory by `uffd`, or `None` when it has already
    /// exited.
    ///
    /// Before Linux 6.5 it is found by its number, which may have become another process's by then. So the memory is looked at
    /// afterwards: while that has an owner, the number was still its owner's.
    ///
    /// # Errors
    ///
    /// When the kernel gives no pidfd (before 5.3, or no descriptors left).
    pub(crate) fn of_peer(socket: BorrowedFd<'_>, uffd: &Userfaultfd) -> Result<Option<Self>, LivenessError> {
        match PidFd::of_peer(socket) {
            Ok(_) if uffd.is_dead() => Ok(None),
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

/// Makes sure, while there is time to do something about it, that a policy can be kept that may have to kill: where it says so, and
/// where the kernel cannot poison.
///
/// # Errors
///
/// [`PagerError::NoRight`] names the right, or what is missing to find the process.
pub(crate) fn check_policy(
    policy: FailurePolicy,
    process: Option<&PidFd>,
    uffd: &Userfaultfd,
) -> Result<(), PagerError> {
    if policy != FailurePolicy::Kill && uffd.can_poison() {
        return Ok(());
    }
    let what = "the process could not be killed if its memory cannot be served";
    let Some(process) = process else {
        return Err(PagerError::NoRight { what, needs: "a pidfd of the process", errno: Errno::EBADF });
    };
    match process.send_signal(0) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let needs = "the right to signal the process: the same user, or CAP_KILL";
            Err(PagerError::NoRight { what, needs, errno: Errno::EPERM })
        }
        // One that is gone is heard of in another way.
        _ => Ok(()),
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
