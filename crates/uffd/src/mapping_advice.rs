//! What the kernel can be asked to do with the pages of a mapping, or to tell about them: madvise(2), mincore(2) and
//! /proc/self/pagemap.

use nix::errno::Errno;

use crate::mapping::Mapping;
use crate::mapping_options::{MappingError, Pages, transparent_huge_page_size};
use crate::page::page_size;
use crate::pagemap::{Categories, Pagemap, PagemapError, Region, ScanOptions};
use crate::process_memory::MADV_COLLAPSE;

/// What pages are to be got ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Populate {
    /// Reading: untouched private memory gets the kernel's page of zeros, files their bytes.
    ForReading,
    /// Writing, without changing a byte.
    ForWriting,
}

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Residency {
    /// Nowhere: touching it is a missing fault, or reads zero.
    Absent = 0,
    /// In the page cache of the memfd or file, but not mapped here: touching it is a minor fault. Not told of huge pages
    /// from the pool, which are `Absent` then. Every page that is not mapped is told to be cached of files that this
    /// process neither owns nor may write to.
    Cached = 1,
    /// Not there, but noted: swapped out, poisoned, or a hole that is write-protected.
    Noted = 2,
    /// Mapped here: touching it is no fault, unless it is written to and protected.
    Present = 3,
}

/// How far memory was joined to transparent huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collapsed {
    /// Bytes that are huge pages now.
    pub done: usize,
    /// The first block that was refused (offset in the mapping), and why: EBUSY where a page is missing or is the
    /// kernel's page of zeros, EINVAL where one is write-protected, EAGAIN or ENOMEM where trying later can help.
    pub refused: Option<(usize, Errno)>,
}

impl Mapping {
    /// Gives pages back. Those of private memory are missing afterwards (`MADV_DONTNEED`), or have the file's bytes
    /// again; those of shared memory are missing in every process and punched out of the memfd or file
    /// (`MADV_REMOVE`).
    ///
    /// Where a uffd has the range registered with REMOVE events on, this waits until the event has been read: never
    /// call it on the thread that reads.
    ///
    /// # Errors
    ///
    /// When the range is not whole pages or leaves the mapping; EPERM when a seal forbids writing.
    pub fn discard(&self, offset: usize, len: usize) -> Result<(), MappingError> {
        let start = self.pages_at(offset, len)?;
        let (advice, name) = if self.is_shared() {
            (libc::MADV_REMOVE, "MADV_REMOVE")
        } else {
            (libc::MADV_DONTNEED, "MADV_DONTNEED")
        };
        advise(start, len, advice).map_err(MappingError::of(name))
    }

    /// Gets pages ready (`MADV_POPULATE_READ`, `MADV_POPULATE_WRITE`; Linux 5.14), so that touching them is no fault.
    /// Waits where a page is missing and registered: it faults as any system call does.
    ///
    /// # Errors
    ///
    /// [`MappingError::Unsupported`] before Linux 5.14; EFAULT where a page is poisoned, or missing and registered for
    /// faults of user mode only. The pages before it are ready then.
    pub fn populate(&self, offset: usize, len: usize, what_for: Populate) -> Result<(), MappingError> {
        let start = self.pages_at(offset, len)?;
        let (advice, name) = match what_for {
            Populate::ForReading => (libc::MADV_POPULATE_READ, "MADV_POPULATE_READ"),
            Populate::ForWriting if !self.is_writable() => return Err(MappingError::ReadOnly),
            Populate::ForWriting => (libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE"),
        };
        loop {
            match advise(start, len, advice) {
                // What was populated before the signal is not populated again.
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL) => {
                    return Err(MappingError::Unsupported {
                        what: "MADV_POPULATE_READ and _WRITE (Linux 5.14)",
                    });
                }
                result => return result.map_err(MappingError::of(name)),
            }
        }
    }

    /// Keeps pages in memory (`mlock(2)`), as long as the mapping lives.
    ///
    /// # Errors
    ///
    /// When the range is not whole pages or leaves the mapping; ENOMEM or EPERM beyond what may be locked (RLIMIT_MEMLOCK).
    pub fn lock(&self, offset: usize, len: usize) -> Result<(), MappingError> {
        let start = self.pages_at(offset, len)?;
        // SAFETY: a range of this mapping, which changes nothing that can be read there.
        let locked = unsafe { libc::mlock(start.cast(), len) };
        Errno::result(locked).map(drop).map_err(MappingError::of("mlock"))
    }

