//! Knowing that a process is gone, which its uffd never tells: no message, no hang-up.
//!
//! A pidfd says it without being asked; it needs to have been taken while the process lived. The uffd itself can be
//! asked: [`Userfaultfd::is_dead`] needs nothing and changes nothing. [`DeadUffdChecker`] asks in the way that is known
//! from crosvm, for programs that have it.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;

use crate::deadline::Deadline;
use crate::error::UffdError;
use crate::fd_passing::peer_credentials;
use crate::features::Modes;
use crate::mapping::Mapping;
use crate::mapping_options::{AnonymousOptions, MappingError};
use crate::page::page_size;
use crate::userfaultfd::Userfaultfd;

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
                let peer = Self { fd, pid: credentials.pid };
                // Since Linux 6.16 there is a pidfd of a process that was reaped, too.
                match peer.send_signal(0) {
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(LivenessError::Gone),
                    _ => Ok(peer),
                }
            }
            Err(Errno::ENOPROTOOPT) => Self::open(credentials.pid),
            // ENODATA and EINVAL: reaped before the kernel was asked; which one depends on its version.
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

    /// Takes a pidfd that came from elsewhere.
    ///
    /// # Errors
    ///
    /// EINVAL when it is some other kind of file.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, LivenessError> {
        let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        let info = std::fs::read_to_string(&path).map_err(|source| failed("read of /proc", source))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        let none = || failed("pidfd", io::Error::from_raw_os_error(libc::EINVAL));
        Ok(Self { pid: pid.ok_or_else(none)?, fd })
    }

    /// The process's number, as it was when it was found; -1 where a pidfd came from elsewhere and the process was reaped.
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
        self.wait(Duration::ZERO)
    }

    /// Waits until it has exited; `false` when `timeout` passes first. The descriptor is readable from then on, so an
    /// event loop needs no thread for this.
    ///
    /// # Errors
    ///
    /// When poll(2) fails.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        Deadline::after(timeout).wait_for(self.fd.as_fd(), PollFlags::POLLIN)
    }

    /// Another descriptor of the same process.
    ///
    /// # Errors
    ///
    /// When no descriptor is free.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, pid: self.pid })
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

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> Self {
        pidfd.fd
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// When a process was started, in ticks since the machine was: with its number, that is that process and no other. `None` where it
/// has ended, reaped or not, or there is no /proc.
#[must_use]
pub fn started_at(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may have anything in it.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Asks uffds whether their process lives by zero-filling one page that was registered with each of them.
///
/// The page is shared memory that this process and those forked from it have at the same address. A check fills it, so
/// [`DeadUffdChecker::reset`] follows each round of checks; without it the answers stay right, but the page stays
/// resident.
#[derive(Debug)]
pub struct DeadUffdChecker {
    page: Mapping,
}

impl DeadUffdChecker {
    /// Maps the page. To be done before the processes that are to be checked are forked: they inherit it.
    ///
    /// # Errors
    ///
    /// See [`MappingError`].
    pub fn new() -> Result<Self, MappingError> {
        let options = AnonymousOptions { shared: true, ..AnonymousOptions::default() };
        Ok(Self { page: Mapping::anonymous(page_size(), options)? })
    }

    /// The addresses of the page: events about them are the checker's doing.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        let start = self.page.address();
        start..start + self.page.len() as u64
    }

    /// Registers the page with a uffd, for missing faults. Nobody touches the page, so no fault comes of it.
    ///
    /// # Errors
    ///
    /// [`UffdError::UffdClosed`] when the process is gone already; EINVAL when it does not have the page; else as
    /// [`Userfaultfd::register`].
    pub fn register(&self, uffd: &Userfaultfd) -> Result<(), UffdError> {
        // SAFETY: nobody has a reference to the page, nor a way to get one.
        unsafe { uffd.register(self.page.address(), self.page.len() as u64, Modes::MISSING) }.map(drop)
    }

    /// Whether the process of a uffd has exited or called exec. Only the kernel's word for that counts: a uffd that the
    /// page was not registered with, or whose events have to be read first, is alive.
    #[must_use]
    pub fn is_dead(&self, uffd: &Userfaultfd) -> bool {
        // Nobody waits for the page, so there is nobody to wake.
        uffd.zero(self.page.address(), self.page.len() as u64, false) == Err(UffdError::UffdClosed)
    }

    /// Empties the page, in every process (MADV_REMOVE).
    ///
    /// Where a uffd of this process has REMOVE events on and the page registered, this waits until the event has been
    /// read: never call it on the thread that reads. Dropping the checker unmaps the page, which waits likewise where
    /// UNMAP events are on.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn reset(&self) -> Result<(), MappingError> {
        self.page.discard(0, self.page.len())
    }
}

fn failed(syscall: &'static str, source: io::Error) -> LivenessError {
    LivenessError::System { syscall, source }
}
