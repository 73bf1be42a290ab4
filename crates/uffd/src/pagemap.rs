//! /proc/PID/pagemap: which pages are there, and which were written to since they were last write-protected.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) finds ranges of pages by category and can protect what it finds in the same step. With a
//! uffd that has `wp-async` in use, and its memory registered for write-protect, that is dirty tracking without a fault
//! message: protect, run, take what was written. What it sees is this one page table: writes through another mapping, or
//! by write(2) to the memfd, are not seen.

mod abi;

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::error::errno_of;
use bitflags::bitflags;
use nix::errno::Errno;

use self::abi::{CHECK_WPASYNC, RawRegion, ScanArg, WP_MATCHING, pagemap_scan};
use crate::liveness::PidFd;
use crate::page::page_size;

bitflags! {
    /// What is told about a page (`PAGE_IS_*` of linux/fs.h).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Categories: u64 {
        /// Its writes are tracked: registered for write-protect with a uffd that has `wp-async` in use.
        const TRACKED = 1;
        /// Not write-protected: written to, or taken away, since it was; or never protected.
        const WRITTEN = 1 << 1;
        /// Of a file or of shared memory.
        const FILE = 1 << 2;
        /// There.
        const PRESENT = 1 << 3;
        /// Swapped out, or only noted (poisoned, a write-protected hole).
        const SWAPPED = 1 << 4;
        /// The kernel's page of zeros.
        const ZERO = 1 << 5;
        /// A part of a huge page, transparent or from the pool.
        const HUGE = 1 << 6;
        /// Written to since soft-dirty bits were cleared.
        const SOFT_DIRTY = 1 << 7;
        /// A guard (`MADV_GUARD_INSTALL`; told since Linux 6.15).
        const GUARD = 1 << 8;
        const _ = !0;
    }
}

/// Which pages to look for and what to do with them.
///
/// A page is found when it has all categories of `all_of` and, if there are any, one of `any_of`; those of `inverted` count
/// as the opposite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanOptions {
    /// Default: none.
    pub all_of: Categories,
    /// Default: none.
    pub any_of: Categories,
    /// Default: none.
    pub inverted: Categories,
    /// What to tell of the pages found. Neighbours that are alike in this are one region. Default: nothing.
    pub report: Categories,
    /// Write-protect the pages found, in the same step (`PM_SCAN_WP_MATCHING`). Pages whose writes are not tracked are
    /// passed over without a word, unless `require_tracking`. Default: no.
    pub protect: bool,
    /// Stop with [`PagemapError::NotTracked`] where writes are not tracked (`PM_SCAN_CHECK_WPASYNC`). Default: no.
    pub require_tracking: bool,
    /// Stop after finding so many. Default: no limit.
    pub max_pages: Option<NonZeroU64>,
    /// Stop after so many regions: 24 bytes each, set aside for the call. 0: tell nothing, only protect. Default: 1024.
    pub max_regions: usize,
}

impl Default for ScanOptions {
    fn default() -> Self {
        Self {
            all_of: Categories::empty(),
            any_of: Categories::empty(),
            inverted: Categories::empty(),
            report: Categories::empty(),
            protect: false,
            require_tracking: false,
            max_pages: None,
            max_regions: 1024,
        }
    }
}

impl ScanOptions {
    /// What was written, left as it is.
    ///
    /// Looking for anything beside `WRITTEN` takes another path through the kernel, which up to Linux 7.1 does not count
    /// pages that were taken away (`MADV_DONTNEED`) as written: they would be missed.
    #[must_use]
    pub fn written() -> Self {
        Self { all_of: Categories::WRITTEN, report: Categories::WRITTEN, ..Self::default() }
    }

    /// What was written, protected again in the same step: no write is lost between the two.
    #[must_use]
    pub fn take_written() -> Self {
        Self { protect: true, require_tracking: true, ..Self::written() }
    }
}

/// Neighbouring pages that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Address behind the last page.
    pub end: u64,
    /// Those asked for by [`ScanOptions::report`].
    pub categories: Categories,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanResult {
    /// In the order of addresses.
    pub regions: Vec<Region>,
    /// Where the scan stopped: the end asked for, rounded up to a page, or before it when a limit was reached. Going on
    /// means to start there.
    pub walk_end: u64,
}

/// Why a page map cannot be read or scanned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// ENOTTY: a kernel before 6.7, or a file that is no page map.
    #[error("PAGEMAP_SCAN is not there: it needs Linux 6.7 and a /proc/PID/pagemap")]
    Unsupported,
    /// EPERM: writes are not tracked in a part of the range. What was found (and protected) in front of that part is
    /// here, because it will not be found again.
    #[error(
        "writes are not tracked in a part of the range: register it for write-protect with a uffd that has wp-async"
    )]
    NotTracked {
        /// In the order of addresses.
        found: Vec<Region>,
    },
    /// ESRCH: the process has exited or called exec.
    #[error("the process is gone")]
    ProcessGone,
    /// The end lies in front of the start.
    #[error("a range from {start:#x} to {end:#x} has no pages")]
    Range {
        /// As given.
        start: u64,
        /// As given.
        end: u64,
    },
    /// A system call failed.
    #[error("{syscall}: {errno}")]
    System {
        /// Which.
        syscall: &'static str,
        /// How.
        errno: Errno,
    },
}

