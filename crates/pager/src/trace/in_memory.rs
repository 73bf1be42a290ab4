//! Recordings of a process that may open no file: in memfds, which whoever holds them can read after its death.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uffd::errno_of;
use uffd::fd_passing::in_memfd;

use super::Recording;
use crate::error::PagerError;

/// Bytes of one recording in memory.
const MOST_BYTES: u64 = 16 << 20;
/// What the head and the end of a recording take: they always find room.
const ENDS: u64 = 128;

/// Bytes that recordings in memory may take together. One that finds no room is full.
#[derive(Debug)]
pub struct Room(AtomicU64);

impl Room {
    /// So many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(bytes)))
    }

    fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// As many of them as there are.
    fn take_most(&self, bytes: u64) -> u64 {
        let less = |left: u64| Some(left.saturating_sub(bytes));
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        before.unwrap_or_default().min(bytes)
    }

    fn give(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Has the recordings of sessions that no file takes.
pub trait RecordingKeeper: std::fmt::Debug + Send + Sync {
    /// One begins, and is empty but for its head. Called on the event loop's thread, before its first fault.
    ///
    /// # Errors
    ///
    /// Why it cannot be kept. The session is served without being recorded then, and its recording has failed for this reason.
    fn keep(&self, session: u64, memfd: BorrowedFd<'_>) -> Result<(), PagerError>;

    /// It has come to its end, whichever that is ([`Recording::state`]). Called on a thread of its own, before anybody else hears.
    fn over(&self, session: u64, recording: &Arc<Recording>, bytes: RecordedBytes);
}

/// The bytes of a recording, in a memfd. Dropped, they give back their room.
#[derive(Debug)]
pub struct RecordedBytes {
    memfd: File,
    len: u64,
    room: Arc<Room>,
    taken: u64,
    /// There was no room for a block: what comes after it would leave a gap.
    full: bool,
}

impl RecordedBytes {
    /// Of a recording that begins.
    pub(super) fn new(head: &[u8], room: &Arc<Room>) -> Result<Self, PagerError> {
        if !room.take(ENDS) {
            return Err(PagerError::Exhausted(
                "the recordings of other sessions have taken all the memory there is for them".to_owned(),
            ));
        }
        let failed = |errno| PagerError::System { syscall: "memfd_create", errno };
        let memfd = in_memfd(c"uffd-recording", head).map_err(|error| failed(errno_of(&error)));
        match memfd {
            Ok(memfd) => {
                let len = head.len() as u64;
                Ok(Self { memfd: File::from(memfd), len, room: Arc::clone(room), taken: ENDS, full: false })
            }
            Err(error) => {
                room.give(ENDS);
                Err(error)
            }
        }
    }

    /// Of one that a process has left which is gone. It counts as far as there is room.
    ///
    /// # Errors
    ///
    /// [`PagerError::System`] for what is no file.
    pub fn of_memfd(memfd: OwnedFd, room: &Arc<Room>) -> Result<Self, PagerError> {
        let memfd = File::from(memfd);
        let failed = |error: std::io::Error| PagerError::System { syscall: "fstat", errno: errno_of(&error) };
        let len = memfd.metadata().map_err(failed)?.len();
        Ok(Self { memfd, len, taken: room.take_most(len), room: Arc::clone(room), full: false })
    }

    /// How many there are.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "it has a head")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Some of them: fewer than `most` at the end, none behind it.
    ///
    /// # Errors
    ///
    /// [`PagerError::System`] when the kernel cannot read them.
    pub fn read(&self, offset: u64, most: usize) -> Result<Vec<u8>, PagerError> {
        let there = self.len.saturating_sub(offset).min(most as u64);
        let mut bytes = vec![0; there as usize];
        let failed = |error: std::io::Error| PagerError::System { syscall: "pread", errno: errno_of(&error) };
        self.memfd.read_exact_at(&mut bytes, offset).map_err(failed)?;
        Ok(bytes)
    }

    /// Puts a block behind the others; `false` where there is no room for it.
    pub(super) fn put(&mut self, block: &[u8]) -> std::io::Result<bool> {
        let bytes = block.len() as u64;
        self.full = self.full || self.len + bytes > MOST_BYTES - ENDS || !self.room.take(bytes);
        if self.full {
            return Ok(false);
        }
        self.taken += bytes;
        self.append(block).map(|()| true)
    }

    /// Puts the end behind all of them, for which there is room.
    pub(super) fn put_end(&mut self, end: &[u8]) -> std::io::Result<()> {
        self.append(end)
    }

    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.memfd.write_all_at(bytes, self.len)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

impl AsFd for RecordedBytes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

impl Drop for RecordedBytes {
    fn drop(&mut self) {
        self.room.give(self.taken);
    }
}
