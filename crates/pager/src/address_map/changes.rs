//! What the served process does to its mappings, done to the map.

use std::ops::Range;

use super::{AddressMap, HIGHEST_ADDRESS, Pages, Piece};
use crate::error::PagerError;

impl AddressMap {
    /// Takes `start..end` out of the map: its process has unmapped it. The pages that are mapped nowhere any more.
    ///
    /// # Errors
    ///
    /// Besides, [`PagerError::Exhausted`] when that cuts the map into too many pieces. It is cut all the same.
    pub(crate) fn unmap(&mut self, start: u64, end: u64) -> (Vec<Range<usize>>, Result<(), PagerError>) {
        let out = self.cut_out(start, end);
        let gone = self.lost(out);
        (gone, self.check_pieces())
    }

    /// Moves what is in `from..from + len` to `to`. The old place stays as memory without a source: it is taken away by
    /// an UNMAP of its own unless the process asked to keep it. `len` 0: shared memory was mapped a second time.
    ///
    /// # Errors
    ///
    /// [`PagerError::Protocol`] for addresses that cannot be, [`PagerError::Exhausted`] when the map has too many pieces
    /// (it is right all the same). Besides, the pages that are mapped nowhere any more.
    pub(crate) fn remap(
        &mut self,
        from: u64,
        to: u64,
        len: u64,
    ) -> (Vec<Range<usize>>, Result<(), PagerError>) {
        let aligned = [from, to, len].iter().all(|value| value % self.page_size() == 0);
        let ends =
            [from, to].iter().all(|start| start.checked_add(len).is_some_and(|end| end <= HIGHEST_ADDRESS));
        if !aligned || !ends {
            let error = PagerError::Protocol(format!(
                "memory was moved from {from:#x} to {to:#x} ({len:#x} bytes), which cannot be with pages of {} bytes",
                self.page_size()
            ));
            return (Vec::new(), Err(error));
        }
        if len == 0 {
            self.map_again(from, to);
            return (Vec::new(), self.check_pieces());
        }
        let moved = self.cut_out(from, from + len);
        // Whatever was at the new place is gone; its UNMAP came before this, if the process sends any.
        let replaced = self.cut_out(to, to + len);
        for (address, piece) in moved {
            self.insert(address, Piece { pages: None, ..piece });
            self.insert(address - from + to, piece);
        }
        (self.lost(replaced), self.check_pieces())
    }

    /// Takes note of memory without a source, which nothing is known of yet: a mapping has grown in place.
    ///
    /// # Errors
    ///
    /// [`PagerError::Exhausted`] when the map has too many pieces.
    pub(crate) fn grow(&mut self, start: u64, end: u64) -> Result<(), PagerError> {
        let known: Vec<Range<u64>> =
            self.overlapping(start, end).map(|(address, piece)| address..address + piece.len).collect();
        let mut from = start;
        for taken in known.into_iter().chain(std::iter::once(end..end)) {
            if from < taken.start {
                self.insert(from, Piece { len: taken.start - from, pages: None });
            }
            from = taken.end;
        }
        self.check_pieces()
    }

    /// Takes out what lies in `start..end`, whole pages of it, cutting pieces where they reach beyond.
    fn cut_out(&mut self, start: u64, end: u64) -> Vec<(u64, Piece)> {
        let mask = self.page_size() - 1;
        let (start, end) = (start & !mask, end.saturating_add(mask) & !mask);
        let touched: Vec<(u64, Piece)> = self.overlapping(start, end).collect();
        let mut out = Vec::with_capacity(touched.len());
        for (address, piece) in touched {
            self.take(address);
            let (from, to) = (start.max(address), end.min(address + piece.len));
            for (kept, within) in [(address..from, false), (from..to, true), (to..address + piece.len, false)]
            {
                if kept.is_empty() {
                    continue;
                }
                let skip = kept.start - address;
                let pages = piece.pages.map(|pages| Pages {
                    first: pages.first + self.pages_in(skip),
                    source_offset: pages.source_offset + skip,
                    ..pages
                });
                let part = Piece { len: kept.end - kept.start, pages };
                if within {
                    out.push((kept.start, part));
                } else {
                    self.insert(kept.start, part);
                }
            }
        }
        out
    }

