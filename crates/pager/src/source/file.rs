//! A file as the source of pages.
//!
//! It is read with `pread`, and never through a mapping unless it is a memfd that is sealed ([`Sealed`]): a mapped file that is truncated ends the reader by SIGBUS,
//! or gives zeros behind the new end without a word. After each read its size, and when it was written, are compared
//! with those at opening, before a byte is installed: a read that races with a truncation may return zeros for the
//! rest of its last page, and a file that was cut short and has grown again has nothing but zeros.
//!
//! The event loop must not wait for a disk, so it reads with `RWF_NOWAIT` and leaves to a worker what is not in
//! the page cache. Files of a memory file system are always at hand (apart from swap) and are read directly.
//!
//! Pages are whole, files need not be: what the last page has behind the end of the file is zero, as in a mapping of it.
//!
//! Where a sparse file has holes is found when it is opened. A hole counts as one as long as nothing of the file has
//! changed since; then it is not even read.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use uffd::errno_of;

use super::direct::Direct;
use super::extents::{any_in, data_of};
use super::sealed::Sealed;
use super::stamp::{Stamp, Written};
use super::{PageSource, ReadNow};
use crate::error::PagerError;

/// Stretches of data of a sparse file that are remembered (1 MiB of memory); one with more is read throughout.
const MOST_EXTENTS: usize = 1 << 16;
/// What `st_blocks` counts.
const BLOCK: u64 = 512;

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Past the page cache (`O_DIRECT`), always by a worker: for an image that is read once and would push out of the
    /// cache what is used again. What lies behind the last whole block is read as usual, and so are files of a memory
    /// file system, which have nothing else. Default: no.
    pub direct: bool,
    /// It may be written to while it is served: each page is what the file has when it is read, and only being cut short is an error.
    /// Default: no, and a file that was written to gives no page any more.
    pub may_change: bool,
}

/// A regular file or block device, opened once.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    /// Bytes of the file, which may end inside of a page.
    size: u64,
    /// Nothing to wait for: the file is memory itself.
    in_memory: bool,
    /// Regular files can be truncated; block devices cannot.
    can_shrink: bool,
    /// Block devices cannot say when they were written.
    must_not_change: bool,
    /// When it was written last, before it was opened or put right, where that is known and it must not change.
    written: Mutex<Option<Written>>,
    direct: Option<Direct>,
    /// Where it has data, if it has holes.
    sparse: Option<Sparse>,
    /// It never changes again.
    sealed: Option<Sealed>,
}

#[derive(Debug)]
struct Sparse {
    data: Vec<Range<u64>>,
    /// What the file looked like before its holes were looked for.
    stamp: Stamp,
}

impl FileSource {
    /// [`FileSource::open_with`] the default options.
    ///
    /// # Errors
    ///
    /// As [`FileSource::open_with`].
    pub fn open(path: &Path) -> Result<Self, PagerError> {
        Self::open_with(path, FileOptions::default())
    }

