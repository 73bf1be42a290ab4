//! The memory of another process: writing to it, and joining its pages to transparent huge pages.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::liveness::PidFd;

/// `MADV_COLLAPSE` (Linux 6.1), which the C library does not name everywhere.
pub(crate) const MADV_COLLAPSE: libc::c_int = 25;
/// `process_madvise(2)` and `process_vm_writev(2)` take so many ranges at once.
const MOST_RANGES: usize = 1024;

impl PidFd {
    /// `process_vm_writev(2)`: writes each of `parts` where it says, in order. Missing pages are made; where one is registered
    /// with a userfaultfd this waits for whoever answers its faults. Returns the bytes written, which are all unless
    /// something is in the way.
    ///
    /// # Errors
    ///
    /// Nothing was written: ESRCH when it is gone, EPERM when this may not trace it, EFAULT when nothing is mapped there.
    pub fn write_memory(&self, parts: &[(u64, &[u8])]) -> Result<usize, Errno> {
        let parts = parts.get(..MOST_RANGES).unwrap_or(parts);
        let local: Vec<libc::iovec> = parts
            .iter()
            .map(|(_, bytes)| libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            })
            .collect();
        let remote: Vec<libc::iovec> = parts
            .iter()
            .map(|&(address, bytes)| libc::iovec {
                iov_base: std::ptr::without_provenance_mut(address as usize),
                iov_len: bytes.len(),
            })
            .collect();
        // While it has not exited, nobody else has its number.
        if self.has_exited().unwrap_or(true) {
            return Err(Errno::ESRCH);
        }
        let count = parts.len() as u64;
        // SAFETY: the vectors live across the call, and what the local ones name is borrowed and only read. The others are
        // the other process's, and checked by the kernel.
        let result = unsafe {
            libc::syscall(
                libc::SYS_process_vm_writev,
                self.pid(),
                local.as_ptr(),
                count,
                remote.as_ptr(),
                count,
                0_u64,
            )
        };
        Errno::result(result).map(|bytes| bytes as usize)
    }

    /// Joins the pages of ranges, whole blocks, to transparent huge pages (`process_madvise(2)`, `MADV_COLLAPSE`; Linux 6.1).
    /// Returns the bytes that are huge pages now; it stops at the first block that is refused.
    ///
    /// # Errors
    ///
    /// The first block was refused: EPERM where this may not trace the process, or has not CAP_SYS_NICE; EAGAIN and ENOMEM
    /// where trying later can help; EBUSY and EINVAL as of [`Collapsed`](crate::Collapsed); ESRCH when it is gone.
    pub fn collapse(&self, ranges: &[Range<u64>]) -> Result<usize, Errno> {
        let ranges = ranges.get(..MOST_RANGES).unwrap_or(ranges);
        let vectors: Vec<libc::iovec> = ranges
            .iter()
            .map(|range| libc::iovec {
                iov_base: std::ptr::without_provenance_mut(range.start as usize),
                iov_len: (range.end - range.start) as usize,
            })
            .collect();
        // SAFETY: the vectors live across the call; what they name is the other process's, of which no byte changes.
        let result = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.as_fd().as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as u64,
                MADV_COLLAPSE,
                0,
            )
        };
        Errno::result(result).map(|bytes| bytes as usize)
    }

    /// Whether [`PidFd::write_memory`] is allowed, without touching anything.
    ///
    /// # Errors
    ///
    /// EPERM; ESRCH when it is gone.
    pub fn check_write_memory(&self) -> Result<(), Errno> {
        // Nothing is ever mapped there.
        match self.write_memory(&[(0, &[0])]) {
            Ok(_) | Err(Errno::EFAULT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Whether [`PidFd::collapse`] is allowed, without touching anything.
    ///
    /// # Errors
    ///
    /// EPERM; ENOSYS and EINVAL where the kernel has no such thing; ESRCH when it is gone.
    pub fn check_collapse(&self) -> Result<(), Errno> {
        self.collapse(&[]).map(drop)
    }
}
