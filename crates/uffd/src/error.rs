//! What the kernel says, classified once into what the caller does next.

use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::features::Ioctls;

/// The operations of a userfaultfd, by the kernel's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// `UFFDIO_REGISTER`
    Register,
    /// `UFFDIO_UNREGISTER`
    Unregister,
    /// `UFFDIO_WAKE`
    Wake,
    /// `UFFDIO_COPY`
    Copy,
    /// `UFFDIO_ZEROPAGE`
    Zeropage,
    /// `UFFDIO_MOVE`
    Move,
    /// `UFFDIO_CONTINUE`
    Continue,
    /// `UFFDIO_WRITEPROTECT`
    WriteProtect,
    /// `UFFDIO_POISON`
    Poison,
    /// `read(2)`
    Read,
    /// `fcntl(2)`
    Fcntl,
}

impl Operation {
    /// The name of the ioctl or system call.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Register => "UFFDIO_REGISTER",
            Self::Unregister => "UFFDIO_UNREGISTER",
            Self::Wake => "UFFDIO_WAKE",
            Self::Copy => "UFFDIO_COPY",
            Self::Zeropage => "UFFDIO_ZEROPAGE",
            Self::Move => "UFFDIO_MOVE",
            Self::Continue => "UFFDIO_CONTINUE",
            Self::WriteProtect => "UFFDIO_WRITEPROTECT",
            Self::Poison => "UFFDIO_POISON",
            Self::Read => "read",
            Self::Fcntl => "fcntl",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why an operation stopped: one variant per thing the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// EEXIST. Wake the page and go on behind it: the kernel has not woken its waiters. On hugetlb it also means
    /// that the pool is empty, so the rounds have to be counted.
    #[error("a page is already present")]
    PageExist,
    /// ESRCH, or ENOMEM of REGISTER and UNREGISTER once a probe has confirmed it: the process whose memory it is has exited or called exec.
    #[error("the process of this userfaultfd is gone")]
    UffdClosed,
    /// EAGAIN with a count: the first `done` bytes are in and their waiters woken. Go on behind them to learn what
    /// is in the way.
    #[error("stopped after {done} bytes")]
    PartiallyCopied {
        /// Bytes done.
        done: u64,
    },
    /// EAGAIN without a count: nothing was done, because the address space is changing. Read the events, pause,
    /// try again.
    #[error("the address space is changing")]
    Changing,
    /// ENOENT: the range is not registered, or leaves its mapping.
    #[error("the range is not registered or leaves its mapping")]
    NotRegistered,
    /// The range was registered, cannot take these ioctls that were required, and is as it was before again.
    #[error("the range cannot take {missing}")]
    MissingIoctls {
        /// Those that were required and are not there.
        missing: Ioctls,
    },
    /// read(2) came to an end, which a userfaultfd has not: the descriptor is something else by now.
    #[error("the descriptor is at its end, which no userfaultfd has")]
    EndOfFile,
    /// read(2) gave a part of a message, which the kernel never does. The whole ones in front of it can be taken.
    #[error("{bytes} bytes were read, which are not whole messages")]
    ShortRead {
        /// Bytes read.
        bytes: usize,
    },
    /// Everything else.
    #[error("{operation}: {errno}")]
    System {
        /// What was asked for.
        operation: Operation,
        /// What the kernel answered.
        #[source]
        errno: Errno,
    },
}

impl UffdError {
    /// EINVAL of an operation that was not even asked of the kernel.
    #[must_use]
    pub const fn invalid(operation: Operation) -> Self {
        Self::System { operation, errno: Errno::EINVAL }
    }

    /// The errno behind it. `PartiallyCopied` and `Changing` are both EAGAIN.
    #[must_use]
    pub const fn errno(&self) -> Option<i32> {
        Some(match self {
            Self::PageExist => libc::EEXIST,
            Self::UffdClosed => libc::ESRCH,
            Self::PartiallyCopied { .. } | Self::Changing => libc::EAGAIN,
            Self::NotRegistered => libc::ENOENT,
            Self::MissingIoctls { .. } => libc::EOPNOTSUPP,
            Self::EndOfFile => libc::ENODATA,
            Self::ShortRead { .. } => libc::EPROTO,
            Self::System { errno, .. } => *errno as i32,
        })
    }

    /// The operation, where the variant does not leave it open.
    #[must_use]
    pub const fn operation(&self) -> Option<Operation> {
        match self {
            Self::System { operation, .. } => Some(*operation),
            Self::EndOfFile | Self::ShortRead { .. } => Some(Operation::Read),
            _ => None,
        }
    }

    /// Reads the outcome of one of the filling ioctls. `output` is what the kernel left in its last field, which was
    /// 0 before the call: a count, a negative errno, or (refused early; or before Linux 6.15) still 0.
    pub(crate) fn of_fill(operation: Operation, errno: Errno, output: i64, len: u64) -> Self {
        match errno {
            Errno::EAGAIN => match u64::try_from(output) {
                Ok(done @ 1..) if done < len => Self::PartiallyCopied { done },
                _ => Self::Changing,
            },
            Errno::EEXIST => Self::PageExist,
            Errno::ESRCH => Self::UffdClosed,
            Errno::ENOENT => Self::NotRegistered,
            errno => Self::System { operation, errno },
        }
    }
}

/// Why a descriptor cannot be adopted as a userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// It is some other kind of file.
    #[error("it is no userfaultfd")]
    NotUserfaultfd,
    /// `UFFDIO_API` was never called on it.
    #[error("its creator has not made the handshake (UFFDIO_API)")]
    NoHandshake,
    /// The process whose memory it is has exited.
    #[error("the process whose memory it is has exited")]
    ProcessGone,
    /// A system call failed.
    #[error("{operation}: {errno}")]
    System {
        /// What was asked for.
        operation: Operation,
        /// What the kernel answered.
        #[source]
        errno: Errno,
    },
}

/// What the system answered; EIO where the error is not the system's.
#[must_use]
pub fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(errno: Errno, output: i64) -> UffdError {
        UffdError::of_fill(Operation::Copy, errno, output, 8192)
    }

    #[test]
    fn eagain_is_partial_only_with_a_count_below_the_length() {
        assert_eq!(outcome(Errno::EAGAIN, 4096), UffdError::PartiallyCopied { done: 4096 });
        assert_eq!(outcome(Errno::EAGAIN, -11), UffdError::Changing);
        assert_eq!(outcome(Errno::EAGAIN, 0), UffdError::Changing);
        assert_eq!(outcome(Errno::EAGAIN, 8192), UffdError::Changing);
    }

    #[test]
    fn every_other_errno_is_what_the_caller_acts_on() {
        assert_eq!(outcome(Errno::EEXIST, -17), UffdError::PageExist);
        assert_eq!(outcome(Errno::ESRCH, 0), UffdError::UffdClosed);
        assert_eq!(outcome(Errno::ENOENT, -2), UffdError::NotRegistered);
        let other = outcome(Errno::EFAULT, -14);
        assert_eq!(other.errno(), Some(libc::EFAULT));
        assert_eq!(other.operation(), Some(Operation::Copy));
    }
}
