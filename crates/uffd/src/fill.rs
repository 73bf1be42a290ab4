//! The ioctls that put something into pages. Each is one attempt and reports exactly what the kernel did; going on
//! behind a page that is in the way, and trying again, are the caller's.
//!
//! The output field is 0 before each call, because the kernel leaves it alone when it refuses early.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use userfaultfd_sys as sys;

use crate::error::{Operation, UffdError};
use crate::ioctl;
use crate::userfaultfd::Userfaultfd;

/// How pages are copied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOptions {
    /// Wake the threads that wait for these pages. Without it they sleep until [`Userfaultfd::wake`]. Default: yes.
    pub wake: bool,
    /// Install the pages write-protected; the range must be registered for that. Default: no.
    pub write_protect: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self { wake: true, write_protect: false }
    }
}

impl CopyOptions {
    fn mode(self) -> u64 {
        let wake = if self.wake { 0 } else { sys::UFFDIO_COPY_MODE_DONTWAKE };
        let protect = if self.write_protect { sys::UFFDIO_COPY_MODE_WP } else { 0 };
        wake | protect
    }
}

impl Userfaultfd {
    /// `UFFDIO_COPY`: fills the missing pages of `dst..dst + len` (of the uffd's process) from `src` (of this one).
    ///
    /// # Safety
    ///
    /// `src..src + len` is mapped and not written meanwhile. If the uffd is this process's own, no Rust reference to
    /// the destination exists.
    ///
    /// # Errors
    ///
    /// See [`UffdError`]; every variant but `System` can occur.
    pub unsafe fn copy(
        &self,
        dst: u64,
        src: *const u8,
        len: usize,
        options: CopyOptions,
    ) -> Result<(), UffdError> {
        let len = len as u64;
        let mut arg = sys::uffdio_copy { dst, src: src as u64, len, mode: options.mode(), copy: 0 };
        // SAFETY: `arg` lives across the call and has the size that the number encodes (asserted in userfaultfd-sys).
        // What it points to is the caller's promise; where it points to, the kernel checks.
        let result = retried(|| unsafe { ioctl::copy(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::of_fill(Operation::Copy, errno, arg.copy, len))
    }

    /// `UFFDIO_ZEROPAGE`: fills missing pages with zeros. Not for huge pages.
    ///
    /// # Errors
    ///
    /// See [`UffdError`]. EINVAL on huge pages.
    pub fn zero(&self, start: u64, len: u64, wake: bool) -> Result<(), UffdError> {
        let mode = if wake { 0 } else { sys::UFFDIO_ZEROPAGE_MODE_DONTWAKE };
        let mut arg = sys::uffdio_zeropage { range: sys::uffdio_range { start, len }, mode, zeropage: 0 };
        // SAFETY: `arg` lives across the call and has the size that the number encodes. Only missing pages are
        // filled, so no memory that anybody has seen changes.
        let result = retried(|| unsafe { ioctl::zeropage(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::of_fill(Operation::Zeropage, errno, arg.zeropage, len))
    }

    /// `UFFDIO_POISON` (Linux 6.6): touching these missing pages becomes a SIGBUS, also for those who wait now.
    /// Outlives the registration and the uffd.
    ///
    /// # Errors
    ///
    /// See [`UffdError`]. EINVAL before Linux 6.6.
    pub fn poison(&self, start: u64, len: u64, wake: bool) -> Result<(), UffdError> {
        let mode = if wake { 0 } else { sys::UFFDIO_POISON_MODE_DONTWAKE };
        let mut arg = sys::uffdio_poison { range: sys::uffdio_range { start, len }, mode, updated: 0 };
        // SAFETY: `arg` lives across the call and has the size that the number encodes. Only missing pages are marked.
        let result = retried(|| unsafe { ioctl::poison(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::of_fill(Operation::Poison, errno, arg.updated, len))
    }

    /// `UFFDIO_WAKE`: the threads that wait for the range look again, and fault again if nothing was installed.
    ///
    /// # Errors
    ///
    /// EINVAL for a range that no process could have. Never for one that is not registered, or of a dead process.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut arg = sys::uffdio_range { start, len };
        // SAFETY: `arg` lives across the call and has the size that the number encodes; no memory is touched.
        let result = retried(|| unsafe { ioctl::wake(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::System { operation: Operation::Wake, errno })
    }

    /// `UFFDIO_UNREGISTER`, followed by `UFFDIO_WAKE` of the same range: the kernel itself does not wake the waiters of
    /// ranges registered only for write-protect or minor faults. Pages still missing read zero from now on.
    ///
    /// # Errors
    ///
    /// [`UffdError::UffdClosed`] when the process is gone; else EINVAL, or ENOMEM where splitting mappings hits a limit.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut arg = sys::uffdio_range { start, len };
        // SAFETY: `arg` lives across the call and has the size that the number encodes.
        let result = retried(|| unsafe { ioctl::unregister(self.raw(), &raw mut arg) });
        match result {
            Ok(()) => self.wake(start, len),
            // Ambiguous by itself: also the limit of mappings.
            Err(Errno::ENOMEM) if self.is_dead() => Err(UffdError::UffdClosed),
            Err(errno) => Err(UffdError::System { operation: Operation::Unregister, errno }),
        }
    }

    fn raw(&self) -> i32 {
        self.as_upstream().as_raw_fd()
    }
}

/// Calls again while a signal interrupts.
fn retried(mut call: impl FnMut() -> nix::Result<libc::c_int>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}
