//! Reproducible randomness: the same seed gives the same accesses on every machine and in every version,
//! which is why it is written out here and not left to a library.

/// xorshift64*: enough to scatter accesses, useless for secrets.
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// A generator whose sequence depends on `seed` alone.
    pub(crate) fn new(seed: u64) -> Self {
        // The state must not be zero, and small seeds must not start with small outputs.
        let mixed = (seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self { state: if mixed == 0 { 1 } else { mixed } }
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let output = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        // The high half of the product is below `bound`, so it fits.
        ((u128::from(output) * bound as u128) >> 64) as usize
    }

    /// Brings `items` into random order (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffling_keeps_every_item_once_and_depends_on_the_seed_alone() {
        let shuffled = |seed| {
            let mut items: Vec<u32> = (0..1000).collect();
            Random::new(seed).shuffle(&mut items);
            items
        };

        let mut sorted = shuffled(7);
        sorted.sort_unstable();

        assert_eq!(sorted, (0..1000).collect::<Vec<u32>>());
        assert_eq!(shuffled(7), shuffled(7));
        assert_ne!(shuffled(7), shuffled(8));
    }
}
