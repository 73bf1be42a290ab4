//! The descriptor itself: adopting one, knowing what it is, and whether its process lives.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Mutex;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use userfaultfd_sys as sys;

use crate::error::{AdoptError, Operation, UffdError};
use crate::factory::Backend;
use crate::features::Features;
use crate::page::page_size;
use crate::registrations::Registrations;

/// A userfaultfd of this or another process.
///
/// It is bound to the memory of the process that created it, for ever. Resolving a fault changes only pages that were
/// missing, which no Rust reference can point to: the operation that needs care is registering memory, because from
/// then on touching it waits for whoever serves it. All methods may be called on any thread at the same time; the
/// kernel orders them.
///
/// Dropping the last reference gives zero pages to every thread that still waits.
#[derive(Debug)]
pub struct Userfaultfd {
    inner: userfaultfd::Uffd,
    /// In use; `None` where that cannot be known.
    enabled: Option<Features>,
    /// What the kernel has; known of those created here.
    supported: Option<Features>,
    origin: Option<Origin>,
    registrations: Mutex<Registrations>,
}

/// How a userfaultfd of this process was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// From the device, or by the system call.
    pub backend: Backend,
    /// It sees faults of user mode only.
    pub user_mode_only: bool,
}

/// How many threads wait, as /proc/self/fdinfo shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Faults nobody has read yet.
    pub pending: u64,
    /// Threads that sleep in a fault, read or not.
    pub total: u64,
}

