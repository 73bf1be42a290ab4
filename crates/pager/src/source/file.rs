//! A file as the source of pages.
//!
//! It is read with `pread`, never through a mapping: a mapped file that is truncated ends the reader by SIGBUS,
//! or gives zeros behind the new end without a word. After each read the size is compared with the size at
//! opening, before a byte is installed, because a read that races with a truncation may return zeros for the
//! rest of its last page.
//!
//! The event loop must not wait for a disk, so it reads with `RWF_NOWAIT` and leaves to a worker what is not in
//! the page cache. Files of a memory file system are always at hand (apart from swap) and are read directly.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use super::{PageSource, ReadNow};
use crate::error::PagerError;

/// A regular file or block device, opened once.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    size: u64,
    /// Nothing to wait for: the file is memory itself.
    in_memory: bool,
    /// Regular files can be truncated; block devices cannot.
    can_shrink: bool,
}

impl FileSource {
    /// `open(2)` of `path` for reading. May wait for a disk or a network.
    ///
    /// # Errors
    ///
    /// [`PagerError::Source`] when it cannot be opened, [`PagerError::NotAnImage`] when it is not a regular file
    /// or block device, or is empty.
    pub fn open(path: &Path) -> Result<Self, PagerError> {
        let failed = |syscall| {
            move |error: std::io::Error| PagerError::Source {
                path: path.to_owned(),
                syscall,
                errno: errno_of(&error),
            }
        };
        // O_NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for files and devices.
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(failed("open"))?;
        let kind = file.metadata().map_err(failed("fstat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(PagerError::NotAnImage {
                path: path.to_owned(),
                reason: "it is no regular file or block device",
            });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(failed("lseek"))?;
        if size == 0 {
            return Err(PagerError::NotAnImage { path: path.to_owned(), reason: "it is empty" });
        }
        let in_memory = fstatfs(&file).is_ok_and(|fs| is_memory(fs.filesystem_type()));
        Ok(Self { file, path: path.to_owned(), size, in_memory, can_shrink: kind.is_file() })
    }

    fn failed(&self, syscall: &'static str, errno: Errno) -> PagerError {
        PagerError::Source { path: self.path.clone(), syscall, errno }
    }

    /// The bytes just read are good only if the file still has every byte it had.
    fn check_size(&self) -> Result<(), PagerError> {
        if !self.can_shrink {
            return Ok(());
        }
        let actual = self.file.metadata().map_err(|error| self.failed("fstat", errno_of(&error)))?.len();
        if actual >= self.size {
            return Ok(());
        }
        Err(PagerError::SourceTruncated { path: self.path.clone(), expected: self.size, actual })
    }

    /// `preadv2(2)` with `RWF_NOWAIT`: how many bytes were in the page cache, from `offset` on.
    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let Ok(position) = libc::c_long::try_from(offset) else { return Err(Errno::EOVERFLOW) };
        // SAFETY: `iov` describes `buffer`, which is exclusively borrowed for the call; the kernel writes at most
        // its length. Called by number because the libc wrapper needs a newer libc than the package's floor.
        let read = unsafe {
            libc::syscall(
                libc::SYS_preadv2,
                self.file.as_raw_fd(),
                &raw const iov,
                1_usize,
                position,
                0_usize,
                libc::RWF_NOWAIT,
            )
        };
        Errno::result(read).map(|read| read as usize)
    }
}

impl PageSource for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if self.in_memory {
            return self.read(offset, buffer).map(|()| ReadNow::Done);
        }
        match self.read_cached(offset, buffer) {
            Ok(read) if read == buffer.len() => self.check_size().map(|()| ReadNow::Done),
            // Partly cached, or cut off: the blocking read tells these apart. EOPNOTSUPP and ENOSYS: this file
            // system or kernel cannot say. Every other error is the blocking read's to report.
            Ok(_) | Err(_) => Ok(ReadNow::WouldBlock),
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                Ok(0) => {
                    self.check_size()?;
                    // Not shorter, and yet no byte: it shrank and grew again while this was reading.
                    return Err(self.failed("pread", Errno::EIO));
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("pread", errno_of(&error))),
            }
        }
        self.check_size()
    }
}

fn is_memory(kind: FsType) -> bool {
    kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn a_read_fills_the_buffer_from_the_offset() {
        let bytes: Vec<u8> = (0..8192_u32).map(|i| i as u8).collect();
        let (_dir, path) = image(&bytes);
        let source = FileSource::open(&path).unwrap();
        let mut buffer = vec![0; 4096];

        source.read(4000, &mut buffer).unwrap();

        assert_eq!(buffer, bytes[4000..8096]);
        assert_eq!(source.size(), 8192);
    }

    #[test]
    fn a_cached_read_gives_the_same_bytes_or_says_it_would_block() {
        let (_dir, path) = image(&[7; 8192]);
        let source = FileSource::open(&path).unwrap();
        let mut buffer = vec![0; 8192];

        if source.read_now(0, &mut buffer).unwrap() == ReadNow::WouldBlock {
            source.read(0, &mut buffer).unwrap();
        }

        assert_eq!(buffer, [7; 8192]);
    }

    #[test]
    fn a_file_cut_to_the_middle_of_a_page_fails_even_where_its_bytes_are_left() {
        let (_dir, path) = image(&[7; 8192]);
        let source = FileSource::open(&path).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(6000).unwrap();
        let mut buffer = vec![0; 4096];

        for offset in [0, 4096] {
            let error = source.read(offset, &mut buffer).unwrap_err();
            assert!(
                matches!(error, PagerError::SourceTruncated { expected: 8192, actual: 6000, .. }),
                "{error}"
            );
            assert!(!matches!(source.read_now(offset, &mut buffer), Ok(ReadNow::Done)));
        }
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let (dir, empty) = image(&[]);

        assert!(matches!(FileSource::open(&empty), Err(PagerError::NotAnImage { .. })));
        assert!(matches!(
            FileSource::open(dir.path()),
            Err(PagerError::NotAnImage { .. } | PagerError::Source { .. })
        ));
        assert!(matches!(
            FileSource::open(&dir.path().join("absent")),
            Err(PagerError::Source { syscall: "open", errno: Errno::ENOENT, .. })
        ));
    }
}