    /// `open(2)` of `path` for reading. May wait for a disk or a network.
    ///
    /// # Errors
    ///
    /// [`PagerError::Source`] when it cannot be opened, [`PagerError::NotAnImage`] when it is not a regular file
    /// or block device, is empty, or cannot be read as the options say.
    pub fn open_with(path: &Path, options: FileOptions) -> Result<Self, PagerError> {
        // O_NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for files and devices.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| PagerError::Source {
                path: path.to_owned(),
                syscall: "open",
                errno: errno_of(&error),
            })?;
        let mut source = Self::of_file(file, path, None)?;
        if options.may_change {
            source = source.that_may_change();
        }
        if options.direct && !source.in_memory {
            source.direct = Some(Direct::open(path, &source.file, source.size)?);
        }
        Ok(source)
    }

    /// A file or memfd that is open already, and that errors call `name`. Its position is moved, its bytes are left alone.
    ///
    /// # Errors
    ///
    /// As [`FileSource::open_with`]; [`PagerError::Source`] with EBADF on the first read when it was not opened for reading.
    pub fn of_fd(fd: OwnedFd, name: &Path) -> Result<Self, PagerError> {
        Self::of_file(File::from(fd), name, None)
    }

    /// [`FileSource::of_fd`], and the same file opened with `O_DIRECT`, where it is to be read past the page cache. `size` is what it had
    /// when it was opened first, by another process: as long as it has less, reading fails.
    ///
    /// # Errors
    ///
    /// As [`FileSource::open_with`].
    pub fn of_fds(
        fd: OwnedFd,
        direct: Option<OwnedFd>,
        name: &Path,
        size: Option<u64>,
    ) -> Result<Self, PagerError> {
        let mut source = Self::of_file(File::from(fd), name, size)?;
        let whole = source.check().is_ok();
        if let Some(direct) = direct.filter(|_| whole && !source.in_memory) {
            source.direct = Some(Direct::of(File::from(direct), name, &source.file, source.size)?);
        }
        Ok(source)
    }

    /// As [`FileOptions::may_change`] says.
    #[must_use]
    pub fn that_may_change(self) -> Self {
        Self { must_not_change: false, written: Mutex::default(), ..self }
    }

    /// What errors call it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn of_file(mut file: File, path: &Path, had: Option<u64>) -> Result<Self, PagerError> {
        let failed = |syscall| {
            move |error: std::io::Error| PagerError::Source {
                path: path.to_owned(),
                syscall,
                errno: errno_of(&error),
            }
        };
        let now = file.metadata().map_err(failed("fstat"))?;
        let kind = now.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(PagerError::NotAnImage {
                path: path.to_owned(),
                reason: "it is no regular file or block device",
            });
        }
        let has = file.seek(SeekFrom::End(0)).map_err(failed("lseek"))?;
        let size = had.unwrap_or(has);
        // Of what was cut short nothing is known but its bytes.
        let whole = has >= size;
        if size == 0 {
            return Err(PagerError::NotAnImage { path: path.to_owned(), reason: "it is empty" });
        }
        let in_memory = fstatfs(&file).is_ok_and(|fs| is_memory(fs.filesystem_type()));
        // What a mapping writes to a memory file system is not dated, and reading it costs little.
        let sparse = if kind.is_file() && !in_memory && whole { holes_of(&file, size) } else { None };
        let sealed = if in_memory && whole { Sealed::of(&file) } else { None };
        let path = path.to_owned();
        let can_shrink = kind.is_file();
        let written = Mutex::new(Written::of_whole(&now, size).filter(|_| can_shrink));
        Ok(Self {
            file,
            path,
            size,
            in_memory,
            can_shrink,
            must_not_change: can_shrink,
            written,
            direct: None,
            sparse,
            sealed,
        })
    }

    /// Where it has data; `None` when that is more than `most` stretches. May wait for a disk.
    pub(super) fn data(&self, most: usize) -> Result<Option<Vec<Range<u64>>>, Errno> {
        match &self.sparse {
            Some(sparse) if sparse.data.len() > most => Ok(None),
            Some(sparse) => Ok(Some(sparse.data.clone())),
            None => data_of(&self.file, self.size, most),
        }
    }

    fn failed(&self, syscall: &'static str, errno: Errno) -> PagerError {
        PagerError::Source { path: self.path.clone(), syscall, errno }
    }

    /// The bytes just read are good only if the file still has every byte it had.
    pub(super) fn check(&self) -> Result<(), PagerError> {
        if !self.can_shrink {
            return Ok(());
        }
        let now = self.file.metadata().map_err(|error| self.failed("fstat", errno_of(&error)))?;
        if now.len() < self.size {
            let (path, expected, actual) = (self.path.clone(), self.size, now.len());
            return Err(PagerError::SourceTruncated { path, expected, actual });
        }
        match *self.written() {
            Some(written) if written != Written::of(&now) => {
                Err(PagerError::SourceChanged { path: self.path.clone() })
            }
            _ => Ok(()),
        }
    }

    fn written(&self) -> MutexGuard<'_, Option<Written>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of `buffer` that is of the file, and the part that is behind its end.
    fn split<'a>(&self, offset: u64, buffer: &'a mut [u8]) -> (&'a mut [u8], &'a mut [u8]) {
        let inside = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        buffer.split_at_mut(inside.min(buffer.len()))
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
        self.size.next_multiple_of(uffd::page_size() as u64)
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if self.in_memory {
            return self.read(offset, buffer).map(|()| ReadNow::Done);
        }
        if self.direct.is_some() {
            return Ok(ReadNow::WouldBlock);
        }
        let (inside, behind) = self.split(offset, buffer);
        match self.read_cached(offset, inside) {
            Ok(read) if read == inside.len() => {
                behind.fill(0);
                self.check().map(|()| ReadNow::Done)
            }
            // Partly cached, or cut off: the blocking read tells these apart. EOPNOTSUPP and ENOSYS: this file
            // system or kernel cannot say. Every other error is the blocking read's to report.
            Ok(_) | Err(_) => Ok(ReadNow::WouldBlock),
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let (inside, behind) = self.split(offset, buffer);
        behind.fill(0);
        let mut done = 0;
        while let Some(rest) = inside.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset + done as u64;
            let read = match self.direct.as_ref().filter(|direct| at < direct.end()) {
                Some(direct) => direct.read_at(rest, at),
                None => self.file.read_at(rest, at),
            };
            match read {
                Ok(0) => {
                    self.check()?;
                    // Not shorter, and yet no byte: it shrank and grew again while this was reading.
                    return Err(self.failed("pread", Errno::EIO));
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("pread", errno_of(&error))),
            }
        }
        self.check()
    }

    fn put_right(&self) {
        if self.must_not_change
            && let Ok(now) = self.file.metadata()
        {
            *self.written() = Written::of_whole(&now, self.size);
        }
    }

    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        self.sealed.as_ref().filter(|_| inside)?.bytes(offset, len)
    }

    fn zeros(&self, offset: u64, len: u64) -> bool {
        self.sparse.as_ref().is_some_and(|sparse| {
            !any_in(&sparse.data, offset, len) && Stamp::of(&self.file).is_ok_and(|now| now == sparse.stamp)
        })
    }
}

