//! What can be mapped, and why mapping, or something done to a mapping, is refused.

use std::fs;

use nix::errno::Errno;

/// The usual mappings, for [`Mapping::new`](crate::Mapping::new). Everything else has an options object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingKind {
    /// Private anonymous memory: only this process has it, a forked child gets a copy.
    Private,
    /// A memfd, mapped shared: minor faults, other processes.
    Shared,
    /// Private anonymous huge pages of this many bytes (2 MiB, 1 GiB) from the pool.
    Huge(usize),
    /// A memfd of huge pages of this many bytes, mapped shared.
    SharedHuge(usize),
}

/// The pages memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// Ordinary ones; whether the kernel joins them is the system's setting.
    #[default]
    Ordinary,
    /// Ordinary ones that are never joined (`MADV_NOHUGEPAGE`): writes are tracked page by page.
    Small,
    /// Ordinary ones that may be joined to transparent huge pages (`MADV_HUGEPAGE`); the mapping starts at a boundary of
    /// one. Faults of registered memory still come per ordinary page.
    Transparent,
    /// Huge pages of this many bytes from the pool (hugetlb): a power of two, usually 2 MiB or 1 GiB. Taken from the pool
    /// page by page as they are filled, but set aside when mapped, so that filling cannot run out of them.
    Huge(usize),
}

/// How anonymous memory is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnonymousOptions {
    /// Shared with children that this process forks. Default: private.
    pub shared: bool,
    /// Default: ordinary pages.
    pub pages: Pages,
}

/// How a memfd is made and mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemfdOptions<'a> {
    /// Shown in /proc; need not be unique. At most 249 bytes. Default: empty.
    pub name: &'a str,
    /// Mapped copy-on-write: writes through the mapping do not reach the memfd. Default: shared.
    pub private: bool,
    /// The size can never change (`F_SEAL_SHRINK`, `F_SEAL_GROW`), so nobody who gets the descriptor can take pages away
    /// from under the mapping. Other seals can be added either way. Default: yes.
    pub fixed_size: bool,
    /// Default: ordinary pages.
    pub pages: Pages,
}

impl Default for MemfdOptions<'_> {
    fn default() -> Self {
        Self { name: "", private: false, fixed_size: true, pages: Pages::default() }
    }
}

/// What may be done with the bytes of a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileAccess {
    /// Reading.
    #[default]
    ReadOnly,
    /// Writing, which does not reach the file.
    CopyOnWrite,
    /// Writing, which reaches the file and whoever has it mapped.
    Shared,
}

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Default: reading only.
    pub access: FileAccess,
    /// Byte of the file that the mapping starts with; a multiple of the page size. Default: 0.
    pub offset: u64,
    /// Bytes. Default: to the end of the file.
    pub len: Option<usize>,
}

/// Why memory was not mapped, or not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// Nothing to map, or an empty range of pages.
    #[error("no bytes: expected at least one")]
    Empty,
    /// More than an address space holds.
    #[error("{len} bytes do not fit into an address space")]
    TooLarge {
        /// What was asked for.
        len: usize,
    },
    /// No size of huge pages: they are powers of two above the ordinary size.
    #[error("{page_size} bytes is no size of huge pages")]
    PageSize {
        /// What was asked for.
        page_size: usize,
    },
    /// This system has no huge pages of that size.
    #[error("this system has no huge pages of {page_size} bytes (see /sys/kernel/mm/hugepages)")]
    UnsupportedPageSize {
        /// What was asked for.
        page_size: usize,
    },
    /// The pool does not have that many.
    #[error(
        "the pool does not have {pages} huge pages of {page_size} bytes left (raise nr_hugepages in /sys/kernel/mm/hugepages)"
    )]
    HugePagesExhausted {
        /// Bytes of one.
        page_size: usize,
        /// How many the mapping needs.
        pages: usize,
    },
    /// A memfd's name with a NUL in it, or of more than 249 bytes.
    #[error("the name of a memfd has at most 249 bytes and no NUL")]
    Name,
    /// A part of the mapping that it does not have.
    #[error("{len} bytes at {offset} leave the mapping of {size} bytes")]
    OutOfRange {
        /// Where it was to start.
        offset: usize,
        /// Its bytes.
        len: usize,
        /// Those of the mapping.
        size: usize,
    },
    /// Whole pages are needed.
    #[error("{len} bytes at {offset} are not whole pages of {page_size} bytes")]
    Unaligned {
        /// Where it was to start.
        offset: u64,
        /// Its bytes.
        len: usize,
        /// Bytes of a page.
        page_size: usize,
    },
    /// A file that is not that long: touching what is behind its end would end the process (SIGBUS).
    #[error("{len} bytes at {offset} leave the file of {size} bytes")]
    BeyondFile {
        /// Where the mapping was to start.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// Those of the file.
        size: u64,
    },
    /// Writing to a file mapped for reading.
    #[error("the mapping is for reading only")]
    ReadOnly,
    /// The kernel does not have it.
    #[error("this kernel does not have {what}")]
    Unsupported {
        /// What, and since when kernels have it.
        what: &'static str,
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

impl MappingError {
    /// The errno behind it; EINVAL where this package refused before asking the kernel.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::HugePagesExhausted { .. } => libc::ENOMEM,
            Self::ReadOnly => libc::EACCES,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            Self::System { errno, .. } => *errno as i32,
            _ => libc::EINVAL,
        }
    }

    pub(crate) fn of(syscall: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System { syscall, errno }
    }
}

/// Bytes of a transparent huge page, where the kernel has them.
#[must_use]
pub fn transparent_huge_page_size() -> Option<usize> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").ok()?;
    text.trim().parse().ok().filter(|size: &usize| size.is_power_of_two())
}
