//! From addresses of the served process to pages of the session and offsets of its source, through everything that the
//! process does to its mappings.
//!
//! A session numbers its pages through, region after region in address order, so that one bitmap serves all
//! regions. The number of a page never changes: it is what a page's state is kept under, and what its bytes in the source
//! follow from. Where a page is does change: UNMAP takes a piece of the map away, REMAP gives one another address. What
//! was left behind, or has grown, has no page number: it reads zero until it is written, and nothing else is ever known
//! of it.
//!
//! The regions come from the other process and are checked here, once: a map that exists holds only non-empty, aligned,
//! disjoint pieces below the highest user address, all inside the source. It costs memory by the piece, never by the
//! page, and the number of pieces is limited: a process that scatters its memory page by page is refused, by name.

mod changes;
mod stored;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::PagerError;
pub(crate) use stored::StoredPiece;

/// One past the highest user address of the architectures served (five-level page tables).
const HIGHEST_ADDRESS: u64 = 1 << 56;
/// How many pieces a map may get beyond the regions it began with. The kernel allows a process 65,530 mappings; who
/// needs as many as this for the memory of one session does it on purpose.
const MOST_NEW_PIECES: usize = 8192;

/// A stretch of the other process's memory and where its bytes are in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Region {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where its first byte is in the source.
    pub source_offset: u64,
}

/// What is at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This page of the session.
    Page(usize),
    /// Memory without a source: left behind by a move, or grown. A page missing there is zeros.
    Zeros,
}

/// The pages of a piece and where the first is in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    first: usize,
    source_offset: u64,
    /// A second place of pages that have one already: shared memory, mapped twice.
    again: bool,
}

/// What the map knows by address. The address itself is its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    len: u64,
    /// `None`: zeros.
    pages: Option<Pages>,
}

/// The memory of a session, by address and by page.
#[derive(Debug, Clone)]
pub struct AddressMap {
    pieces: BTreeMap<u64, Piece>,
    /// From the first page of each piece that is no second place to its address.
    by_page: BTreeMap<usize, u64>,
    page_shift: u32,
    pages: usize,
    most_pieces: usize,
    /// Second places. Almost always none.
    again: usize,
}

impl AddressMap {
    /// Checks the regions and lays them out.
    ///
    /// `page_size` is a power of two in bytes, `source_len` the source's length in bytes.
    ///
    /// # Errors
    ///
    /// [`PagerError::Region`] names the region (by its position in `regions`) and what is wrong with it.
    pub fn new(regions: &[Region], page_size: u64, source_len: u64) -> Result<Self, PagerError> {
        if regions.is_empty() {
            return Err(PagerError::Protocol("the handshake names no region".to_owned()));
        }
        for (index, region) in regions.iter().enumerate() {
            check(region, page_size, source_len).map_err(|reason| PagerError::Region { index, reason })?;
        }
        let total: u64 = regions.iter().map(|region| region.len).fold(0, u64::saturating_add);
        if total > source_len {
            // Also bounds what a hostile peer can make this process allocate.
            return Err(PagerError::Protocol(format!(
                "the regions have {total} bytes together, the memory image only {source_len}"
            )));
        }
        let mut order: Vec<usize> = (0..regions.len()).collect();
        order.sort_by_key(|&index| regions.get(index).map_or(0, |region| region.address));
        let mut map = Self {
            pieces: BTreeMap::new(),
            by_page: BTreeMap::new(),
            page_shift: page_size.trailing_zeros(),
            pages: 0,
            most_pieces: regions.len() + MOST_NEW_PIECES,
            again: 0,
        };
        for index in order {
            let Some(&Region { address, len, source_offset }) = regions.get(index) else { continue };
            if let Some((&before, piece)) = map.pieces.last_key_value()
                && before + piece.len > address
            {
                return Err(PagerError::Region {
                    index,
                    reason: format!("{address:#x}+{len:#x} overlaps {before:#x}+{:#x}", piece.len),
                });
            }
            let pages = Some(Pages { first: map.pages, source_offset, again: false });
            // As it was given, however it goes on: one region is one mapping, or at least was meant as one.
            map.pieces.insert(address, Piece { len, pages });
            map.by_page.insert(map.pages, address);
            map.pages += map.pages_in(len);
        }
        Ok(map)
    }

    /// No memory at all.
    pub(crate) const fn empty() -> Self {
        Self {
            pieces: BTreeMap::new(),
            by_page: BTreeMap::new(),
            page_shift: 12,
            pages: 0,
            most_pieces: MOST_NEW_PIECES,
            again: 0,
        }
    }