/// Where a file has data, if it has holes, and not too many of them to remember. A file that cannot tell is read.
fn holes_of(file: &File, size: u64) -> Option<Sparse> {
    let stamp = Stamp::of(file).ok().filter(|stamp| stamp.blocks.saturating_mul(BLOCK) < size)?;
    let data = data_of(file, size, MOST_EXTENTS).ok()??;
    Some(Sparse { data, stamp })
}

fn is_memory(kind: FsType) -> bool {
    kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC
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
    fn behind_the_end_of_a_file_its_last_page_is_zero() {
        let (_dir, path) = image(&[7; 5000]);
        for options in [FileOptions::default(), FileOptions { direct: true, ..FileOptions::default() }] {
            // Some file systems cannot be read past the page cache.
            let Ok(source) = FileSource::open_with(&path, options) else { continue };
            let mut buffer = vec![1; 4096];

            source.read(4096, &mut buffer).unwrap();

            assert_eq!(source.size(), 8192);
            assert_eq!(buffer, [vec![7; 904], vec![0; 3192]].concat());
            buffer.fill(1);
            if source.read_now(4096, &mut buffer).unwrap() == ReadNow::Done {
                assert_eq!(buffer, [vec![7; 904], vec![0; 3192]].concat());
            }
            assert!(source.bytes(4096, 4096).is_none(), "they do not lie anywhere");
        }
    }

    #[test]
    fn a_file_that_lost_the_end_of_its_last_page_is_truncated_and_not_zero() {
        let (_dir, path) = image(&[7; 5000]);
        let source = FileSource::open(&path).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(4999).unwrap();

        let error = source.read(4096, &mut [0; 4096]).unwrap_err();

        assert!(matches!(error, PagerError::SourceTruncated { expected: 5000, actual: 4999, .. }), "{error}");
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
