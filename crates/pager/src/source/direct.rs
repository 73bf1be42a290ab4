//! Reading past the page cache (`O_DIRECT`): for images that are read once, and would push out of the cache what is
//! used again.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use uffd::errno_of;

use crate::error::PagerError;

/// The most bytes of one read.
const MOST: usize = 1 << 20;

/// A file opened with `O_DIRECT`, and what it asks of offsets, lengths and buffers.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// A power of two that memory, offsets and lengths have to be multiples of.
    align: usize,
    /// Up to here, a multiple of `align`; the rest of the file cannot be read this way.
    end: u64,
}

impl Direct {
    /// Opens the file once more, of which `buffered` is the first descriptor and `size` the bytes.
    pub(super) fn open(path: &Path, buffered: &File, size: u64) -> Result<Self, PagerError> {
        let failed = |syscall, errno| PagerError::Source { path: path.to_owned(), syscall, errno };
        let refused = |reason| PagerError::NotAnImage { path: path.to_owned(), reason };
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_DIRECT)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if errno_of(&error) == Errno::EINVAL => {
                return Err(refused(
                    "its file system cannot be read past the page cache: leave `direct` off",
                ));
            }
            Err(error) => return Err(failed("open", errno_of(&error))),
        };
        Self::of(file, path, buffered, size)
    }

    /// A file that was opened with `O_DIRECT`.
    pub(super) fn of(file: File, path: &Path, buffered: &File, size: u64) -> Result<Self, PagerError> {
        let failed = |syscall, errno| PagerError::Source { path: path.to_owned(), syscall, errno };
        let refused = |reason| PagerError::NotAnImage { path: path.to_owned(), reason };
        let ours = buffered.metadata().map_err(|error| failed("fstat", errno_of(&error)))?;
        let again = file.metadata().map_err(|error| failed("fstat", errno_of(&error)))?;
        if (ours.dev(), ours.ino()) != (again.dev(), again.ino()) {
            return Err(refused("it was replaced while it was being opened"));
        }
        let align = match alignment(&file) {
            Some(0) => return Err(refused("it cannot be read past the page cache: leave `direct` off")),
            Some(align) if align.is_power_of_two() && align <= MOST => align,
            // The kernel does not say (before 6.1, and some file systems): no device has larger blocks than a page.
            _ => uffd::page_size(),
        };
        Ok(Self { file, align, end: size - size % align as u64 })
    }

    /// Up to where this can read.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Some bytes from `offset` on, which lies before [`Direct::end`]; 0 at the end of a file that was cut short.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let align = self.align as u64;
        let start = offset - offset % align;
        let skip = (offset - start) as usize;
        let left = usize::try_from(self.end - start).unwrap_or(MOST);
        let wanted = (skip + buffer.len()).next_multiple_of(self.align).min(left).min(MOST);
        if skip == 0 && buffer.as_ptr().align_offset(self.align) == 0 {
            // Whole blocks go where they belong.
            let whole = wanted.min(buffer.len() - buffer.len() % self.align);
            if let Some(whole) = buffer.get_mut(..whole).filter(|whole| !whole.is_empty()) {
                return self.file.read_at(whole, start);
            }
        }
        let mut bounce = vec![0; wanted + self.align];
        let aligned = bounce.as_ptr().align_offset(self.align).min(self.align);
        let Some(bounce) = bounce.get_mut(aligned..aligned + wanted) else { return Ok(0) };
        let read = self.file.read_at(bounce, start)?;
        let Some(bytes) = bounce.get(skip..read) else { return Ok(0) };
        let count = bytes.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), bytes.get(..count)) {
            to.copy_from_slice(from);
        }
        Ok(count)
    }
}

/// The larger of what memory and offsets have to be aligned to; 0 where it cannot be done; `None` where it is not said.
fn alignment(file: &File) -> Option<usize> {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let (path, flags, mask) = (c"", libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
    // SAFETY: the path is a C string that lives as long as the program, `answer` has room for what the kernel writes.
    // Called by number because the wrapper needs a newer libc than the package's floor.
    let result = unsafe {
        libc::syscall(libc::SYS_statx, file.as_raw_fd(), path.as_ptr(), flags, mask, answer.as_mut_ptr())
    };
    Errno::result(result).ok()?;
    // SAFETY: every field is a number, and the memory was zeroed before the call.
    let answer = unsafe { answer.assume_init() };
    (answer.stx_mask & libc::STATX_DIOALIGN != 0)
        .then(|| answer.stx_dio_mem_align.max(answer.stx_dio_offset_align) as usize)
}
