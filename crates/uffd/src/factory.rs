//! Making userfaultfds: from /dev/userfaultfd, opened once and kept, or by the system call.
//!
//! The device obeys file permissions only, so a process that opened it keeps the right to create after it has dropped
//! its privileges, and can hand the right to a jailed one. Whatever goes wrong with the device, the system call is
//! tried: a device that exists but may not be opened is what most containers have.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::errno_of;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use userfaultfd_sys as sys;

use crate::features::{Features, Ioctls};
use crate::ioctl;
use crate::userfaultfd::Userfaultfd;

/// The device of Linux 6.1.
pub const DEVICE: &str = "/dev/userfaultfd";

/// How a userfaultfd came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `USERFAULTFD_IOC_NEW` on the device.
    Device,
    /// userfaultfd(2).
    Syscall,
}

/// Which faults a userfaultfd is to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Faults {
    /// All where that is permitted, else those of user mode.
    #[default]
    Permitted,
    /// All: also those that the kernel takes inside system calls. Needs the device, CAP_SYS_PTRACE, or
    /// `vm.unprivileged_userfaultfd=1`.
    All,
    /// Those of user mode (`UFFD_USER_MODE_ONLY`): anybody may. System calls that meet a missing page fail with EFAULT.
    /// Kernels before 5.11 do not know it; all faults are seen there.
    User,
}

/// What is wanted of a new userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// `O_NONBLOCK`; without it the descriptor cannot be polled. Children of FORK events inherit it. Default: yes.
    pub non_blocking: bool,
    /// `O_CLOEXEC`. Default: yes.
    pub close_on_exec: bool,
    /// Which faults it is to see. Default: all that are permitted.
    pub faults: Faults,
    /// Features without which it is of no use.
    pub require: Features,
    /// Features to have where the kernel has them and they are permitted.
    pub prefer: Features,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            non_blocking: true,
            close_on_exec: true,
            faults: Faults::default(),
            require: Features::empty(),
            prefer: Features::empty(),
        }
    }
}

/// Why there is no userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The kernel does not have these features.
    #[error("this kernel does not support the features {missing}")]
    Unsupported {
        /// Those that were required and are not there.
        missing: Features,
    },
    /// The kernel has no userfaultfd at all, or a sandbox hides it.
    #[error("this kernel has no userfaultfd(2), or a seccomp filter refuses it ({errno})")]
    NoUserfaultfd {
        /// ENOSYS.
        errno: Errno,
    },
    /// Creating is not permitted.
    #[error(
        "not permitted: give read access to /dev/userfaultfd{}, or CAP_SYS_PTRACE, or set \
         vm.unprivileged_userfaultfd=1, or be content with faults of user mode",
        device.map(|errno| format!(" ({errno})")).unwrap_or_default()
    )]
    NotPermitted {
        /// Why the device could not be used.
        device: Option<Errno>,
    },
    /// `event-fork` is not permitted.
    #[error("event-fork needs CAP_SYS_PTRACE; prefer it instead of requiring it to go on without")]
    ForkNotPermitted,
    /// A system call failed.
    #[error("{syscall}: {errno}")]
    System {
        /// Which.
        syscall: &'static str,
        /// How.
        errno: Errno,
    },
}

impl CreateError {
    /// The errno behind it.
    #[must_use]
    pub const fn errno(&self) -> Option<i32> {
        match self {
            Self::Unsupported { .. } => None,
            Self::NotPermitted { .. } | Self::ForkNotPermitted => Some(libc::EPERM),
            Self::NoUserfaultfd { errno } | Self::System { errno, .. } => Some(*errno as i32),
        }
    }
}

/// What a kernel offers, from a throw-away descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Supported {
    /// Features it has.
    pub features: Features,
    /// Ioctls of the descriptor itself. Those of a range are told when one is registered.
    pub ioctls: Ioctls,
}

/// The right to create userfaultfds, kept. Usable on any thread.
#[derive(Debug)]
pub struct Factory {
    device: Result<OwnedFd, Errno>,
}

