//! Processes held by pidfd: a uffd never tells that its process died.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fd_passing::peer_credentials;

/// `SO_PEERPIDFD` (Linux 6.5), which libc does not name yet.
const SO_PEERPIDFD: libc::c_int = 77;

/// Why there is no pidfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LivenessError {
    /// The process has exited and was reaped.
    #[error("the process is gone")]
    Gone,
    /// A system call failed.
    #[error("{syscall}: {source}")]
    System {
        /// Which.
        syscall: &'static str,
        /// How.
        source: io::Error,
    },
}

/// A process, whatever its number is reused for.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: i32,
}

impl PidFd {
    /// The process that connected the other end of a Unix socket: `SO_PEERPIDFD` where the kernel has it (which cannot
    /// be fooled by a reused number), else `SO_PEERCRED` and `pidfd_open(2)`.
    ///
    /// # Errors
    ///
    /// [`LivenessError::Gone`] when it has exited; else what failed.
    pub fn of_peer(socket: BorrowedFd<'_>) -> Result<Self, LivenessError> {
        let credentials = peer_credentials(socket).map_err(|source| failed("SO_PEERCRED", source))?;
        let mut raw = MaybeUninit::<libc::c_int>::uninit();
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: `raw` has room for the `len` bytes that the kernel writes on success.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERPIDFD,
                raw.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        match Errno::result(result) {
            Ok(_) => {
                // SAFETY: the call succeeded, so the kernel has written the descriptor.
                let raw = unsafe { raw.assume_init() };
                // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
                let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                Ok(Self { fd, pid: credentials.pid })
            }
            Err(Errno::ENOPROTOOPT) => Self::open(credentials.pid),
            // ENODATA and EINVAL: reaped before the kernel could tell, depending on its version.
            Err(Errno::ESRCH | Errno::ENODATA | Errno::EINVAL) => Err(LivenessError::Gone),
            Err(errno) => Err(failed("SO_PEERPIDFD", errno.into())),
        }
    }

    /// `pidfd_open(2)`.
    ///
    /// # Errors
    ///
    /// [`LivenessError::Gone`] when there is no such process; else what failed.
    pub fn open(pid: i32) -> Result<Self, LivenessError> {
        // SAFETY: takes two numbers. By number: the libc wrapper needs a newer libc than the package's floor.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        match Errno::result(raw) {
            // SAFETY: the kernel has just put this descriptor (a small number) into our table.
            Ok(raw) => Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(raw as i32) }, pid }),
            Err(Errno::ESRCH) => Err(LivenessError::Gone),
            Err(errno) => Err(failed("pidfd_open", errno.into())),
        }
    }

    /// The process's number, as it was when it was found.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has exited (reaped or not).
    ///
    /// # Errors
    ///
    /// When poll(2) fails.
    pub fn has_exited(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
    }

    /// `pidfd_send_signal(2)`: never reaches another process that got the same number.
    ///
    /// # Errors
    ///
    /// ESRCH when it is gone, EPERM when it is not ours.
    pub fn send_signal(&self, signal: i32) -> io::Result<()> {
        let none: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: takes numbers and a null pointer, which asks for the usual siginfo.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal, none, 0) };
        Ok(Errno::result(result).map(drop)?)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn failed(syscall: &'static str, source: io::Error) -> LivenessError {
    LivenessError::System { syscall, source }
}