    /// Joins pages to transparent huge pages now (`MADV_COLLAPSE`, Linux 6.1), block by block, without changing a byte.
    /// The range is whole blocks of [`transparent_huge_page_size`] bytes, at addresses that are multiples of it
    /// ([`Pages::Transparent`] maps so). Each block is tried once; a block that is a huge page already counts as done.
    ///
    /// Joined memory can still be registered; but write-protecting a page of it splits it again.
    ///
    /// # Errors
    ///
    /// [`MappingError::Unsupported`] where the kernel has no such pages or no such advice; [`MappingError::Unaligned`]
    /// when the range is not whole blocks. A block that is refused is no error: see [`Collapsed`].
    pub fn collapse(&self, offset: usize, len: usize) -> Result<Collapsed, MappingError> {
        let start = self.pages_at(offset, len)?;
        let unsupported = MappingError::Unsupported { what: "MADV_COLLAPSE (Linux 6.1)" };
        let block = transparent_huge_page_size().ok_or(unsupported)?;
        if !(start as usize).is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(MappingError::Unaligned { offset: offset as u64, len, page_size: block });
        }
        let mut collapsed = Collapsed { done: 0, refused: None };
        for at in (0..len).step_by(block) {
            match advise(start.wrapping_add(at), block, MADV_COLLAPSE) {
                Ok(()) => collapsed.done += block,
                Err(errno) => collapsed.refused = collapsed.refused.or(Some((offset + at, errno))),
            }
        }
        match collapsed {
            // EINVAL has reasons in the memory too: advice of no effect tells whether the kernel knows this one.
            Collapsed { done: 0, refused: Some((_, Errno::EINVAL)) } if !knows_collapse() => Err(unsupported),
            collapsed => Ok(collapsed),
        }
    }

    /// Where each page of the range is, as of a moment during the call. Touches none of them.
    ///
    /// # Errors
    ///
    /// When the range is not whole pages or leaves the mapping, or where /proc is not there.
    pub fn residency(&self, offset: usize, len: usize) -> Result<Vec<Residency>, MappingError> {
        let start = self.pages_at(offset, len)?;
        let failed = |error: PagemapError| MappingError::System {
            syscall: "/proc/self/pagemap",
            errno: Errno::from_raw(error.errno()),
        };
        let ordinary = len / page_size();
        let map = Pagemap::of_self().map_err(failed)?;
        let entries = map.entries(start as u64, ordinary).map_err(failed)?;
        let noted = self.noted_huge_pages(&map, start as u64, len).map_err(failed)?;
        let cached = if self.has_page_cache() { self.mincore(start, len)? } else { vec![0; ordinary] };
        let pages = (start as u64..).step_by(page_size());
        let states = entries.iter().zip(&cached).zip(pages).map(|((entry, cached), page)| {
            if entry.is_present() {
                Residency::Present
            } else if entry.is_swapped()
                || noted.iter().any(|region| (region.start..region.end).contains(&page))
            {
                Residency::Noted
            } else if cached & 1 != 0 {
                Residency::Cached
            } else {
                Residency::Absent
            }
        });
        Ok(states.step_by(self.page_size() / page_size()).collect())
    }

    /// The entries of the page map do not tell what is noted of huge pages from the pool (Linux 6.18); a scan does, which
    /// is younger than poison by one version.
    fn noted_huge_pages(&self, map: &Pagemap, start: u64, len: usize) -> Result<Vec<Region>, PagemapError> {
        if self.page_size() == page_size() {
            return Ok(Vec::new());
        }
        let swapped = Categories::SWAPPED;
        let options = ScanOptions { all_of: swapped, report: swapped, ..ScanOptions::default() };
        match map.scan_to_end(start, start + len as u64, &options) {
            Ok(scan) => Ok(scan.regions),
            Err(PagemapError::Unsupported) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn mincore(&self, start: *mut u8, len: usize) -> Result<Vec<u8>, MappingError> {
        let mut pages = vec![0_u8; len / page_size()];
        loop {
            // SAFETY: the kernel writes a byte for each ordinary page of the range, and `pages` has that many.
            let result = unsafe { libc::mincore(start.cast(), len, pages.as_mut_ptr()) };
            match Errno::result(result) {
                Err(Errno::EAGAIN) => {}
                result => return result.map(|_| pages).map_err(MappingError::of("mincore")),
            }
        }
    }

    pub(crate) fn advise_pages(&self, pages: Pages) -> Result<(), MappingError> {
        match pages {
            Pages::Transparent => match advise(self.as_ptr(), self.len(), libc::MADV_HUGEPAGE) {
                Err(Errno::EINVAL) => Err(MappingError::Unsupported { what: "transparent huge pages" }),
                result => result.map_err(MappingError::of("MADV_HUGEPAGE")),
            },
            Pages::Small => match advise(self.as_ptr(), self.len(), libc::MADV_NOHUGEPAGE) {
                // A kernel without transparent huge pages never joins any.
                Err(Errno::EINVAL) => Ok(()),
                result => result.map_err(MappingError::of("MADV_NOHUGEPAGE")),
            },
            Pages::Ordinary | Pages::Huge(_) => Ok(()),
        }
    }
}

/// An empty range is refused only when the advice is unknown.
fn knows_collapse() -> bool {
    advise(std::ptr::null_mut(), 0, MADV_COLLAPSE).is_ok()
}

fn advise(start: *mut u8, len: usize, advice: libc::c_int) -> Result<(), Errno> {
    // SAFETY: the range lies in a mapping of this package (or is empty). No reference to such memory exists, so bytes that
    // go or move break nothing; none of the advice used here changes bytes otherwise.
    Errno::result(unsafe { libc::madvise(start.cast(), len, advice) }).map(drop)
}