    /// Pages of all regions together, those that are not mapped any more included.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// What has a source, in address order and as it lies now.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.pieces.iter().filter_map(|(&address, piece)| {
            let source_offset = piece.pages?.source_offset;
            Some(Region { address, len: piece.len, source_offset })
        })
    }

    /// All memory of the session, in address order and as it lies now; `None` for what has no source.
    pub fn memory(&self) -> impl Iterator<Item = (Range<u64>, Option<u64>)> + '_ {
        self.pieces.iter().map(|(&address, piece)| {
            (address..address + piece.len, piece.pages.map(|pages| pages.source_offset))
        })
    }

    /// What is at `address`; `None` outside the session.
    #[must_use]
    pub fn place_of(&self, address: u64) -> Option<Place> {
        let (start, piece) = self.piece_at(address)?;
        Some(match piece.pages {
            Some(pages) => Place::Page(pages.first + self.pages_in(address - start)),
            None => Place::Zeros,
        })
    }

    /// The page that holds `address`; `None` outside every region.
    #[must_use]
    pub fn page_of(&self, address: u64) -> Option<usize> {
        match self.place_of(address)? {
            Place::Page(page) => Some(page),
            Place::Zeros => None,
        }
    }

    /// The pages that lie wholly or partly in `start..end`, piece by piece.
    pub fn pages_of(&self, start: u64, end: u64) -> impl Iterator<Item = Range<usize>> + '_ {
        let page_size = self.page_size();
        self.overlapping(start, end).filter_map(move |(address, piece)| {
            let first = piece.pages?.first;
            let from = start.max(address);
            let to = end.min(address + piece.len);
            let last = self.pages_in((to - address).saturating_add(page_size - 1));
            Some(first + self.pages_in(from - address)..first + last)
        })
    }

    /// The aligned block of `block` pages (a power of two) that holds `page`, clipped to its piece.
    ///
    /// Blocks are aligned in the other process's addresses, so that a region's faults fall into as few of
    /// them as possible whatever its offset in the source.
    #[must_use]
    pub fn block_of(&self, page: usize, block: usize) -> Range<usize> {
        let Some((address, piece, first_page)) = self.piece_of(page) else { return page..page };
        let base = self.pages_in(address);
        let within = page - first_page;
        let start = (base + within) / block * block;
        let first = first_page + start.saturating_sub(base);
        let last = first_page + (start + block).saturating_sub(base);
        first..last.min(first_page + self.pages_in(piece.len))
    }

    /// The part of `pages` that lies together with its first page: one ioctl's worth.
    #[must_use]
    pub fn clip(&self, pages: Range<usize>) -> Range<usize> {
        let end = self
            .piece_of(pages.start)
            .map_or(pages.start, |(_, piece, first)| first + self.pages_in(piece.len));
        pages.start..pages.end.min(end)
    }

    /// Where `page` is now; `None` when it is not mapped any more.
    #[must_use]
    pub fn address_of(&self, page: usize) -> Option<u64> {
        let (address, _, first) = self.piece_of(page)?;
        Some(address + self.bytes(page - first))
    }

    /// Offset of `page` in the source.
    #[must_use]
    pub fn source_offset_of(&self, page: usize) -> Option<u64> {
        let (_, piece, first) = self.piece_of(page)?;
        Some(piece.pages?.source_offset + self.bytes(page - first))
    }

    /// The other addresses of `pages`, where shared memory was mapped a second time.
    pub fn other_places_of(&self, pages: Range<usize>) -> Vec<Range<u64>> {
        if self.again == 0 {
            return Vec::new();
        }
        let places = self.pieces.iter().filter_map(|(&address, piece)| {
            let own = piece.pages.filter(|own| own.again)?;
            let first = pages.start.max(own.first);
            let last = pages.end.min(own.first + self.pages_in(piece.len));
            let start = address + self.bytes(first.saturating_sub(own.first));
            (first < last).then(|| start..start + self.bytes(last - first))
        });
        places.collect()
    }

    /// Where the memory below `address` ends, when nothing of the session is at `address`.
    #[must_use]
    pub fn end_below(&self, address: u64) -> Option<u64> {
        let (start, piece) = self.pieces.range(..=address).next_back()?;
        Some(start + piece.len).filter(|&end| end <= address)
    }

    /// Bytes of `count` pages.
    #[must_use]
    pub fn bytes(&self, count: usize) -> u64 {
        (count as u64) << self.page_shift
    }

    fn pages_in(&self, bytes: u64) -> usize {
        (bytes >> self.page_shift) as usize
    }

    fn piece_at(&self, address: u64) -> Option<(u64, Piece)> {
        let (&start, &piece) = self.pieces.range(..=address).next_back()?;
        (address < start + piece.len).then_some((start, piece))
    }

    /// The piece that holds `page`, its address and first page.
    fn piece_of(&self, page: usize) -> Option<(u64, Piece, usize)> {
        let (&first, &address) = self.by_page.range(..=page).next_back()?;
        let &piece = self.pieces.get(&address)?;
        (page < first + self.pages_in(piece.len)).then_some((address, piece, first))
    }

    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, Piece)> + '_ {
        let first = self.piece_at(start).map_or(start, |(address, _)| address);
        let pieces = self.pieces.range(first..end.max(first));
        pieces.map(|(&address, &piece)| (address, piece))
    }
}