impl Factory {
    /// Opens the device and keeps it. Without it the system call is used: this never fails.
    #[must_use]
    pub fn open() -> Self {
        let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_CLOEXEC.bits()).open(DEVICE);
        let device = opened.map(OwnedFd::from).map_err(|error| errno_of(&error));
        Self { device }
    }

    /// Only the system call.
    #[must_use]
    pub fn syscall_only() -> Self {
        Self { device: Err(Errno::ENODEV) }
    }

    /// Adopts a device that somebody else opened. If it turns out to be another file, the system call is used.
    #[must_use]
    pub fn from_device(device: OwnedFd) -> Self {
        Self { device: Ok(device) }
    }

    /// What creating will try first.
    #[must_use]
    pub fn backend(&self) -> Backend {
        if self.device.is_ok() { Backend::Device } else { Backend::Syscall }
    }

    /// Why the device could not be opened.
    #[must_use]
    pub fn device_error(&self) -> Option<Errno> {
        self.device.as_ref().err().copied()
    }

    /// The device's descriptor, to be handed to a jailed process.
    #[must_use]
    pub fn device(&self) -> Option<BorrowedFd<'_>> {
        self.device.as_ref().ok().map(AsFd::as_fd)
    }

    /// Another factory over the same open device.
    ///
    /// # Errors
    ///
    /// When no descriptor is free.
    pub fn try_clone(&self) -> io::Result<Self> {
        let device = match &self.device {
            Ok(device) => Ok(device.try_clone()?),
            Err(errno) => Err(*errno),
        };
        Ok(Self { device })
    }

    /// What the kernel offers. Uses up a descriptor of its own: the handshake can be made only once.
    ///
    /// # Errors
    ///
    /// See [`CreateError`].
    pub fn probe(&self) -> Result<Supported, CreateError> {
        let new = self.new_fd(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Faults::Permitted)?;
        let api = handshake(&new.fd, Features::empty()).map_err(system("UFFDIO_API"))?;
        Ok(Supported {
            features: Features::from_bits_retain(api.features),
            ioctls: Ioctls::from_bits_retain(api.ioctls),
        })
    }

    /// A userfaultfd of this process's memory, its handshake made.
    ///
    /// # Errors
    ///
    /// See [`CreateError`]. Nothing is left open.
    pub fn create(&self, options: &CreateOptions) -> Result<Userfaultfd, CreateError> {
        let supported = self.probe()?;
        let missing = options.require.difference(supported.features);
        if !missing.is_empty() {
            return Err(CreateError::Unsupported { missing });
        }
        let mut flags = OFlag::empty();
        flags.set(OFlag::O_NONBLOCK, options.non_blocking);
        flags.set(OFlag::O_CLOEXEC, options.close_on_exec);
        let new = self.new_fd(flags, options.faults)?;
        let mut wanted = options.require | options.prefer.intersection(supported.features);
        loop {
            match handshake(&new.fd, wanted) {
                Ok(_) => break,
                Err(Errno::EPERM) if options.require.contains(Features::EVENT_FORK) => {
                    return Err(CreateError::ForkNotPermitted);
                }
                // Refused before anything was set: the same descriptor may try again.
                Err(Errno::EPERM) if wanted.contains(Features::EVENT_FORK) => {
                    wanted.remove(Features::EVENT_FORK)
                }
                Err(errno) => return Err(system("UFFDIO_API")(errno)),
            }
        }
        if wanted.contains(Features::WP_ASYNC) {
            // The kernel turns it on along with it.
            wanted.insert(Features::WP_UNPOPULATED);
        }
        Ok(Userfaultfd::created(new.fd, wanted, supported.features, new.backend, new.user_mode_only))
    }

    fn new_fd(&self, flags: OFlag, faults: Faults) -> Result<New, CreateError> {
        match faults {
            Faults::All => self.new_with(flags.bits(), false),
            Faults::User => self.new_user(flags.bits()),
            Faults::Permitted => match self.new_with(flags.bits(), false) {
                Err(CreateError::NotPermitted { device }) => {
                    self.new_user(flags.bits()).map_err(|error| match error {
                        // Before 5.11, where only the privileged may: the first answer says how to become so.
                        CreateError::System { errno: Errno::EINVAL, .. } => {
                            CreateError::NotPermitted { device }
                        }
                        error => error,
                    })
                }
                result => result,
            },
        }
    }

    fn new_user(&self, flags: i32) -> Result<New, CreateError> {
        match self.new_with(flags | sys::UFFD_USER_MODE_ONLY as i32, true) {
            Err(CreateError::System { errno: Errno::EINVAL, .. }) => self.new_with(flags, false),
            result => result,
        }
    }

    fn new_with(&self, flags: i32, user_mode_only: bool) -> Result<New, CreateError> {
        let mut device_error = self.device_error();
        if let Ok(device) = &self.device {
            // SAFETY: the flags go by value; on a file that is not the device the number is unknown.
            let result =
                unsafe { libc::ioctl(device.as_raw_fd(), sys::USERFAULTFD_IOC_NEW as libc::Ioctl, flags) };
            match Errno::result(result) {
                Ok(raw) => return Ok(New { fd: owned(raw), backend: Backend::Device, user_mode_only }),
                Err(errno) => device_error = Some(errno),
            }
        }
        // SAFETY: takes one number and returns a new descriptor.
        let result = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        match Errno::result(result) {
            Ok(raw) => Ok(New { fd: owned(raw as i32), backend: Backend::Syscall, user_mode_only }),
            Err(Errno::EPERM) => Err(CreateError::NotPermitted { device: device_error }),
            Err(errno @ Errno::ENOSYS) => Err(CreateError::NoUserfaultfd { errno }),
            Err(errno) => Err(system("userfaultfd")(errno)),
        }
    }
}

struct New {
    fd: OwnedFd,
    backend: Backend,
    user_mode_only: bool,
}

fn handshake(fd: &OwnedFd, features: Features) -> Result<sys::uffdio_api, Errno> {
    let mut arg = sys::uffdio_api { api: sys::UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: `arg` lives across the call and has the size that the number encodes.
    unsafe { ioctl::api(fd.as_raw_fd(), &raw mut arg) }?;
    Ok(arg)
}

fn owned(raw: i32) -> OwnedFd {
    // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn system(syscall: &'static str) -> impl Fn(Errno) -> CreateError {
    move |errno| CreateError::System { syscall, errno }
}
