//! Memory of this process that can be registered: mapped here, so that its ranges are known, and reached through raw
//! pointers only, because other threads, other processes and the kernel change it.
//!
//! What a mapping is made of is in `mapping_options.rs`; giving pages back, getting them and looking at them is in
//! `mapping_advice.rs`.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::mapping_options::{
    AnonymousOptions, FileAccess, FileOptions, MappingError, MappingKind, MemfdOptions, Pages,
};
use crate::mapping_place::{Place, READ_WRITE, create_memfd, size_code};
use crate::page::page_size;

/// A mapping. Unmapped when dropped.
///
/// No reference to its memory is ever made: reading and writing copy through raw pointers. What several threads or
/// processes write at the same time comes out mixed, as with any shared memory. Touching a page that is registered and
/// missing waits for whoever serves it, in every method that reads or writes; touching a poisoned one, or one behind the
/// end of a file that was cut short, ends the process (SIGBUS).
///
/// A userfaultfd does not keep a mapping alive. Unregister before dropping it: the threads that wait for a page of
/// unmapped memory are not woken by the kernel.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
    page_size: usize,
    shared: bool,
    writable: bool,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Anonymous,
    Memfd(OwnedFd),
    /// And the byte of it that the mapping starts with.
    File(OwnedFd, u64),
}

