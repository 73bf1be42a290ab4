//! The address map in a record: all of it, anew after each change, in the slot that does not hold the one before.
//!
//! A change follows from a message of the ring, and some messages cannot be done twice (a move would take away what it has
//! brought). So the map says up to which message it goes: the read that brought it, and its position in that.

use super::layout::{PIECE, SLOT_HEAD, at, checksum};
use super::{Record, damaged};
use crate::address_map::{AddressMap, StoredPiece};
use crate::error::PagerError;

/// Pieces beyond those that a session may have: the message that is one too many still counts, and others of its read.
const SPARE: usize = 256;
/// The source offset of a second place of pages.
const AGAIN: u64 = 1;
/// The first page of memory without a source.
const NO_PAGE: u64 = u64::MAX;

/// Up to which message a map goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Applied {
    /// The read of messages.
    pub(crate) read: u64,
    /// Messages of it that are done.
    pub(crate) messages: u64,
}

/// Pieces that a slot has room for.
pub(super) fn capacity(map: &AddressMap) -> usize {
    map.most_pieces() + SPARE
}

impl Record {
    /// Puts the map down.
    ///
    /// # Errors
    ///
    /// [`PagerError::Exhausted`] when it has more pieces than there is room for. The record is of no use from then on.
    pub(crate) fn publish_map(&self, map: &AddressMap, applied: Applied) -> Result<(), PagerError> {
        let generation = self.get(at::MAP).wrapping_add(1);
        let slot = self.layout.slot((generation % 2) as usize);
        // Not valid from here on until it is complete.
        self.put(slot, 0);
        let pieces = map.stored_pieces();
        if pieces.len() > self.layout.most_pieces {
            self.put(at::MAP, 0);
            return Err(PagerError::Exhausted(format!(
                "the served process has cut its memory into {} pieces: the record of its session has room for {}",
                pieces.len(),
                self.layout.most_pieces
            )));
        }
        let head =
            [generation, applied.read, applied.messages, pieces.len() as u64, map.most_pieces() as u64];
        let body = pieces.into_iter().flat_map(|piece| {
            let (first, source) = match piece.pages {
                Some((first, source, again)) => (first as u64, source | if again { AGAIN } else { 0 }),
                None => (NO_PAGE, 0),
            };
            [piece.address, piece.len, first, source]
        });
        for (index, word) in head.into_iter().enumerate() {
            self.put(slot + 1 + index, word);
        }
        let mut end = slot + SLOT_HEAD;
        for word in body {
            self.put(end, word);
            end += 1;
        }
        self.put(slot, self.sum_of(slot, end));
        self.put(at::MAP, generation);
        Ok(())
    }

    /// The map that was put down last, and up to which message it goes.
    ///
    /// # Errors
    ///
    /// [`PagerError::Record`] when none is whole, or it says what cannot be.
    pub(crate) fn map(&self, source_len: u64) -> Result<(AddressMap, Applied), PagerError> {
        let told = self.get(at::MAP);
        if told == 0 {
            return Err(damaged("its address map had more pieces than there was room for"));
        }
        // One more may be complete: who wrote it was killed before it could say so.
        let generation = if self.is_whole(told.wrapping_add(1)) { told.wrapping_add(1) } else { told };
        if !self.is_whole(generation) {
            return Err(damaged("the checksum of its address map is wrong"));
        }
        let slot = self.layout.slot((generation % 2) as usize);
        let word = |index: usize| self.get(slot + index);
        let pieces = (0..self.count(slot)).map(|index| {
            let [address, len, first, source] =
                [0, 1, 2, 3].map(|field| word(SLOT_HEAD + index * PIECE + field));
            let pages = (first != NO_PAGE).then(|| {
                (usize::try_from(first).unwrap_or(usize::MAX), source & !AGAIN, source & AGAIN != 0)
            });
            StoredPiece { address, len, pages }
        });
        let most = usize::try_from(word(5)).unwrap_or(0);
        let map = AddressMap::restore(pieces, self.page_size(), self.pages(), most, source_len)
            .map_err(|reason| damaged(format!("its address map cannot be: {reason}")))?;
        Ok((map, Applied { read: word(2), messages: word(3) }))
    }

    fn is_whole(&self, generation: u64) -> bool {
        let slot = self.layout.slot((generation % 2) as usize);
        let end = slot + SLOT_HEAD + self.count(slot) * PIECE;
        self.get(slot + 1) == generation && self.get(slot) == self.sum_of(slot, end)
    }

    /// Pieces in a slot, as far as there is room for them.
    fn count(&self, slot: usize) -> usize {
        usize::try_from(self.get(slot + 4)).unwrap_or(usize::MAX).min(self.layout.most_pieces)
    }

    fn sum_of(&self, slot: usize, end: usize) -> u64 {
        checksum((slot + 1..end).map(|index| self.get(index)))
    }
}
