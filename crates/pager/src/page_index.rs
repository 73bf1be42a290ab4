//! Which place in a queue a page has.
//!
//! Bringing a page moves 8 KiB through the processor's caches. A general map with room for every fault takes 400 KiB, so that
//! each fault waited for memory; a table of nothing but places stays where it is fast, and pages side by side have theirs in one line.

use std::hash::{BuildHasher, RandomState};

const EMPTY: u16 = u16::MAX;
/// Pages whose slots lie side by side: a cache line.
const NEIGHBOURS_BITS: u32 = 5;
const PAGE_BITS: u32 = 12;

/// A hash table of places, by open addressing. It never grows: there is room for twice as many as it was made for.
#[derive(Debug)]
pub(crate) struct PageIndex {
    slots: Box<[u16]>,
    /// Another one each time, so that nobody can choose pages that meet.
    factor: u64,
}

impl PageIndex {
    /// For so many places at most, a power of two, each below that.
    pub(crate) fn new(most: usize) -> Self {
        let slots = vec![EMPTY; most * 2].into_boxed_slice();
        Self { slots, factor: RandomState::new().hash_one(0_u64) | 1 }
    }

    fn home(&self, page: u64) -> usize {
        let number = page >> PAGE_BITS;
        let line_bits = self.slots.len().trailing_zeros() - NEIGHBOURS_BITS;
        // The high end of a product depends on every bit of what was multiplied.
        let line = (number >> NEIGHBOURS_BITS).wrapping_mul(self.factor) >> (u64::BITS - line_bits);
        ((line << NEIGHBOURS_BITS) | (number & ((1 << NEIGHBOURS_BITS) - 1))) as usize
    }

    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    fn at(&self, slot: usize) -> u16 {
        self.slots.get(slot & self.mask()).copied().unwrap_or(EMPTY)
    }

    fn set(&mut self, slot: usize, place: u16) {
        let mask = self.mask();
        if let Some(slot) = self.slots.get_mut(slot & mask) {
            *slot = place;
        }
    }

    /// The slots from a page's own on, up to the first empty one.
    fn chain(&self, page: u64) -> impl Iterator<Item = (usize, u16)> + '_ {
        let home = self.home(page);
        let slots = (home..home + self.slots.len()).map(|slot| (slot, self.at(slot)));
        slots.take_while(|&(_, place)| place != EMPTY)
    }

    /// The place of this page that `is` the one.
    pub(crate) fn find(&self, page: u64, is: impl Fn(u16) -> bool) -> Option<u16> {
        self.chain(page).map(|(_, place)| place).find(|&place| is(place))
    }

    pub(crate) fn insert(&mut self, page: u64, place: u16) {
        let slot = self.home(page) + self.chain(page).count();
        self.set(slot, place);
    }

    /// `page_of` the places that stay: those behind it move up, so that none is cut off from its own slot.
    pub(crate) fn remove(&mut self, page: u64, place: u16, page_of: impl Fn(u16) -> u64) {
        let Some((mut hole, _)) = self.chain(page).find(|&(_, other)| other == place) else { return };
        let mask = self.mask();
        for slot in hole + 1..hole + self.slots.len() {
            let other = self.at(slot);
            if other == EMPTY {
                break;
            }
            let from_own = slot.wrapping_sub(self.home(page_of(other))) & mask;
            if from_own >= slot - hole {
                self.set(hole, other);
                hole = slot;
            }
        }
        self.set(hole, EMPTY);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const MOST: usize = 64;

    /// Puts in and takes out, as `step` says for each round, and compares with a map.
    fn compare(rounds: u64, page_at: impl Fn(u64) -> u64) {
        let mut index = PageIndex::new(MOST);
        let mut pages: Vec<Option<u64>> = vec![None; MOST];
        let mut map: HashMap<u64, u16> = HashMap::new();
        for round in 0..rounds {
            let page = page_at(round) << PAGE_BITS;
            let is = |place: u16| pages[place as usize] == Some(page);
            assert_eq!(index.find(page, is), map.get(&page).copied(), "round {round}");
            if let Some(place) = map.remove(&page) {
                index.remove(page, place, |other| pages[other as usize].unwrap());
                pages[place as usize] = None;
            } else if let Some(place) = pages.iter().position(Option::is_none) {
                index.insert(page, place as u16);
                pages[place] = Some(page);
                map.insert(page, place as u16);
            }
        }
        for (&page, &place) in &map {
            assert_eq!(index.find(page, |other| pages[other as usize] == Some(page)), Some(place));
        }
    }

    fn scattered(round: u64) -> u64 {
        round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33
    }

    #[test]
    fn places_are_found_as_in_a_map_when_pages_are_few_and_come_again() {
        compare(20_000, |round| scattered(round) % 100);
    }

    #[test]
    fn places_are_found_as_in_a_map_when_pages_lie_far_apart() {
        compare(20_000, |round| (scattered(round) % 100) << 9);
    }

    #[test]
    fn places_are_found_as_in_a_map_when_pages_are_side_by_side() {
        compare(20_000, |round| round % 200 / 2);
    }

    #[test]
    fn two_tables_spread_pages_differently() {
        let homes = |index: &PageIndex| (0..100).map(|page| index.home(page << 20)).collect::<Vec<_>>();

        assert_ne!(homes(&PageIndex::new(4096)), homes(&PageIndex::new(4096)));
    }
}
