//! The record of a session: everything about it that changes and that a successor must know exactly, in a memfd that outlives the
//! process which serves it.
//!
//! | part | what | when it is killed while writing |
//! | --- | --- | --- |
//! | page 0 | what never changes, with a checksum; who serves; how far it is; how it is ending; counters | each a word of its own |
//! | page 0, second half | the ring: messages that were read, each until everything that follows from it has been written | found there, and done again |
//! | bitmaps | present, removed; where writes are tracked, dirty, discarded, reported | the message that set them is in the ring still |
//! | two slots | the address map, in turns, each with its generation and a checksum | the other slot is whole |
//!
//! Page 0 is resident and locked (where RLIMIT_MEMLOCK allows): read(2) hands a message out for good, and gives a process that is
//! being killed no memory to put it in. All else may be paged in as it is needed; who is killed by that has not finished with its message.
//!
//! The order of the stores of one thread is all that counts: whoever looks comes after that thread has ended. Whatever a
//! record says is checked before it is used: a damaged one is refused, and nothing is read or written outside of it.

mod ending;
mod layout;
mod map_slots;
mod owner;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use uffd::{FileAccess, FileOptions, Mapping, MappingError, MemfdOptions, Words};

use crate::address_map::AddressMap;
use crate::error::PagerError;
use crate::page_state::{PageBits, PageStates};
use crate::stats::{COUNTERS, Stats};
use layout::{Layout, at};

pub(crate) use ending::{Course, Ending};
pub(crate) use map_slots::Applied;

/// A session's record, mapped.
#[derive(Debug)]
pub(crate) struct Record {
    mapping: Arc<Mapping>,
    /// All of it.
    words: Words,
    layout: Layout,
}

/// A record that cannot be used, and why.
pub(crate) fn damaged(reason: impl Into<String>) -> PagerError {
    PagerError::Record(reason.into())
}

impl Record {
    /// An empty record for a session of so much memory.
    ///
    /// # Errors
    ///
    /// [`PagerError::System`] when descriptors or memory have run out.
    pub(crate) fn create(id: u64, map: &AddressMap, tracks_writes: bool) -> Result<Self, PagerError> {
        let layout = Layout {
            session: id,
            page_size: map.page_size(),
            pages: map.pages(),
            most_pieces: map_slots::capacity(map),
            tracks_writes,
        };
        let len = layout.bytes().ok_or_else(|| damaged(format!("{} pages are too many", layout.pages)))?;
        let options = MemfdOptions { name: "userfaultfd-session", ..MemfdOptions::default() };
        let mapping = Mapping::with_memfd(len, &options).map_err(unmappable)?;
        let record = Self::within(Arc::new(mapping), layout)?;
        for (index, word) in layout.words().into_iter().enumerate() {
            record.put(index, word);
        }
        record.take_ownership()?;
        record.take_ring();
        record.publish_map(map, Applied::default())?;
        record.hold_resident();
        Ok(record)
    }

    /// Maps a record that another process has left, and checks all of it.
    ///
    /// # Errors
    ///
    /// [`PagerError::Record`] says what is wrong with it; [`PagerError::System`] as above.
    pub(crate) fn open(memfd: OwnedFd) -> Result<Self, PagerError> {
        // A file that can be cut short would end this process.
        let seals = fcntl(&memfd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        if !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
            return Err(damaged("its size can change: it is no memfd, or not sealed"));
        }
        let options = FileOptions { access: FileAccess::Shared, ..FileOptions::default() };
        let mapping = Mapping::of_file(memfd, options).map_err(|error| match error {
            MappingError::Empty | MappingError::BeyondFile { .. } => damaged("it is empty"),
            error => unmappable(error),
        })?;
        let mapping = Arc::new(mapping);
        let head = Words::of_mapping(&mapping, 0, at::STATIC_END).map_err(unmappable)?;
        let layout = Layout::read(&head)?;
        if layout.bytes() != Some(mapping.len()) {
            return Err(damaged(format!(
                "it has {} bytes, which is not what it says of itself",
                mapping.len()
            )));
        }
        let record = Self::within(mapping, layout)?;
        record.hold_resident();
        Ok(record)
    }

    fn within(mapping: Arc<Mapping>, layout: Layout) -> Result<Self, PagerError> {
        let words = Words::of_mapping(&mapping, 0, mapping.len() / 8).map_err(unmappable)?;
        Ok(Self { mapping, words, layout })
    }

    /// Where it is beyond what may be locked, it is resident all the same, and stays so unless memory is very short.
    fn hold_resident(&self) {
        // Written to, which makes a page resident; with what is there.
        for word in (0..layout::HEAD_WORDS).step_by(512) {
            self.put(word, self.get(word));
        }
        let _ = self.mapping.lock(0, layout::head_bytes());
    }

    /// The descriptor, to be kept by others.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.mapping.memfd().or_else(|| self.mapping.file())
    }

    pub(crate) fn session(&self) -> u64 {
        self.layout.session
    }

    pub(crate) fn page_size(&self) -> u64 {
        self.layout.page_size
    }

    pub(crate) fn pages(&self) -> usize {
        self.layout.pages
    }

    pub(crate) fn tracks_writes(&self) -> bool {
        self.layout.tracks_writes
    }

    /// The words of the ring.
    pub(crate) fn ring(&self) -> Result<Words, PagerError> {
        self.part(at::RING, at::RING_WORDS)
    }

    pub(crate) fn states(&self) -> Result<PageStates, PagerError> {
        let [present, removed] = [0, 1].map(|bitmap| self.bitmap(bitmap));
        Ok(PageStates::in_words(self.layout.pages, present?, removed?))
    }

    /// The bitmaps of a session that tracks writes: dirty, discarded, reported.
    pub(crate) fn written(&self) -> Result<[PageBits; 3], PagerError> {
        let [dirty, discarded, reported] = [2, 3, 4]
            .map(|bitmap| self.bitmap(bitmap).map(|words| PageBits::in_words(self.layout.pages, words)));
        Ok([dirty?, discarded?, reported?])
    }

    /// The counters, which go on from what they are here.
    pub(crate) fn stats(&self) -> Result<Stats, PagerError> {
        let words = self.part(at::COUNTERS, COUNTERS.min(at::COUNTERS_ROOM))?;
        Stats::in_words(words).ok_or_else(|| damaged("it has no room for the counters"))
    }

    /// A read of messages begins: those of the read before it are finished with.
    pub(crate) fn begin_read(&self) {
        self.put(at::READS, self.reads().wrapping_add(1));
    }

    /// Which read of messages it is.
    pub(crate) fn reads(&self) -> u64 {
        self.get(at::READS)
    }

    fn bitmap(&self, bitmap: usize) -> Result<Words, PagerError> {
        self.part(self.layout.bitmap(bitmap), self.layout.bitmap_words())
    }

    fn part(&self, first: usize, len: usize) -> Result<Words, PagerError> {
        Words::of_mapping(&self.mapping, first * 8, len).map_err(unmappable)
    }

    fn get(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// After everything that was put before it.
    fn put(&self, index: usize, value: u64) {
        if let Some(word) = self.words.get(index) {
            word.store(value, Ordering::Release);
        }
    }
}

fn unmappable(error: MappingError) -> PagerError {
    match error {
        MappingError::System { syscall, errno } => PagerError::System { syscall, errno },
        error => PagerError::System { syscall: "mmap", errno: Errno::from_raw(error.errno()) },
    }
}
