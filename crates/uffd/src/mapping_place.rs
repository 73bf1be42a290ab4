//! mmap(2) and memfd_create(2) for `mapping.rs`: where memory is put, and the file behind it.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use nix::errno::Errno;

use crate::mapping_options::{MappingError, MemfdOptions, Pages, transparent_huge_page_size};

/// `MFD_NOEXEC_SEAL` (Linux 6.3), which the C library does not name everywhere. Systems with `vm.memfd_noexec=2` refuse a
/// memfd without it.
const MFD_NOEXEC_SEAL: libc::c_uint = 8;

pub(crate) const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// What is to be mapped, wherever there is room.
pub(crate) struct Place<'a> {
    pub(crate) len: usize,
    pub(crate) protection: libc::c_int,
    pub(crate) flags: libc::c_int,
    pub(crate) fd: Option<BorrowedFd<'a>>,
    pub(crate) offset: u64,
}

impl Place<'_> {
    pub(crate) fn map(&self, pages: Pages) -> Result<NonNull<u8>, MappingError> {
        let mapped = match (pages, transparent_huge_page_size()) {
            (Pages::Transparent, Some(boundary)) => self.map_at_boundary(boundary),
            // SAFETY: without a wanted address, a new mapping replaces nothing.
            _ => unsafe { self.mmap(ptr::null_mut(), 0) },
        };
        mapped.map_err(|errno| match (pages, errno) {
            (Pages::Huge(page_size), Errno::ENOMEM) => {
                MappingError::HugePagesExhausted { page_size, pages: self.len / page_size }
            }
            (Pages::Huge(page_size), Errno::EINVAL) => MappingError::UnsupportedPageSize { page_size },
            (_, errno) => MappingError::System { syscall: "mmap", errno },
        })
    }

    /// Sets aside more addresses than needed, maps at the first boundary among them and gives the rest back.
    fn map_at_boundary(&self, boundary: usize) -> Result<NonNull<u8>, Errno> {
        let room = self.len.checked_add(boundary).ok_or(Errno::ENOMEM)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let reserve = Place { len: room, protection: libc::PROT_NONE, flags, fd: None, offset: 0 };
        // SAFETY: without a wanted address, a new mapping replaces nothing.
        let start = unsafe { reserve.mmap(ptr::null_mut(), 0) }?.as_ptr();
        let before = (start as usize).next_multiple_of(boundary) - start as usize;
        let wanted = start.wrapping_add(before);
        // SAFETY: `before` is at most `boundary`, so this replaces a part of what was just mapped and nobody knows of.
        let mapped = unsafe { self.mmap(wanted, libc::MAP_FIXED) };
        let given_back = match mapped {
            Ok(_) => [(start, before), (wanted.wrapping_add(self.len), boundary - before)],
            Err(_) => [(start, room), (start, 0)],
        };
        for (address, len) in given_back.into_iter().filter(|&(_, len)| len > 0) {
            // SAFETY: a part of what was set aside above and is not used.
            unsafe { libc::munmap(address.cast(), len) };
        }
        mapped
    }

    /// # Safety
    ///
    /// With `MAP_FIXED` in `more_flags`, `self.len` bytes at `address` are the caller's, and nothing refers to them.
    unsafe fn mmap(&self, address: *mut u8, more_flags: libc::c_int) -> Result<NonNull<u8>, Errno> {
        let fd = self.fd.map_or(-1, |fd| fd.as_raw_fd());
        let flags = self.flags | more_flags;
        // SAFETY: what it may replace is the caller's promise; the kernel checks everything else.
        let mapped = unsafe {
            libc::mmap(address.cast(), self.len, self.protection, flags, fd, self.offset as libc::off_t)
        };
        if mapped == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        NonNull::new(mapped.cast()).ok_or(Errno::ENOMEM)
    }
}

/// The kernel names sizes of huge pages by their logarithm.
pub(crate) fn size_code(page_size: usize) -> libc::c_uint {
    page_size.trailing_zeros()
}

pub(crate) fn create_memfd(options: &MemfdOptions<'_>) -> Result<OwnedFd, MappingError> {
    let name = CString::new(options.name).map_err(|_| MappingError::Name)?;
    if name.count_bytes() > 249 {
        return Err(MappingError::Name);
    }
    let huge = match options.pages {
        Pages::Huge(size) => libc::MFD_HUGETLB | (size_code(size) << libc::MAP_HUGE_SHIFT),
        _ => 0,
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    let create = |flags: libc::c_uint| {
        // SAFETY: the name is NUL-terminated and lives across the call. By number: the C library's function needs a newer
        // one than the package's floor.
        Errno::result(unsafe { libc::syscall(libc::SYS_memfd_create, name.as_ptr(), flags) })
    };
    let created = match create(flags | MFD_NOEXEC_SEAL) {
        // Before 6.3, or a size of huge pages that there is not: the second try tells.
        Err(Errno::EINVAL) => create(flags),
        created => created,
    };
    match (created, options.pages) {
        // SAFETY: the kernel has just put this descriptor (a small number) into our table; nobody else knows of it.
        (Ok(raw), _) => Ok(unsafe { OwnedFd::from_raw_fd(raw as i32) }),
        (Err(Errno::EINVAL | Errno::ENODEV), Pages::Huge(page_size)) => {
            Err(MappingError::UnsupportedPageSize { page_size })
        }
        (Err(errno), _) => Err(MappingError::System { syscall: "memfd_create", errno }),
    }
}
