//! The map as a list of its pieces, to be put down and taken up again by another process.

use std::ops::Range;

use super::{AddressMap, HIGHEST_ADDRESS, Pages, Piece};

/// A piece of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoredPiece {
    pub(crate) address: u64,
    pub(crate) len: u64,
    /// First page, its offset in the source, and whether it is a second place of them; `None` for memory without a source.
    pub(crate) pages: Option<(usize, u64, bool)>,
}

impl AddressMap {
    /// All pieces, in address order.
    pub(crate) fn stored_pieces(&self) -> impl ExactSizeIterator<Item = StoredPiece> + '_ {
        self.pieces.iter().map(|(&address, piece)| StoredPiece {
            address,
            len: piece.len,
            pages: piece.pages.map(|pages| (pages.first, pages.source_offset, pages.again)),
        })
    }

    /// Pieces that it may get.
    pub(crate) fn most_pieces(&self) -> usize {
        self.most_pieces
    }

    /// The map that these are the pieces of, of a session of `pages` pages in all.
    ///
    /// # Errors
    ///
    /// What cannot be about them.
    pub(crate) fn restore(
        stored: impl Iterator<Item = StoredPiece>,
        page_size: u64,
        pages: usize,
        most_pieces: usize,
        source_len: u64,
    ) -> Result<Self, String> {
        if !page_size.is_power_of_two() {
            return Err(format!("{page_size} bytes are no page"));
        }
        let mut map = Self { page_shift: page_size.trailing_zeros(), pages, most_pieces, ..Self::empty() };
        let mut reached = 0;
        for StoredPiece { address, len, pages: own } in stored {
            let end = address.checked_add(len).filter(|&end| end <= HIGHEST_ADDRESS);
            let Some(end) = end.filter(|_| len > 0 && address >= reached) else {
                return Err(format!("{address:#x}+{len:#x} is no memory, or was before"));
            };
            reached = end;
            let source_offset = own.map_or(0, |(_, offset, _)| offset);
            if [address, len, source_offset].iter().any(|value| value % page_size != 0) {
                return Err(format!("{address:#x}+{len:#x} is no memory of pages of {page_size} bytes"));
            }
            let own = own.map(|(first, source_offset, again)| Pages { first, source_offset, again });
            if let Some(Pages { first, source_offset, again }) = own {
                let last = first.checked_add(map.pages_in(len)).filter(|&last| last <= pages);
                let source = source_offset.checked_add(len).filter(|&end| end <= source_len);
                if last.is_none() || source.is_none() {
                    return Err(format!(
                        "page {first} at {address:#x}+{len:#x}, from {source_offset:#x} on, of {pages} pages and a source of \
                         {source_len:#x} bytes"
                    ));
                }
                if again {
                    map.again += 1;
                } else if map.by_page.insert(first, address).is_some() {
                    return Err(format!("page {first} is in two places"));
                }
            }
            map.pieces.insert(address, Piece { len, pages: own });
        }
        map.check_disjoint()?;
        Ok(map)
    }

    /// Pages that are nowhere.
    pub(crate) fn nowhere(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut reached = 0;
        let mapped = self.by_page.iter().map(|(&first, address)| {
            first..first + self.pieces.get(address).map_or(0, |piece| self.pages_in(piece.len))
        });
        mapped.chain(std::iter::once(self.pages..self.pages)).filter_map(move |own| {
            let gap = reached..own.start;
            reached = own.end;
            (!gap.is_empty()).then_some(gap)
        })
    }

    /// No page is in two first places.
    fn check_disjoint(&self) -> Result<(), String> {
        let mut reached = 0;
        for (&first, address) in &self.by_page {
            if first < reached {
                return Err(format!("page {first} is in two places"));
            }
            reached = first + self.pieces.get(address).map_or(0, |piece| self.pages_in(piece.len));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Region;
    use super::*;

    const PAGE: u64 = 4096;
    const HERE: u64 = 0x10_0000;
    const THERE: u64 = 0x40_0000;

    fn restored(map: &AddressMap, stored: impl Iterator<Item = StoredPiece>) -> Result<AddressMap, String> {
        AddressMap::restore(stored, PAGE, map.pages(), map.most_pieces(), 64 * PAGE)
    }

    fn changed() -> AddressMap {
        let region = Region { address: HERE, len: 16 * PAGE, source_offset: 2 * PAGE };
        let mut map = AddressMap::new(&[region], PAGE, 64 * PAGE).unwrap();
        map.remap(HERE + 4 * PAGE, THERE, 3 * PAGE).1.unwrap();
        map.unmap(HERE + 4 * PAGE, HERE + 6 * PAGE).1.unwrap();
        map.remap(HERE + 10 * PAGE, THERE + 32 * PAGE, 0).1.unwrap();
        map.grow(THERE + 3 * PAGE, THERE + 5 * PAGE).unwrap();
        map
    }

    #[test]
    fn a_map_that_was_put_down_is_taken_up_as_it_was() {
        let map = changed();

        let mut again = restored(&map, map.stored_pieces()).unwrap();

        assert_eq!(format!("{again:?}"), format!("{map:?}"));
        // They were moved over what was unmapped, and are there a second time.
        assert_eq!(again.nowhere().collect::<Vec<_>>(), []);
        assert_eq!(again.unmap(HERE, HERE + 16 * PAGE).0, changed().unmap(HERE, HERE + 16 * PAGE).0);
    }

    #[test]
    fn pieces_that_cannot_be_are_refused() {
        let map = changed();
        let spoilt: [fn(&mut StoredPiece); 7] = [
            |piece| piece.len = 0,
            |piece| piece.address += 1,
            |piece| piece.address = u64::MAX - PAGE + 1,
            |piece| piece.len += 64 * PAGE,
            |piece| piece.pages = Some((usize::MAX, 0, false)),
            |piece| piece.pages = Some((0, u64::MAX - PAGE + 1, false)),
            |piece| piece.pages = Some((15, 0, false)),
        ];
        for spoil in spoilt {
            let mut pieces: Vec<_> = map.stored_pieces().collect();
            spoil(&mut pieces[1]);
            assert!(restored(&map, pieces.into_iter()).is_err());
        }
    }
}