impl Userfaultfd {
    /// Takes over a descriptor that came from elsewhere (SCM_RIGHTS, a FORK event), makes it nonblocking and
    /// close-on-exec, and makes sure that it can be served.
    ///
    /// # Errors
    ///
    /// See [`AdoptError`]. The descriptor is closed then.
    pub fn adopt(fd: OwnedFd) -> Result<Self, AdoptError> {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if link.is_ok_and(|link| link.as_os_str() != "anon_inode:[userfaultfd]") {
            return Err(AdoptError::NotUserfaultfd);
        }
        match probe(fd.as_fd()) {
            Ok(()) | Err(Errno::ENOENT | Errno::EAGAIN) => {}
            Err(Errno::ENOTTY) => return Err(AdoptError::NotUserfaultfd),
            Err(Errno::EINVAL) => return Err(AdoptError::NoHandshake),
            Err(Errno::ESRCH) => return Err(AdoptError::ProcessGone),
            Err(errno) => return Err(AdoptError::System { operation: Operation::Zeropage, errno }),
        }
        let failed = |errno| AdoptError::System { operation: Operation::Fcntl, errno };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed)?;
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)).map_err(failed)?;
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(failed)?;
        let enabled = fdinfo(fd.as_fd()).ok().and_then(|info| info.features);
        Ok(Self::wrap(fd, enabled.map(Features::from_bits_retain)))
    }

    /// The upstream crate's object. Its `copy`, `zeropage` and event methods have known holes; those here do not.
    #[must_use]
    pub fn as_upstream(&self) -> &userfaultfd::Uffd {
        &self.inner
    }

    /// The features in use; of one that came from elsewhere as /proc shows them, `None` where it does not.
    #[must_use]
    pub fn enabled_features(&self) -> Option<Features> {
        self.enabled
    }

    /// The features the kernel has; `None` for one that came from elsewhere.
    #[must_use]
    pub fn supported_features(&self) -> Option<Features> {
        self.supported
    }

    /// How it was made; `None` for one that came from elsewhere.
    #[must_use]
    pub fn origin(&self) -> Option<Origin> {
        self.origin
    }

    /// Gives the descriptor up without closing it.
    #[must_use]
    pub fn into_owned_fd(self) -> OwnedFd {
        let fd = self.inner.as_raw_fd();
        // The upstream type would close the descriptor it hands out.
        std::mem::forget(self.inner);
        // SAFETY: `inner` owned it and will not close it any more.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    /// Whether the process of this uffd has exited or called exec. Has no side effect and needs no memory of it.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        probe(self.as_fd()) == Err(Errno::ESRCH)
    }

    /// How many threads wait, from /proc/self/fdinfo.
    ///
    /// # Errors
    ///
    /// Where /proc is not there, or does not have the lines.
    pub fn waiting(&self) -> io::Result<Waiting> {
        fdinfo(self.as_fd())?.waiting.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Whether fault messages carry the thread's id.
    pub(crate) fn has_thread_ids(&self) -> bool {
        // Unknown: an id of 0 then says that it is not in use.
        self.enabled.is_none_or(|features| features.contains(Features::THREAD_ID))
    }

    /// Wraps the descriptor of a FORK event: the kernel has made it ready for use, with the parent's features.
    pub(crate) fn of_fork(fd: OwnedFd, enabled: Option<Features>) -> Self {
        Self::wrap(fd, enabled)
    }

    /// Wraps a descriptor whose handshake was just made.
    pub(crate) fn created(
        fd: OwnedFd,
        enabled: Features,
        supported: Features,
        backend: Backend,
        user_mode_only: bool,
    ) -> Self {
        let origin = Some(Origin { backend, user_mode_only });
        Self { supported: Some(supported), origin, ..Self::wrap(fd, Some(enabled)) }
    }

    fn wrap(fd: OwnedFd, enabled: Option<Features>) -> Self {
        // SAFETY: `into_raw_fd` gives up ownership; from here on `inner` alone closes it.
        let inner = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        Self { inner, enabled, supported: None, origin: None, registrations: Mutex::default() }
    }

    pub(crate) fn registrations(&self) -> &Mutex<Registrations> {
        &self.registrations
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// ZEROPAGE of address 0, which is never mapped: ENOENT while the process lives, ESRCH when it is gone, EAGAIN while its
/// address space is changing, EINVAL before the handshake, ENOTTY on other files.
fn probe(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let range = sys::uffdio_range { start: 0, len: page_size() as u64 };
    let mut arg = sys::uffdio_zeropage { range, mode: 0, zeropage: 0 };
    // SAFETY: `arg` lives across the call and has the size that the number encodes. On a file that is no uffd the
    // number is unknown, so nothing happens.
    unsafe { crate::ioctl::zeropage(fd.as_raw_fd(), &raw mut arg) }.map(drop)
}

#[derive(Debug, PartialEq, Eq)]
struct FdInfo {
    waiting: Option<Waiting>,
    features: Option<u64>,
}

fn fdinfo(fd: BorrowedFd<'_>) -> io::Result<FdInfo> {
    fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).map(|text| parse_fdinfo(&text))
}

fn parse_fdinfo(text: &str) -> FdInfo {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let number = |name: &str| field(name).and_then(|value| value.parse().ok());
    let waiting = match (number("pending:"), number("total:")) {
        (Some(pending), Some(total)) => Some(Waiting { pending, total }),
        _ => None,
    };
    // "API:	aa:<features>:<ioctls>"; bit 31 says that the handshake was made.
    let features = field("API:")
        .and_then(|value| value.split(':').nth(1))
        .and_then(|value| u64::from_str_radix(value, 16).ok())
        .map(|value| value & !(1 << 31));
    FdInfo { waiting, features }
}

impl UffdError {
    /// The error of a read(2) of messages.
    pub(crate) fn of_read(errno: Errno) -> Self {
        Self::System { operation: Operation::Read, errno }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_tells_who_waits_and_what_is_enabled() {
        let info = parse_fdinfo("pos:\t0\nflags:\t02004000\npending:\t2\ntotal:\t5\nAPI:\taa:80000008:1ff\n");

        assert_eq!(info.waiting, Some(Waiting { pending: 2, total: 5 }));
        assert_eq!(info.features, Some(sys::UFFD_FEATURE_EVENT_REMOVE));
    }

    #[test]
    fn fdinfo_of_another_file_tells_nothing() {
        assert_eq!(parse_fdinfo("pos:\t0\nflags:\t0100000\n"), FdInfo { waiting: None, features: None });
    }
}
