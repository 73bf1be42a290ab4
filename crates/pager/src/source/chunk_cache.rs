//! Chunks of a source, so many at most: CLOCK, which forgets what was not used since it last came by.

use std::collections::HashMap;

/// A bounded memory of chunks.
#[derive(Default)]
pub(crate) struct ChunkCache {
    most: usize,
    slots: Vec<Slot>,
    by_chunk: HashMap<u64, usize>,
    hand: usize,
}

struct Slot {
    chunk: u64,
    bytes: Vec<u8>,
    used: bool,
}

impl ChunkCache {
    /// Keeps at most `most` chunks.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, ..Self::default() }
    }

    pub(crate) fn get(&mut self, chunk: u64) -> Option<&[u8]> {
        let slot = self.slots.get_mut(*self.by_chunk.get(&chunk)?)?;
        slot.used = true;
        Some(&slot.bytes)
    }

    pub(crate) fn insert(&mut self, chunk: u64, bytes: &[u8]) {
        if self.most == 0 || self.by_chunk.contains_key(&chunk) {
            return;
        }
        // Not used yet: a chunk that is read once and never again goes first.
        let fresh = Slot { chunk, bytes: bytes.to_vec(), used: false };
        if self.slots.len() < self.most {
            self.by_chunk.insert(chunk, self.slots.len());
            self.slots.push(fresh);
            return;
        }
        // Ends after one round at most: each step takes a mark away.
        while let Some(slot) = self.slots.get_mut(self.hand) {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.most;
            if std::mem::take(&mut slot.used) {
                continue;
            }
            self.by_chunk.remove(&slot.chunk);
            *slot = fresh;
            self.by_chunk.insert(chunk, index);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_outlives_what_was_not_and_the_bound_holds() {
        let mut cache = ChunkCache::new(3);
        for chunk in 0..3 {
            cache.insert(chunk, &[chunk as u8]);
        }
        assert_eq!(cache.get(1), Some(&[1][..]));

        cache.insert(3, &[3]);
        cache.insert(4, &[4]);

        assert_eq!(cache.get(1), Some(&[1][..]), "was used");
        for gone in [0, 2] {
            assert_eq!(cache.get(gone), None);
        }
        for kept in [3, 4] {
            assert_eq!(cache.get(kept), Some(&[kept as u8][..]));
        }
        assert_eq!(cache.slots.len(), 3);
    }

    #[test]
    fn a_cache_without_room_keeps_nothing() {
        let mut cache = ChunkCache::new(0);
        cache.insert(1, &[1]);
        assert_eq!(cache.get(1), None);
    }
}