    /// The pages of pieces that were taken out and are mapped nowhere else.
    fn lost(&mut self, out: Vec<(u64, Piece)>) -> Vec<Range<usize>> {
        let mut gone = Vec::new();
        for (_, piece) in out {
            let Some(pages) = piece.pages.filter(|pages| !pages.again) else { continue };
            gone.extend(self.promote(pages.first..pages.first + self.pages_in(piece.len)));
        }
        gone
    }

    /// Pages have lost their place. Those that have a second one are there from now on; the others are returned.
    fn promote(&mut self, pages: Range<usize>) -> Vec<Range<usize>> {
        let mut gone: Vec<Range<usize>> = std::iter::once(pages.clone()).collect();
        for place in self.other_places_of(pages) {
            for (address, mut piece) in self.cut_out(place.start, place.end) {
                if let Some(own) = piece.pages.as_mut() {
                    let range = own.first..own.first + (piece.len >> self.page_shift) as usize;
                    // Whole pieces only: of a page's third place, cut differently, a part may stay a second place of none.
                    let within = |gone: &Range<usize>| gone.start <= range.start && range.end <= gone.end;
                    if let Some(at) = gone.iter().position(within) {
                        own.again = false;
                        let whole = gone.swap_remove(at);
                        gone.extend(without(&whole, &range));
                    }
                }
                self.insert(address, piece);
            }
        }
        gone
    }

    /// The kernel does not say how long the second place is: at most to the end of the first, and of what is free there.
    fn map_again(&mut self, from: u64, to: u64) {
        let Some((start, piece)) = self.piece_at(from) else { return };
        let Some(pages) = piece.pages else { return };
        let skip = from - start;
        let end = (to + (piece.len - skip)).min(HIGHEST_ADDRESS);
        let free = self.overlapping(to, end).map(|(address, _)| address).next().unwrap_or(end);
        if free <= to {
            return;
        }
        let pages = Pages {
            first: pages.first + self.pages_in(skip),
            source_offset: pages.source_offset + skip,
            again: true,
        };
        self.insert(to, Piece { len: free - to, pages: Some(pages) });
    }

    fn take(&mut self, address: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&address)?;
        match piece.pages {
            Some(pages) if pages.again => self.again -= 1,
            Some(pages) => drop(self.by_page.remove(&pages.first)),
            None => {}
        }
        Some(piece)
    }

    /// Puts a piece in, as one with its neighbours where it goes on from or into them.
    fn insert(&mut self, address: u64, piece: Piece) {
        let (mut address, mut piece) = (address, piece);
        if let Some((before, earlier)) = address.checked_sub(1).and_then(|below| self.piece_at(below))
            && self.goes_on(earlier, piece)
        {
            self.take(before);
            address = before;
            piece = Piece { len: earlier.len + piece.len, ..earlier };
        }
        if let Some(&later) = self.pieces.get(&(address + piece.len))
            && self.goes_on(piece, later)
        {
            self.take(address + piece.len);
            piece.len += later.len;
        }
        match piece.pages {
            Some(pages) if pages.again => self.again += 1,
            Some(pages) => drop(self.by_page.insert(pages.first, address)),
            None => {}
        }
        self.pieces.insert(address, piece);
    }

    /// Whether `later`, which lies behind `earlier`, is the same memory going on.
    fn goes_on(&self, earlier: Piece, later: Piece) -> bool {
        match (earlier.pages, later.pages) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                a.first + self.pages_in(earlier.len) == b.first
                    && a.source_offset + earlier.len == b.source_offset
                    && a.again == b.again
            }
            _ => false,
        }
    }

    fn check_pieces(&self) -> Result<(), PagerError> {
        if self.pieces.len() <= self.most_pieces {
            return Ok(());
        }
        Err(PagerError::Exhausted(format!(
            "the served process has cut its memory into {} pieces (mremap, munmap); {} are followed",
            self.pieces.len(),
            self.most_pieces
        )))
    }
}