impl PagemapError {
    /// The errno behind it.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Unsupported => libc::ENOTTY,
            Self::NotTracked { .. } => libc::EPERM,
            Self::ProcessGone => libc::ESRCH,
            Self::Range { .. } => libc::EINVAL,
            Self::System { errno, .. } => *errno as i32,
        }
    }
}

/// Regions of one [`Pagemap::scan_each`]: as many as the kernel gathers before it writes them out.
const MOST_AT_ONCE: usize = 512;

/// Bytes of one page's entry.
const ENTRY: usize = size_of::<u64>();

/// One page's entry of the page map (Documentation/admin-guide/mm/pagemap.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry(u64);

impl PageEntry {
    /// Mapped.
    #[must_use]
    pub const fn is_present(self) -> bool {
        self.0 & 1 << 63 != 0
    }

    /// Swapped out, or only noted (poisoned, a write-protected hole).
    #[must_use]
    pub const fn is_swapped(self) -> bool {
        self.0 & 1 << 62 != 0
    }

    /// Write-protected through a uffd, present or not.
    #[must_use]
    pub const fn is_write_protected(self) -> bool {
        self.0 & 1 << 57 != 0
    }
}

/// An open page map. It belongs to the memory of the process as it was when it was opened, until that exits or calls exec.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
}

impl Pagemap {
    /// Of this process.
    ///
    /// # Errors
    ///
    /// Where /proc is not there.
    pub fn of_self() -> Result<Self, PagemapError> {
        Self::open("/proc/self/pagemap")
    }

    /// Of another process, which has to be one that this may trace.
    ///
    /// # Errors
    ///
    /// [`PagemapError::ProcessGone`]; EACCES.
    pub fn of_process(process: &PidFd) -> Result<Self, PagemapError> {
        let opened = Self::open(&format!("/proc/{}/pagemap", process.pid()));
        match (process.has_exited(), opened) {
            // While it has not exited, nobody else has its number: what was opened is its.
            (Ok(false), opened) => opened,
            (Ok(true), _) => Err(PagemapError::ProcessGone),
            (Err(error), _) => Err(PagemapError::System { syscall: "poll", errno: errno_of(&error) }),
        }
    }

    fn open(path: &str) -> Result<Self, PagemapError> {
        match File::open(path) {
            Ok(file) => Ok(Self { file: file.into() }),
            Err(error) => Err(PagemapError::System { syscall: "open pagemap", errno: errno_of(&error) }),
        }
    }

    /// `PAGEMAP_SCAN` of `start..end`, once. `start` is a multiple of the page size.
    ///
    /// # Errors
    ///
    /// See [`PagemapError`]; EINVAL for a start inside a page, or categories that the kernel does not know.
    pub fn scan(&self, start: u64, end: u64, options: &ScanOptions) -> Result<ScanResult, PagemapError> {
        if end < start {
            return Err(PagemapError::Range { start, end });
        }
        // Zeros: when the scan fails half way, the kernel has written regions without telling how many.
        let mut found = vec![RawRegion::default(); options.max_regions];
        let (result, walk_end) = self.scan_into(start, end, options, &mut found);
        let mut regions: Vec<Region> =
            found.iter().take_while(|raw| raw.end > raw.start).copied().map(Region::from).collect();
        match result {
            // The kernel finds nothing in memory that is gone, and says nothing of it.
            Ok(_) if self.is_gone()? => Err(PagemapError::ProcessGone),
            Ok(count) => {
                regions.truncate(usize::try_from(count).unwrap_or(0));
                Ok(ScanResult { regions, walk_end })
            }
            Err(Errno::ENOTTY) => Err(PagemapError::Unsupported),
            Err(Errno::EPERM) => Err(PagemapError::NotTracked { found: regions }),
            Err(Errno::ESRCH) => Err(PagemapError::ProcessGone),
            Err(errno) => Err(PagemapError::System { syscall: "PAGEMAP_SCAN", errno }),
        }
    }