fn check(region: &Region, page_size: u64, source_len: u64) -> Result<(), String> {
    let Region { address, len, source_offset } = *region;
    if len == 0 {
        return Err(format!("{address:#x} has no bytes"));
    }
    for (name, value) in [("address", address), ("size", len), ("offset", source_offset)] {
        if value % page_size != 0 {
            return Err(format!("{name} {value:#x} is no multiple of the page size {page_size}"));
        }
    }
    match address.checked_add(len) {
        Some(end) if end <= HIGHEST_ADDRESS => {}
        _ => return Err(format!("{address:#x}+{len:#x} ends beyond every user address")),
    }
    match source_offset.checked_add(len) {
        Some(end) if end <= source_len => Ok(()),
        _ => Err(format!(
            "offset {source_offset:#x}+{len:#x} ends beyond the memory image, which has {source_len:#x} bytes"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn region(address: u64, pages: u64, source_page: u64) -> Region {
        Region { address, len: pages * PAGE, source_offset: source_page * PAGE }
    }

    fn refused(regions: &[Region]) -> String {
        AddressMap::new(regions, PAGE, 64 * PAGE).unwrap_err().to_string()
    }

    #[test]
    fn regions_out_of_address_order_keep_their_source_offsets() {
        let map =
            AddressMap::new(&[region(0x20_0000, 2, 0), region(0x10_0000, 3, 2)], PAGE, 64 * PAGE).unwrap();

        assert_eq!(map.pages(), 5);
        assert_eq!(map.page_of(0x10_0000), Some(0));
        assert_eq!(map.page_of(0x20_1fff), Some(4));
        assert_eq!(map.source_offset_of(0), Some(2 * PAGE));
        assert_eq!(map.source_offset_of(4), Some(PAGE));
        assert_eq!(map.address_of(3), Some(0x20_0000));
    }

    #[test]
    fn addresses_between_and_outside_the_regions_belong_to_no_page() {
        let map =
            AddressMap::new(&[region(0x10_0000, 1, 0), region(0x20_0000, 1, 1)], PAGE, 64 * PAGE).unwrap();

        assert_eq!(map.page_of(0xf_ffff), None);
        assert_eq!(map.page_of(0x10_1000), None);
        assert_eq!(map.page_of(0x20_1000), None);
        assert_eq!(map.address_of(2), None);
    }

    #[test]
    fn a_block_is_aligned_in_addresses_and_clipped_to_its_region() {
        // Starts 3 pages into a block of 16 and ends 1 page into the third.
        let map = AddressMap::new(&[region(0x10_3000, 30, 0)], PAGE, 64 * PAGE).unwrap();

        assert_eq!(map.block_of(0, 16), 0..13);
        assert_eq!(map.block_of(12, 16), 0..13);
        assert_eq!(map.block_of(13, 16), 13..29);
        assert_eq!(map.block_of(29, 16), 29..30);
    }

    #[test]
    fn the_pages_of_a_range_are_clipped_to_every_region_it_covers() {
        let map =
            AddressMap::new(&[region(0x10_0000, 4, 0), region(0x20_0000, 4, 4)], PAGE, 64 * PAGE).unwrap();

        let pages: Vec<_> = map.pages_of(0x10_2000, 0x20_1000).collect();

        assert_eq!(pages, vec![2..4, 4..5]);
    }

    #[test]
    fn a_run_is_clipped_to_the_region_of_its_first_page() {
        let map =
            AddressMap::new(&[region(0x10_0000, 4, 0), region(0x20_0000, 4, 4)], PAGE, 64 * PAGE).unwrap();

        assert_eq!(map.clip(2..7), 2..4);
        assert_eq!(map.clip(4..7), 4..7);
    }

    #[test]
    fn unacceptable_regions_are_refused_by_name() {
        assert!(refused(&[]).contains("no region"));
        assert!(refused(&[region(0x10_0000, 0, 0)]).contains("no bytes"));
        assert!(refused(&[Region { address: 0x10_0800, len: PAGE, source_offset: 0 }]).contains("address"));
        assert!(refused(&[Region { address: 0x10_0000, len: 100, source_offset: 0 }]).contains("size"));
        assert!(refused(&[Region { address: 0x10_0000, len: PAGE, source_offset: 7 }]).contains("offset"));
        assert!(refused(&[region(u64::MAX - PAGE + 1, 1, 0)]).contains("beyond every user address"));
        assert!(refused(&[region(0x10_0000, 1, 64)]).contains("beyond the memory image"));
        assert!(
            refused(&[region(0x10_0000, 1, 0), region(0x20_0000, 4, 1), region(0x20_3000, 4, 5)])
                .starts_with("region 2")
        );
        assert!(refused(&[region(0x10_0000, 40, 0), region(0x80_0000, 40, 0)]).contains("together"));
    }
}
