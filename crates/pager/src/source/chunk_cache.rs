//! Chunks of a source, so many at most: CLOCK, which forgets what was not used since it last came by.

use std::collections::HashMap;
use std::sync::Arc;

/// The bytes of a chunk. Shared, so that whoever reads them holds no lock meanwhile.
pub(crate) type Chunk = Arc<Vec<u8>>;

/// A bounded memory of chunks.
#[derive(Default)]
pub(crate) struct ChunkCache {
    most: usize,
    pub(super) slots: Vec<Slot>,
    /// In which slot a chunk is.
    pub(super) by_chunk: HashMap<u64, usize>,
    hand: usize,
}

pub(super) struct Slot {
    chunk: u64,
    bytes: Chunk,
    used: bool,
}

impl ChunkCache {
    /// Keeps at most `most` chunks.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, ..Self::default() }
    }

    pub(crate) fn get(&mut self, chunk: u64) -> Option<&Chunk> {
        let slot = self.slots.get_mut(*self.by_chunk.get(&chunk)?)?;
        slot.used = true;
        Some(&slot.bytes)
    }

    /// Keeps a chunk, whose bytes are made only if it is kept; what it takes the place of, which is the caller's to give
    /// back: that takes its time.
    pub(crate) fn insert(&mut self, chunk: u64, bytes: impl FnOnce() -> Chunk) -> Option<Chunk> {
        if self.most == 0 || self.by_chunk.contains_key(&chunk) {
            return None;
        }
        // Not used yet: a chunk that is read once and never again goes first.
        let fresh = Slot { chunk, bytes: bytes(), used: false };
        if self.slots.len() < self.most {
            self.by_chunk.insert(chunk, self.slots.len());
            self.slots.push(fresh);
            return None;
        }
        // Ends after one round at most: each step takes a mark away.
        while let Some(slot) = self.slots.get_mut(self.hand) {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.most;
            if std::mem::take(&mut slot.used) {
                continue;
            }
            let old = std::mem::replace(slot, fresh);
            self.by_chunk.remove(&old.chunk);
            self.by_chunk.insert(chunk, index);
            return Some(old.bytes);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(chunk: u64) -> Chunk {
        Arc::new(vec![chunk as u8])
    }

    #[test]
    fn what_was_used_outlives_what_was_not_and_the_bound_holds() {
        let mut cache = ChunkCache::new(3);
        for chunk in 0..3 {
            assert!(cache.insert(chunk, || bytes(chunk)).is_none());
        }
        assert_eq!(cache.get(1), Some(&bytes(1)));

        assert_eq!(cache.insert(3, || bytes(3)), Some(bytes(0)));
        assert_eq!(cache.insert(4, || bytes(4)), Some(bytes(2)));

        assert_eq!(cache.get(1), Some(&bytes(1)), "was used");
        for gone in [0, 2] {
            assert_eq!(cache.get(gone), None);
        }
        for kept in [3, 4] {
            assert_eq!(cache.get(kept), Some(&bytes(kept)));
        }
        assert_eq!(cache.slots.len(), 3);
    }

    #[test]
    fn a_cache_without_room_keeps_nothing() {
        let mut cache = ChunkCache::new(0);
        assert!(cache.insert(1, || bytes(1)).is_none());
        assert_eq!(cache.get(1), None);
    }
}
