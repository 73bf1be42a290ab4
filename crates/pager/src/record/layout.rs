//! Where what is in a record. Everything is words of 64 bits in the byte order of the machine: it never leaves it.
//!
//! A daemon of a newer version takes over what an older one has left, so what is here is only added to: counters behind the last,
//! words that were 0 so far. Whatever cannot be read as before needs another version, and code that still reads this one.

use uffd::Words;

use super::damaged;
use crate::error::PagerError;

/// "uffd rec", as bytes.
const MAGIC: u64 = u64::from_ne_bytes(*b"uffd rec");
const VERSION: u64 = 1;

/// Words by their position in a record.
pub(super) mod at {
    /// The words that never change, and their checksum.
    pub(in super::super) const STATIC_END: usize = 9;
    /// Who serves: a process, and when that was started.
    pub(in super::super) const OWNER: usize = 9;
    pub(in super::super) const OWNER_STARTED: usize = 10;
    /// Reads of messages that were begun.
    pub(in super::super) const READS: usize = 11;
    /// Generation of the map that is complete in its slot.
    pub(in super::super) const MAP: usize = 12;
    /// How the session is ending; 0 while it is served.
    pub(in super::super) const ENDING: usize = 13;
    /// How often it was taken over.
    pub(in super::super) const TAKEN_OVER: usize = 14;
    /// When a hold ends, in nanoseconds of CLOCK_MONOTONIC, which all processes have in common; 0: never.
    pub(in super::super) const HELD_UNTIL: usize = 15;
    /// What went wrong: bytes, and the text.
    pub(in super::super) const TEXT: usize = 16;
    pub(in super::super) const TEXT_WORDS: usize = 64;
    pub(in super::super) const COUNTERS: usize = TEXT + TEXT_WORDS;
    pub(in super::super) const COUNTERS_ROOM: usize = TABLE - COUNTERS;
    /// The process in whose table the descriptors are that the ring names.
    pub(in super::super) const TABLE: usize = RING - 1;
    pub(in super::super) const RING: usize = 256;
    /// 64 messages of four words.
    pub(in super::super) const RING_WORDS: usize = 256;
}

/// Words of what is kept resident.
pub(super) const HEAD_WORDS: usize = at::RING + at::RING_WORDS;
/// Words of a map slot before its pieces.
pub(super) const SLOT_HEAD: usize = 8;
/// Words of a piece.
pub(super) const PIECE: usize = 4;
/// Bitmaps: present and removed; where writes are tracked, three more.
const BITMAPS: [usize; 2] = [2, 5];
/// More pages than an address space has.
const MOST_PAGES: usize = 1 << 45;

/// What a record is of, from which follows where everything is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) session: u64,
    pub(super) page_size: u64,
    pub(super) pages: usize,
    pub(super) most_pieces: usize,
    pub(super) tracks_writes: bool,
}

/// Bytes of the head, in whole pages.
pub(super) fn head_bytes() -> usize {
    (HEAD_WORDS * 8).next_multiple_of(uffd::page_size())
}

impl Layout {
    /// As it stands in a record.
    pub(super) fn words(&self) -> [u64; at::STATIC_END] {
        let mut words = [
            MAGIC,
            VERSION,
            self.bytes().unwrap_or(0) as u64,
            self.page_size,
            self.pages as u64,
            self.most_pieces as u64,
            u64::from(self.tracks_writes),
            self.session,
            0,
        ];
        words[at::STATIC_END - 1] = checksum(words.iter().copied().take(at::STATIC_END - 1));
        words
    }

    /// Reads and checks what stands in a record.
    pub(super) fn read(head: &Words) -> Result<Self, PagerError> {
        let mut words = [0; at::STATIC_END];
        for (word, from) in words.iter_mut().zip(head.iter()) {
            *word = from.load(std::sync::atomic::Ordering::Relaxed);
        }
        let [magic, version, bytes, page_size, pages, most_pieces, tracks_writes, session, sum] = words;
        if magic != MAGIC {
            return Err(damaged(format!("it begins with {magic:#x}, which no record does")));
        }
        if version != VERSION {
            return Err(damaged(format!("it is of version {version}, this pager reads version {VERSION}")));
        }
        if sum != checksum(words.into_iter().take(at::STATIC_END - 1)) {
            return Err(damaged("the checksum of its head is wrong"));
        }
        let number = |value: u64| usize::try_from(value).ok().filter(|&value| value <= MOST_PAGES);
        let layout = match (number(pages), number(most_pieces)) {
            (Some(pages), Some(most_pieces)) => {
                Self { session, page_size, pages, most_pieces, tracks_writes: tracks_writes != 0 }
            }
            _ => return Err(damaged(format!("{pages} pages in {most_pieces} pieces cannot be"))),
        };
        if !page_size.is_power_of_two() || layout.bytes().map(|bytes| bytes as u64) != Some(bytes) {
            return Err(damaged(format!("{pages} pages of {page_size} bytes do not take {bytes} bytes")));
        }
        Ok(layout)
    }

    /// Bytes of all of it, in whole pages.
    pub(super) fn bytes(&self) -> Option<usize> {
        let bitmaps = self.bitmap_words().checked_mul(BITMAPS[usize::from(self.tracks_writes)])?;
        let slots = self.slot_words().checked_mul(2)?;
        let words = bitmaps.checked_add(slots)?;
        words.checked_mul(8)?.checked_add(head_bytes())?.checked_next_multiple_of(uffd::page_size())
    }

    /// Whole cache lines.
    pub(super) fn bitmap_words(&self) -> usize {
        self.pages.div_ceil(64).next_multiple_of(8)
    }

    /// The first word of a bitmap.
    pub(super) fn bitmap(&self, bitmap: usize) -> usize {
        head_bytes() / 8 + bitmap * self.bitmap_words()
    }

    pub(super) fn slot_words(&self) -> usize {
        (SLOT_HEAD + self.most_pieces * PIECE).next_multiple_of(8)
    }

    /// The first word of a map slot.
    pub(super) fn slot(&self, slot: usize) -> usize {
        self.bitmap(BITMAPS[usize::from(self.tracks_writes)]) + slot * self.slot_words()
    }
}

/// Of words.
pub(super) fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    let mut sum = crc32fast::Hasher::new();
    for word in words {
        sum.update(&word.to_ne_bytes());
    }
    // Never 0, which is what nobody has written.
    u64::from(sum.finalize()) | 1 << 32
}
