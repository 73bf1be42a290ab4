//! The ioctls that put something into pages. Each is one attempt and reports exactly what the kernel did; going on
//! behind a page that is in the way, and trying again, are the caller's.
//!
//! The output field is 0 before each call, because the kernel leaves it alone when it refuses early.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use userfaultfd_sys as sys;

use crate::error::{Operation, UffdError};
use crate::features::Features;
use crate::ioctl;
use crate::page::page_size;
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

/// How pages of the page cache are mapped in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContinueOptions {
    /// Wake the threads that wait for these pages. Default: yes.
    pub wake: bool,
    /// Map the pages write-protected; the range must be registered for that. Default: no.
    pub write_protect: bool,
}

impl Default for ContinueOptions {
    fn default() -> Self {
        Self { wake: true, write_protect: false }
    }
}

/// How pages are moved in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveOptions {
    /// Wake the threads that wait for these pages. Default: yes.
    pub wake: bool,
    /// Pass over pages that are missing in the source: they stay missing. Default: no.
    pub allow_source_holes: bool,
}

impl Default for MoveOptions {
    fn default() -> Self {
        Self { wake: true, allow_source_holes: false }
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

    /// Whether the kernel has `UFFDIO_POISON`. Asked at an address where nothing is registered: nothing changes.
    #[must_use]
    pub fn can_poison(&self) -> bool {
        if let Some(supported) = self.supported_features() {
            return supported.contains(Features::POISON);
        }
        // The first is below what some kernels take for an address at all.
        [0, 1 << 46].into_iter().any(|address| {
            let asked = self.poison(address, page_size() as u64, false);
            !matches!(asked, Err(UffdError::System { errno: Errno::EINVAL | Errno::ENOTTY, .. }))
        })
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

    /// `UFFDIO_CONTINUE` (Linux 5.13): maps pages of shared memory that are in the page cache already.
    ///
    /// # Errors
    ///
    /// See [`UffdError`]. EFAULT where the page cache has no page, EINVAL for private anonymous memory.
    pub fn continue_pages(&self, start: u64, len: u64, options: ContinueOptions) -> Result<(), UffdError> {
        let wake = if options.wake { 0 } else { sys::UFFDIO_CONTINUE_MODE_DONTWAKE };
        let protect = if options.write_protect { sys::UFFDIO_CONTINUE_MODE_WP } else { 0 };
        let range = sys::uffdio_range { start, len };
        let mut arg = sys::uffdio_continue { range, mode: wake | protect, mapped: 0 };
        // SAFETY: `arg` lives across the call and has the size that the number encodes. It maps what the memory's file
        // already holds.
        let result = retried(|| unsafe { ioctl::continue_pages(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::of_fill(Operation::Continue, errno, arg.mapped, len))
    }

    /// `UFFDIO_MOVE` (Linux 6.8): moves pages from `src` to `dst` without copying; `src` is missing afterwards. Private
    /// anonymous memory of this process only, on both sides.
    ///
    /// # Safety
    ///
    /// No Rust reference to `src..src + len` or `dst..dst + len` exists.
    ///
    /// # Errors
    ///
    /// See [`UffdError`]; here `NotRegistered` says that the source (or an unmapped destination) is not there, and
    /// EINVAL that the destination is not registered. Overlapping ranges are refused with EINVAL without asking the
    /// kernel, which would misplace pages.
    pub unsafe fn move_pages(
        &self,
        dst: u64,
        src: u64,
        len: u64,
        options: MoveOptions,
    ) -> Result<(), UffdError> {
        if dst < src.saturating_add(len) && src < dst.saturating_add(len) {
            return Err(UffdError::System { operation: Operation::Move, errno: Errno::EINVAL });
        }
        let wake = if options.wake { 0 } else { sys::UFFDIO_MOVE_MODE_DONTWAKE };
        let holes = if options.allow_source_holes { sys::UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES } else { 0 };
        let mut arg = sys::uffdio_move { dst, src, len, mode: wake | holes, move_: 0 };
        // SAFETY: `arg` lives across the call and has the size that the number encodes. That nobody refers to the pages
        // is the caller's promise.
        let result = retried(|| unsafe { ioctl::move_pages(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::of_fill(Operation::Move, errno, arg.move_, len))
    }

    /// `UFFDIO_WRITEPROTECT` (Linux 5.7): protects a range registered for that, or takes the protection off and (unless
    /// `wake` is false) wakes who waits for it. Holes of anonymous memory are skipped without a word unless
    /// `wp-unpopulated` is in use. The kernel reports no count; it may have done a first part before it failed.
    ///
    /// # Errors
    ///
    /// See [`UffdError`].
    pub fn write_protect(&self, start: u64, len: u64, protect: bool, wake: bool) -> Result<(), UffdError> {
        // Protecting and "do not wake" exclude each other: protecting wakes nobody.
        let mode = match (protect, wake) {
            (true, _) => sys::UFFDIO_WRITEPROTECT_MODE_WP,
            (false, true) => 0,
            (false, false) => sys::UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
        };
        let mut arg = sys::uffdio_writeprotect { range: sys::uffdio_range { start, len }, mode };
        // SAFETY: `arg` lives across the call and has the size that the number encodes.
        let result = retried(|| unsafe { ioctl::write_protect(self.raw(), &raw mut arg) });
        result.map_err(|errno| UffdError::of_fill(Operation::WriteProtect, errno, 0, len))
    }

    pub(crate) fn raw(&self) -> i32 {
        self.as_upstream().as_raw_fd()
    }
}

/// Calls again while a signal interrupts.
pub(crate) fn retried(mut call: impl FnMut() -> nix::Result<libc::c_int>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}