// SAFETY: the mapping is plain memory that any thread may touch; concurrent access goes through raw pointers, and the
// bytes themselves carry no invariant. It is unmapped only by its one owner.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference to the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The usual mappings of `len` bytes, rounded up to whole pages. Nothing is resident.
    ///
    /// # Errors
    ///
    /// See [`MappingError`].
    pub fn new(len: usize, kind: MappingKind) -> Result<Self, MappingError> {
        let anonymous = |pages| Self::anonymous(len, AnonymousOptions { pages, shared: false });
        let memfd = |pages| Self::with_memfd(len, &MemfdOptions { pages, ..MemfdOptions::default() });
        match kind {
            MappingKind::Private => anonymous(Pages::Ordinary),
            MappingKind::Shared => memfd(Pages::Ordinary),
            MappingKind::Huge(size) => anonymous(Pages::Huge(size)),
            MappingKind::SharedHuge(size) => memfd(Pages::Huge(size)),
        }
    }

    /// `mmap(2)` of `len` bytes without a file, rounded up to whole pages. Nothing is resident; ordinary pages are not
    /// counted against the system's memory before they are filled.
    ///
    /// # Errors
    ///
    /// See [`MappingError`].
    pub fn anonymous(len: usize, options: AnonymousOptions) -> Result<Self, MappingError> {
        let page_size = size_of_page(options.pages)?;
        let len = whole_pages(len, page_size)?;
        let sharing = if options.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let from_pool = match options.pages {
            Pages::Huge(size) => libc::MAP_HUGETLB | (size_code(size) << libc::MAP_HUGE_SHIFT) as libc::c_int,
            _ => libc::MAP_NORESERVE,
        };
        let flags = sharing | libc::MAP_ANONYMOUS | from_pool;
        let place = Place { len, protection: READ_WRITE, flags, fd: None, offset: 0 };
        let address = place.map(options.pages)?;
        let mapping = Self {
            address,
            len,
            page_size,
            shared: options.shared,
            writable: true,
            backing: Backing::Anonymous,
        };
        mapping.advise_pages(options.pages)?;
        Ok(mapping)
    }

    /// `memfd_create(2)` of `len` bytes, rounded up to whole pages, and `mmap(2)` of all of it. Nothing is resident.
    ///
    /// # Errors
    ///
    /// See [`MappingError`].
    pub fn with_memfd(len: usize, options: &MemfdOptions<'_>) -> Result<Self, MappingError> {
        let page_size = size_of_page(options.pages)?;
        let len = whole_pages(len, page_size)?;
        let memfd = create_memfd(options)?;
        nix::unistd::ftruncate(&memfd, len as libc::off_t).map_err(MappingError::of("ftruncate"))?;
        if options.fixed_size {
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(MappingError::of("F_ADD_SEALS"))?;
        }
        let flags = if options.private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let place = Place { len, protection: READ_WRITE, flags, fd: Some(memfd.as_fd()), offset: 0 };
        let address = place.map(options.pages)?;
        let (shared, backing) = (!options.private, Backing::Memfd(memfd));
        let mapping = Self { address, len, page_size, shared, writable: true, backing };
        mapping.advise_pages(options.pages)?;
        Ok(mapping)
    }

    /// `mmap(2)` of a file, or of a memfd that came from elsewhere. The mapping is made of whole pages: what is behind
    /// the end of the file on the last one reads zero.
    ///
    /// Files of a disk can be mapped and used as a source of bytes, but not registered.
    ///
    /// # Errors
    ///
    /// See [`MappingError`]; EACCES when the descriptor does not allow `access`, EPERM when a seal does not.
    pub fn of_file(file: OwnedFd, options: FileOptions) -> Result<Self, MappingError> {
        let page_size = size_of_file_page(&file)?;
        let size = fstat(&file).map_err(MappingError::of("fstat"))?.st_size as u64;
        let offset = options.offset;
        let wanted = match options.len {
            Some(len) => len as u64,
            None => size.saturating_sub(offset),
        };
        if offset.checked_add(wanted).is_none_or(|end| end > size) {
            return Err(MappingError::BeyondFile { offset, len: wanted, size });
        }
        let wanted = usize::try_from(wanted).map_err(|_| MappingError::TooLarge { len: usize::MAX })?;
        if !offset.is_multiple_of(page_size as u64) {
            return Err(MappingError::Unaligned { offset, len: wanted, page_size });
        }
        let len = whole_pages(wanted, page_size)?;
        let (shared, writable) = match options.access {
            FileAccess::ReadOnly => (false, false),
            FileAccess::CopyOnWrite => (false, true),
            FileAccess::Shared => (true, true),
        };
        let protection = if writable { READ_WRITE } else { libc::PROT_READ };
        let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_NORESERVE };
        let place = Place { len, protection, flags, fd: Some(file.as_fd()), offset };
        let address = place.map(Pages::Ordinary)?;
        Ok(Self { address, len, page_size, shared, writable, backing: Backing::File(file, offset) })
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

    /// Bytes of one of its pages, which is what the kernel fills, protects and takes back. Transparent huge pages are
    /// still made of ordinary ones.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Whether what is written reaches others: the memfd or file, or forked children.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Whether it can be written to at all.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The memfd it was made with.
    #[must_use]
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.backing {
            Backing::Memfd(memfd) => Some(memfd.as_fd()),
            _ => None,
        }
    }

    /// The file that was mapped.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.backing {
            Backing::File(file, _) => Some(file.as_fd()),
            _ => None,
        }
    }

    /// The addresses of whole pages, as operations of a userfaultfd take them.
    ///
    /// # Errors
    ///
    /// When the range is empty, not whole pages, or leaves the mapping.
    pub fn range(&self, offset: usize, len: usize) -> Result<Range<u64>, MappingError> {
        let start = self.pages_at(offset, len)? as u64;
        Ok(start..start + len as u64)
    }

    /// Copies bytes out. Waits where a page is missing and registered.
    ///
    /// # Errors
    ///
    /// When the range leaves the mapping.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), MappingError> {
        // SAFETY: `into` can be written to for its length, and is no part of the mapping, of which no reference exists.
        unsafe { self.read_to(offset, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in. Waits where a page is missing and registered.
    ///
    /// # Errors
    ///
    /// When the range leaves the mapping, or the mapping is for reading only.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MappingError> {
        // SAFETY: `from` can be read for its length, and is no part of the mapping, of which no reference exists.
        unsafe { self.write_from(offset, from.as_ptr(), from.len()) }
    }

    /// [`Mapping::read`] into memory that no reference can be made to, because others write to it.
    ///
    /// # Safety
    ///
    /// `into` can be written to for `len` bytes. It may lie in the mapping.
    ///
    /// # Errors
    ///
    /// As [`Mapping::read`].
    pub unsafe fn read_to(&self, offset: usize, into: *mut u8, len: usize) -> Result<(), MappingError> {
        let from = self.at(offset, len)?;
        // SAFETY: `at` has checked that the range lies in the mapping, which lives as long as `self`; `into` is the
        // caller's promise. What others write meanwhile makes the bytes indeterminate, not the copy.
        unsafe { ptr::copy(from, into, len) };
        Ok(())
    }

    /// [`Mapping::write`] from memory that no reference can be made to, because others write to it.
    ///
    /// # Safety
    ///
    /// `from` can be read for `len` bytes. It may lie in the mapping.
    ///
    /// # Errors
    ///
    /// As [`Mapping::write`].
    pub unsafe fn write_from(&self, offset: usize, from: *const u8, len: usize) -> Result<(), MappingError> {
        let to = self.at(offset, len)?;
        if !self.writable {
            return Err(MappingError::ReadOnly);
        }
        // SAFETY: as in `read_to`, the other way round; the mapping was made writable.
        unsafe { ptr::copy(from, to, len) };
        Ok(())
    }

    /// Whether a page here can be missing while the file behind the mapping has it.
    pub(crate) fn has_page_cache(&self) -> bool {
        self.shared || !matches!(self.backing, Backing::Anonymous)
    }

    /// Whether a userfaultfd can have it: files of a disk are the kernel's alone.
    pub(crate) fn can_be_registered(&self) -> bool {
        match &self.backing {
            Backing::Anonymous | Backing::Memfd(_) => true,
            // Only those of memory have seals.
            Backing::File(file, _) => fcntl(file, FcntlArg::F_GET_SEALS).is_ok(),
        }
    }

    /// Whether the file behind it ends before this page.
    pub(crate) fn ends_before(&self, page: usize) -> bool {
        let (file, start) = match &self.backing {
            Backing::Anonymous => return false,
            Backing::Memfd(memfd) => (memfd, 0),
            Backing::File(file, start) => (file, *start),
        };
        fstat(file).is_ok_and(|state| start + page as u64 >= state.st_size as u64)
    }

    /// The address of whole pages.
    pub(crate) fn pages_at(&self, offset: usize, len: usize) -> Result<*mut u8, MappingError> {
        let page_size = self.page_size;
        if len == 0 {
            return Err(MappingError::Empty);
        }
        if !offset.is_multiple_of(page_size) || !len.is_multiple_of(page_size) {
            return Err(MappingError::Unaligned { offset: offset as u64, len, page_size });
        }
        self.at(offset, len)
    }

    /// The address of any bytes.
    pub(crate) fn byte_at(&self, offset: usize, len: usize) -> Result<*mut u8, MappingError> {
        self.at(offset, len)
    }

    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, MappingError> {
        match offset.checked_add(len) {
            // The end of an allocation is a valid pointer too; `wrapping_add` needs no more than that.
            Some(end) if end <= self.len => Ok(self.address.as_ptr().wrapping_add(offset)),
            _ => Err(MappingError::OutOfRange { offset, len, size: self.len }),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by the constructor, unmapped only here, and nothing borrows from it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

fn size_of_page(pages: Pages) -> Result<usize, MappingError> {
    match pages {
        Pages::Huge(page_size) if page_size.is_power_of_two() && page_size > self::page_size() => {
            Ok(page_size)
        }
        Pages::Huge(page_size) => Err(MappingError::PageSize { page_size }),
        Pages::Ordinary | Pages::Small | Pages::Transparent => Ok(page_size()),
    }
}

/// Files of hugetlbfs (and its memfds) are made of huge pages; their file system says of what size.
fn size_of_file_page(file: &OwnedFd) -> Result<usize, MappingError> {
    let file_system = fstatfs(file).map_err(MappingError::of("fstatfs"))?;
    if file_system.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(page_size());
    }
    Ok(usize::try_from(file_system.block_size()).unwrap_or_else(|_| page_size()))
}

fn whole_pages(len: usize, page_size: usize) -> Result<usize, MappingError> {
    match len.checked_next_multiple_of(page_size) {
        Some(0) => Err(MappingError::Empty),
        // Offsets of pointers are signed.
        Some(whole) if isize::try_from(whole).is_ok() => Ok(whole),
        _ => Err(MappingError::TooLarge { len }),
    }
}