    /// One `PAGEMAP_SCAN`: how many regions it has found, and where it stopped.
    fn scan_into(
        &self,
        start: u64,
        end: u64,
        options: &ScanOptions,
        found: &mut [RawRegion],
    ) -> (nix::Result<i32>, u64) {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: u64::from(options.protect) * WP_MATCHING
                + u64::from(options.require_tracking) * CHECK_WPASYNC,
            start,
            end,
            walk_end: 0,
            vec: if found.is_empty() { 0 } else { found.as_mut_ptr() as u64 },
            vec_len: found.len() as u64,
            max_pages: options.max_pages.map_or(0, NonZeroU64::get),
            category_inverted: options.inverted.bits(),
            category_mask: options.all_of.bits(),
            category_anyof_mask: options.any_of.bits(),
            return_mask: options.report.bits(),
        };
        // SAFETY: `arg` lives across the call and has the size that the number encodes (asserted beside it); `vec` has room
        // for the `vec_len` regions that the kernel may write.
        let result = unsafe { pagemap_scan(self.file.as_raw_fd(), &raw mut arg) };
        (result, arg.walk_end)
    }

    /// [`Pagemap::scan`] of this process's own memory, at most 512 regions (and `max_regions`), without allocating: `each` is told of
    /// every one. Where it stopped.
    ///
    /// # Errors
    ///
    /// The kernel's: ENOTTY before Linux 6.7, EPERM where writes are not tracked in a part of the range (what was found in front of
    /// that was told).
    pub fn scan_each(
        &self,
        start: u64,
        end: u64,
        options: &ScanOptions,
        mut each: impl FnMut(Region),
    ) -> nix::Result<u64> {
        let mut found = [RawRegion::default(); MOST_AT_ONCE];
        let most = options.max_regions.min(MOST_AT_ONCE);
        let (result, walk_end) =
            self.scan_into(start, end, options, found.get_mut(..most).unwrap_or_default());
        let told = result.map_or(most, |count| usize::try_from(count).unwrap_or(0));
        for raw in found.iter().take(told).take_while(|raw| raw.end > raw.start) {
            each(Region::from(*raw));
        }
        result.map(|_| walk_end)
    }

    /// [`Pagemap::scan`], gone on with from where it stopped until all of `start..end` was seen; `max_regions` bounds each
    /// step, not the whole. Each step is one moment, the whole is not.
    ///
    /// `walk_end` lies before the end when `max_pages` were found, or fewer pages were left to find than one huge page has.
    ///
    /// # Errors
    ///
    /// As [`Pagemap::scan`]. With [`PagemapError::NotTracked`], everything found is in it.
    pub fn scan_to_end(
        &self,
        start: u64,
        end: u64,
        options: &ScanOptions,
    ) -> Result<ScanResult, PagemapError> {
        let mut options = *options;
        let mut all = ScanResult { regions: Vec::new(), walk_end: start };
        loop {
            let from = all.walk_end;
            let step = match self.scan(from, end, &options) {
                Err(PagemapError::NotTracked { found }) => {
                    append(&mut all.regions, found);
                    return Err(PagemapError::NotTracked { found: all.regions });
                }
                step => step?,
            };
            let pages =
                step.regions.iter().map(|region| region.end - region.start).sum::<u64>() / page_size() as u64;
            append(&mut all.regions, step.regions);
            all.walk_end = step.walk_end;
            if step.walk_end >= end || step.walk_end <= from {
                return Ok(all);
            }
            if let Some(limit) = options.max_pages {
                options.max_pages = NonZeroU64::new(limit.get().saturating_sub(pages));
                if options.max_pages.is_none() {
                    return Ok(all);
                }
            }
        }
    }

    /// The entries of `count` ordinary pages from `start` on, which is rounded down to a page.
    ///
    /// # Errors
    ///
    /// [`PagemapError::ProcessGone`]; EINVAL behind the end of the address space.
    pub fn entries(&self, start: u64, count: usize) -> Result<Vec<PageEntry>, PagemapError> {
        let failed = |errno| PagemapError::System { syscall: "read pagemap", errno };
        let mut bytes = vec![0; count.checked_mul(ENTRY).ok_or(failed(Errno::EINVAL))?];
        let first = start / page_size() as u64 * ENTRY as u64;
        let mut done = 0;
        while let Some(rest @ [_, ..]) = bytes.get_mut(done..) {
            let at = i64::try_from(first + done as u64).map_err(|_| failed(Errno::EINVAL))?;
            match nix::sys::uio::pread(&self.file, rest, at) {
                // The same for a process that is gone and for addresses that no process has.
                Ok(0) if self.is_gone()? => return Err(PagemapError::ProcessGone),
                Ok(0) => return Err(failed(Errno::EINVAL)),
                Ok(read) => done += read,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        Ok(entries.iter().map(|entry| PageEntry(u64::from_ne_bytes(*entry))).collect())
    }

    /// Whether the memory it shows is gone: then not even the entry of address 0 can be read.
    fn is_gone(&self) -> Result<bool, PagemapError> {
        loop {
            match nix::sys::uio::pread(&self.file, &mut [0; ENTRY], 0) {
                Ok(read) => return Ok(read == 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(PagemapError::System { syscall: "read pagemap", errno }),
            }
        }
    }
}

impl From<OwnedFd> for Pagemap {
    /// Of a /proc/PID/pagemap that somebody else opened.
    fn from(file: OwnedFd) -> Self {
        Self { file }
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Adds the regions of a further step; one that the step has cut in two becomes whole again.
fn append(all: &mut Vec<Region>, more: Vec<Region>) {
    for region in more {
        match all.last_mut() {
            Some(last) if last.end == region.start && last.categories == region.categories => {
                last.end = region.end;
            }
            _ => all.push(region),
        }
    }
}
