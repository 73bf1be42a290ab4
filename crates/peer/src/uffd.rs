//! The userfaultfd as Firecracker makes one: the device first, the system call where the device does not open,
//! close-on-exec, non-blocking, EVENT_REMOVE, regions registered for missing faults only, unless told otherwise.
//!
//! The numbers are those of linux/userfaultfd.h (x86-64, arm64, riscv64), written out once more on purpose:
//! a peer that took them from the code under test would repeat its mistakes.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::failure::Failure;
use crate::memory::Region;

const DEVICE: &str = "/dev/userfaultfd";
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const USERFAULTFD_IOC_NEW: u32 = 0xaa00;
const UFFDIO_API: u32 = 0xc018_aa3f;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;

/// `UFFD_FEATURE_EVENT_REMOVE`, the one feature Firecracker asks for.
pub(crate) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;

/// Which faults memory is registered for: the bits of UFFDIO_REGISTER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Modes(u64);

impl Modes {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const MISSING: Self = Self(1);
    pub(crate) const WRITE_PROTECT: Self = Self(2);
    pub(crate) const MINOR: Self = Self(4);

    /// Those and these.
    pub(crate) fn and(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

// The size is part of the ioctl number, in bits 16 to 29.
const _: () = assert!(size_of::<Api>() == (UFFDIO_API >> 16 & 0x3fff) as usize);
const _: () = assert!(size_of::<Register>() == (UFFDIO_REGISTER >> 16 & 0x3fff) as usize);

/// How the userfaultfd is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Creation {
    /// Only userfaultfd(2), never the device.
    pub(crate) syscall: bool,
    /// `UFFD_USER_MODE_ONLY`: faults inside system calls fail there instead.
    pub(crate) user_mode_only: bool,
    /// Feature bits of UFFDIO_API.
    pub(crate) features: u64,
}

/// A userfaultfd of this process on which nothing has been called yet.
///
/// # Errors
/// Every way that was tried, each with its errno.
pub(crate) fn create(creation: Creation, blocking: bool) -> Result<OwnedFd, Failure> {
    let mut flags = libc::O_CLOEXEC;
    if !blocking {
        flags |= libc::O_NONBLOCK;
    }
    if creation.user_mode_only {
        flags |= UFFD_USER_MODE_ONLY;
    }
    if creation.syscall {
        return by_syscall(flags)
            .map_err(|error| Failure::io(format!("syscall userfaultfd({flags:#x})"), &error));
    }
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and no memory.
            let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as libc::Ioctl, flags) };
            owned(fd).map_err(|error| {
                Failure::io(format!("ioctl(USERFAULTFD_IOC_NEW, {flags:#x}) on {DEVICE}"), &error)
            })
        }
        Err(refused) => by_syscall(flags).map_err(|error| {
            Failure::new(format!(
                "open of {DEVICE}: {refused}; then syscall userfaultfd({flags:#x}): {error}"
            ))
        }),
    }
}

/// UFFDIO_API with `features`.
///
/// # Errors
/// `EINVAL` for a feature this kernel lacks, `EPERM` for EVENT_FORK without the privilege.
pub(crate) fn enable(uffd: &OwnedFd, features: u64) -> Result<(), Failure> {
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: `api` is the structure of UFFDIO_API, whose size the assertion above proves, and lives across
    // the call.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API as libc::Ioctl, &raw mut api) } == 0 {
        return Ok(());
    }
    Err(Failure::errno(format!("ioctl(UFFDIO_API, features {features:#x})")))
}

/// UFFDIO_REGISTER of the whole region for `modes`.
///
/// # Errors
/// What the ioctl says.
pub(crate) fn register(uffd: &OwnedFd, region: &Region, modes: Modes) -> Result<(), Failure> {
    let mut argument =
        Register { start: region.base as u64, len: region.size as u64, mode: modes.0, ioctls: 0 };
    // SAFETY: `argument` is the structure of UFFDIO_REGISTER, whose size the assertion above proves, and lives
    // across the call. The range is a region: no Rust object lives there whose access could fault.
    if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER as libc::Ioctl, &raw mut argument) } == 0 {
        return Ok(());
    }
    Err(Failure::errno(format!(
        "ioctl(UFFDIO_REGISTER, {} bytes at {:#x}, modes {})",
        region.size, region.base, modes.0
    )))
}

fn by_syscall(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd(2) takes its flags by value and no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    // Descriptors are small; a value that does not fit can only be an error.
    owned(libc::c_int::try_from(fd).unwrap_or(-1))
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to the only caller, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