/// What is left of `pages` without `taken`: nothing, one or two ranges.
fn without(pages: &Range<usize>, taken: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let before = pages.start..taken.start.clamp(pages.start, pages.end);
    let after = taken.end.clamp(pages.start, pages.end)..pages.end;
    [before, after].into_iter().filter(|range| !range.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]

    use crate::address_map::{AddressMap, Place, Region};

    const PAGE: u64 = 4096;
    const HERE: u64 = 0x10_0000;
    const THERE: u64 = 0x80_0000;

    /// Eight pages at [`HERE`], source from page 2 on.
    fn map() -> AddressMap {
        let region = Region { address: HERE, len: 8 * PAGE, source_offset: 2 * PAGE };
        AddressMap::new(&[region], PAGE, 64 * PAGE).unwrap()
    }

    fn at(base: u64, page: u64) -> u64 {
        base + page * PAGE
    }

    #[test]
    fn unmapping_takes_whole_pages_out_and_leaves_the_others_as_they_are() {
        let mut map = map();

        let (gone, outcome) = map.unmap(at(HERE, 2) + 1, at(HERE, 4) - 1);

        assert_eq!((gone, outcome.is_ok()), (vec![2..4], true));
        assert_eq!(map.page_of(at(HERE, 1)), Some(1));
        assert_eq!(map.page_of(at(HERE, 2)), None);
        assert_eq!(map.page_of(at(HERE, 3)), None);
        assert_eq!(map.page_of(at(HERE, 4)), Some(4));
        assert_eq!(map.address_of(3), None);
        assert_eq!(map.source_offset_of(4), Some(6 * PAGE));
        assert_eq!(map.clip(4..9), 4..8);
        assert_eq!(map.block_of(5, 8), 4..8);
    }

    #[test]
    fn what_is_moved_keeps_its_pages_and_source_and_leaves_zeros_behind() {
        let mut map = map();

        map.remap(at(HERE, 2), at(THERE, 5), 3 * PAGE).1.unwrap();

        assert_eq!(map.address_of(3), Some(at(THERE, 6)));
        assert_eq!(map.source_offset_of(3), Some(5 * PAGE));
        assert_eq!(map.page_of(at(THERE, 7)), Some(4));
        assert_eq!(map.place_of(at(HERE, 3)), Some(Place::Zeros));
        assert_eq!(map.clip(3..8), 3..5);
        assert_eq!(map.address_of(5), Some(at(HERE, 5)));

        let (gone, outcome) = map.unmap(at(HERE, 2), at(HERE, 5));

        assert_eq!((gone, outcome.is_ok()), (vec![], true));
        assert_eq!(map.place_of(at(HERE, 3)), None);
    }

    #[test]
    fn moving_back_makes_one_piece_again() {
        let mut map = map();
        for page in [1, 5, 0, 7] {
            map.remap(at(HERE, page), THERE, PAGE).1.unwrap();
            map.unmap(at(HERE, page), at(HERE, page + 1)).1.unwrap();
            map.remap(THERE, at(HERE, page), PAGE).1.unwrap();
            map.unmap(THERE, at(THERE, 1)).1.unwrap();
        }

        assert_eq!(map.memory().collect::<Vec<_>>(), [(HERE..at(HERE, 8), Some(2 * PAGE))]);
        assert_eq!(map.clip(0..8), 0..8);
    }

    #[test]
    fn what_is_moved_over_other_memory_of_the_session_takes_its_place() {
        let mut map = map();

        let (gone, outcome) = map.remap(HERE, at(HERE, 6), 2 * PAGE);

        assert_eq!((gone, outcome.is_ok()), (vec![6..8], true));
        assert_eq!(map.page_of(at(HERE, 7)), Some(1));
        assert_eq!(map.address_of(7), None);
    }

    #[test]
    fn memory_mapped_twice_is_one_page_until_both_places_are_gone() {
        let mut map = map();
        map.remap(at(HERE, 4), THERE, 0).1.unwrap();

        assert_eq!(map.page_of(at(THERE, 3)), Some(7));
        assert_eq!(map.place_of(at(THERE, 4)), None);
        assert_eq!(map.address_of(5), Some(at(HERE, 5)));
        assert_eq!(map.other_places_of(3..6), [THERE..at(THERE, 2)]);

        let (gone, _) = map.unmap(HERE, at(HERE, 6));
        assert_eq!(gone, [0..4]);
        assert_eq!(map.address_of(5), Some(at(THERE, 1)));
        assert_eq!(map.other_places_of(0..8), [at(THERE, 2)..at(THERE, 4)]);

        let (gone, _) = map.unmap(THERE, at(THERE, 4));
        assert_eq!(gone, [4..6]);
        assert_eq!(map.address_of(7), Some(at(HERE, 7)));
    }

    #[test]
    fn memory_that_grows_is_zeros_and_moves_along() {
        let mut map = map();

        map.grow(at(HERE, 8), at(HERE, 10)).unwrap();
        assert_eq!(map.place_of(at(HERE, 9)), Some(Place::Zeros));
        assert_eq!(map.end_below(at(HERE, 11)), Some(at(HERE, 10)));

        map.remap(HERE, THERE, 10 * PAGE).1.unwrap();
        assert_eq!(map.place_of(at(THERE, 9)), Some(Place::Zeros));
        assert_eq!(map.page_of(at(THERE, 7)), Some(7));
    }

    #[test]
    fn a_map_of_pieces_is_what_a_map_of_pages_would_be() {
        const SLOTS: usize = 96;
        for seed in 1..200_u64 {
            let mut state = seed;
            let mut random = |below: usize| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as usize % below
            };
            let regions = [(0, 16, 8), (16, 8, 0), (40, 8, 30)].map(|(slot, pages, source)| Region {
                address: at(HERE, slot),
                len: pages * PAGE,
                source_offset: source * PAGE,
            });
            let mut map = AddressMap::new(&regions, PAGE, 64 * PAGE).unwrap();
            let sources: Vec<_> = (0..32).map(|page| map.source_offset_of(page)).collect();
            let look = |map: &AddressMap| -> Vec<Option<Place>> {
                (0..SLOTS).map(|slot| map.place_of(at(HERE, slot as u64) + 5)).collect()
            };
            let mut model = look(&map);
            for _ in 0..60 {
                let len = 1 + random(12);
                let (from, to) = (random(SLOTS - len), random(SLOTS - len));
                let [start, end, there] = [from, from + len, to].map(|slot| at(HERE, slot as u64));
                match random(3) {
                    0 => {
                        map.unmap(start, end).1.unwrap();
                        model[from..from + len].fill(None);
                    }
                    1 => {
                        map.grow(start, end).unwrap();
                        model[from..from + len]
                            .iter_mut()
                            .for_each(|slot| *slot = slot.or(Some(Place::Zeros)));
                    }
                    _ if from.abs_diff(to) >= len => {
                        map.remap(start, there, len as u64 * PAGE).1.unwrap();
                        for page in 0..len {
                            model[to + page] = model[from + page];
                            model[from + page] = model[from + page].map(|_| Place::Zeros);
                        }
                    }
                    _ => {}
                }
                assert_eq!(look(&map), model, "seed {seed}");
                for (page, &source) in sources.iter().enumerate() {
                    let slot = model.iter().position(|&place| place == Some(Place::Page(page)));
                    assert_eq!(map.address_of(page), slot.map(|slot| at(HERE, slot as u64)), "seed {seed}");
                    assert!(slot.is_none() || map.source_offset_of(page) == source, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn a_move_that_cannot_be_is_refused() {
        assert!(map().remap(HERE, THERE + 1, PAGE).1.unwrap_err().to_string().contains("cannot be"));
        assert!(map().remap(HERE, u64::MAX - PAGE + 1, PAGE).1.is_err());
    }

    #[test]
    fn memory_scattered_into_too_many_pieces_is_refused_by_name() {
        let pages = 3 * super::super::MOST_NEW_PIECES as u64;
        let region = Region { address: HERE, len: pages * PAGE, source_offset: 0 };
        let mut map = AddressMap::new(&[region], PAGE, pages * PAGE).unwrap();
        let cut = |map: &mut AddressMap, page: u64| map.unmap(at(HERE, page), at(HERE, page + 1)).1;

        let failed = (1..pages).step_by(2).find_map(|page| cut(&mut map, page).err()).unwrap();

        assert_eq!(failed.code(), "ERR_UFFD_EXHAUSTED");
        assert!(failed.to_string().contains("8194 pieces"), "{failed}");
    }
}
