//! Where pages go in a hash map.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Spreads pages over a map by one multiplication: the general hasher takes as long as all the rest of the queue. The factor
/// is another one each time, so nobody can choose pages that meet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scatter {
    factor: u64,
}

impl Scatter {
    pub(crate) fn new() -> Self {
        Self { factor: RandomState::new().hash_one(0_u64) | 1 }
    }
}

impl BuildHasher for Scatter {
    type Hasher = Scattered;

    fn build_hasher(&self) -> Scattered {
        Scattered { factor: self.factor, sum: 0 }
    }
}

pub(crate) struct Scattered {
    factor: u64,
    sum: u64,
}

impl Hasher for Scattered {
    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.sum ^ word) * u128::from(self.factor);
        // A map looks at both ends of it, and the low end of an address is always the same.
        self.sum = product as u64 ^ (product >> 64) as u64;
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn finish(&self) -> u64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn pages_side_by_side_are_spread_at_both_ends() {
        let scatter = Scatter::new();
        let hashes: Vec<u64> =
            (0..1024_u64).map(|page| scatter.hash_one((0x7f00_0000_0000 + page * 4096, 0_isize))).collect();

        let low: HashSet<u64> = hashes.iter().map(|hash| hash & 1023).collect();
        let high: HashSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();

        assert!(low.len() > 400, "{} of 1024", low.len());
        assert!(high.len() > 100, "{} of 128", high.len());
    }

    #[test]
    fn two_maps_spread_them_differently() {
        assert_ne!(Scatter::new().hash_one(4096_u64), Scatter::new().hash_one(4096_u64));
    }
}
