//! Memory of this process that can be registered: mapped here, so that its ranges are known, and reached through raw
//! pointers only, because other threads and the kernel change it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;

use crate::page::page_size;

/// What a mapping is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingKind {
    /// `MAP_PRIVATE | MAP_ANONYMOUS`.
    Private,
    /// A memfd, mapped shared: minor faults, other processes, `SharedArrayBuffer`.
    Shared,
    /// Private anonymous huge pages of this many bytes (2 MiB, 1 GiB) from the pool.
    Huge(usize),
    /// A memfd of huge pages of this many bytes, mapped shared.
    SharedHuge(usize),
}

/// A mapping. Unmapped when dropped.
///
/// No reference to its memory is ever made: reading and writing copy through raw pointers. Touching a page that is
/// registered and missing waits for whoever serves it, in every method that reads or writes.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
    page_size: usize,
    memfd: Option<OwnedFd>,
}

// SAFETY: the mapping is plain memory that any thread may touch; concurrent access goes through raw pointers, and the
// bytes themselves carry no invariant. It is unmapped only by its one owner.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference to the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `mmap(2)` of `len` bytes, rounded up to whole pages. Nothing is resident.
    ///
    /// # Errors
    ///
    /// EINVAL for no bytes or an impossible page size, ENOMEM without room (or without huge pages in the pool).
    pub fn new(len: usize, kind: MappingKind) -> io::Result<Self> {
        let page_size = match kind {
            MappingKind::Private | MappingKind::Shared => page_size(),
            MappingKind::Huge(size) | MappingKind::SharedHuge(size) => size,
        };
        let len =
            len.checked_next_multiple_of(page_size).filter(|&len| len > 0 && page_size.is_power_of_two());
        let Some(len) = len else { return Err(Errno::EINVAL.into()) };
        let huge = page_size.trailing_zeros().wrapping_shl(libc::MAP_HUGE_SHIFT as u32);
        let memfd = match kind {
            MappingKind::Private | MappingKind::Huge(_) => None,
            MappingKind::Shared => Some(memfd(0, len)?),
            MappingKind::SharedHuge(_) => Some(memfd(libc::MFD_HUGETLB | huge, len)?),
        };
        let flags = match kind {
            MappingKind::Private => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            MappingKind::Shared | MappingKind::SharedHuge(_) => libc::MAP_SHARED,
            MappingKind::Huge(_) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | huge as i32,
        };
        let fd = memfd.as_ref().map_or(-1, |fd| fd.as_raw_fd());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes: it replaces nothing.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let Some(address) = NonNull::new(address.cast()) else { return Err(Errno::ENOMEM.into()) };
        Ok(Self { address, len, page_size, memfd })
    }

    /// Its first address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    /// The same as a pointer; valid for [`Mapping::len`] bytes as long as the mapping lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Bytes: a multiple of the page size.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a mapping has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of one of its pages.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// The memfd behind shared memory.
    #[must_use]
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// Copies bytes out. Waits where a page is missing and registered.
    ///
    /// # Errors
    ///
    /// EINVAL when the range leaves the mapping.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `at` has checked that the range lies in the mapping, which lives as long as `self`; `into` is another
        // allocation. What others write meanwhile makes the bytes indeterminate, not the copy.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes in. Waits where a page is missing and registered.
    ///
    /// # Errors
    ///
    /// EINVAL when the range leaves the mapping.
    pub fn write(&self, offset: usize, from: &[u8]) -> io::Result<()> {
        let to = self.at(offset, from.len())?;
        // SAFETY: as in `read`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Gives pages back: they are missing again. Private memory by MADV_DONTNEED, shared by MADV_REMOVE (for everybody).
    /// Where REMOVE events are on, this waits until the event has been read: never call it on the thread that reads.
    ///
    /// # Errors
    ///
    /// EINVAL when the range is unaligned or leaves the mapping.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.at(offset, len)?;
        let advice = if self.memfd.is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: the range lies in the mapping; no reference to its memory exists, so discarding bytes breaks nothing.
        let result = unsafe { libc::madvise(start.cast(), len, advice) };
        Errno::result(result).map(drop).map_err(io::Error::from)
    }

    /// Which pages of the range are resident, one byte a page (`mincore(2)`).
    ///
    /// # Errors
    ///
    /// EINVAL when the range is unaligned or leaves the mapping.
    pub fn residency(&self, offset: usize, len: usize) -> io::Result<Vec<bool>> {
        let start = self.at(offset, len)?;
        let mut pages = vec![0_u8; len.div_ceil(page_size())];
        // SAFETY: the kernel writes a byte for each ordinary page of the range, and `pages` has that many.
        let result = unsafe { libc::mincore(start.cast(), len, pages.as_mut_ptr()) };
        Errno::result(result)?;
        Ok(pages.iter().step_by(self.page_size / page_size()).map(|page| page & 1 != 0).collect())
    }

    fn at(&self, offset: usize, len: usize) -> io::Result<*mut u8> {
        match offset.checked_add(len) {
            // The end of an allocation is a valid pointer too; `wrapping_add` needs no more than that.
            Some(end) if end <= self.len => Ok(self.address.as_ptr().wrapping_add(offset)),
            _ => Err(Errno::EINVAL.into()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped only here, and nothing borrows from it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

fn memfd(flags: libc::c_uint, len: usize) -> io::Result<OwnedFd> {
    let name = CString::default();
    // SAFETY: the name is NUL-terminated and lives across the call. By number: the libc wrapper needs a newer libc than
    // the package's floor.
    let raw = unsafe { libc::syscall(libc::SYS_memfd_create, name.as_ptr(), flags | libc::MFD_CLOEXEC) };
    let raw = Errno::result(raw)? as i32;
    // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    nix::unistd::ftruncate(&fd, len as libc::off_t)?;
    Ok(fd)
}
