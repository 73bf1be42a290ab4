//! From addresses of the served process to pages of the session and offsets of its source.
//!
//! A session numbers its pages through, region after region in address order, so that one bitmap serves all
//! regions. The regions come from the other process and are checked here, once: a map that exists holds only
//! non-empty, aligned, disjoint ranges below the highest user address, all inside the source.

use std::ops::Range;

use crate::error::PagerError;

/// One past the highest user address of the architectures served (five-level page tables).
const HIGHEST_ADDRESS: u64 = 1 << 56;

/// A stretch of the other process's memory and where its bytes are in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where its first byte is in the source.
    pub source_offset: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    region: Region,
    first_page: usize,
}

impl Entry {
    fn end(&self) -> u64 {
        // Checked in `AddressMap::new`.
        self.region.address + self.region.len
    }
}

/// The regions of a session, ordered by address.
#[derive(Debug, Clone)]
pub struct AddressMap {
    entries: Vec<Entry>,
    page_shift: u32,
    pages: usize,
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
        let page_shift = page_size.trailing_zeros();
        let mut entries: Vec<Entry> = Vec::with_capacity(regions.len());
        let mut pages = 0;
        for index in order {
            let Some(&region) = regions.get(index) else { continue };
            if let Some(before) = entries.last().filter(|before| before.end() > region.address) {
                return Err(PagerError::Region {
                    index,
                    reason: format!(
                        "{:#x}+{:#x} overlaps {:#x}+{:#x}",
                        region.address, region.len, before.region.address, before.region.len
                    ),
                });
            }
            entries.push(Entry { region, first_page: pages });
            pages += (region.len >> page_shift) as usize;
        }
        Ok(Self { entries, page_shift, pages })
    }

    /// No memory at all.
    pub(crate) const fn empty() -> Self {
        Self { entries: Vec::new(), page_shift: 12, pages: 0 }
    }

    /// Pages of all regions together.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// The regions in address order.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.entries.iter().map(|entry| entry.region)
    }

    /// The page that holds `address`; `None` outside every region.
    #[must_use]
    pub fn page_of(&self, address: u64) -> Option<usize> {
        let entry = self.entry_before(address)?;
        (address < entry.end()).then(|| entry.first_page + self.pages_in(address - entry.region.address))
    }

    /// The pages that lie wholly or partly in `start..end`, region by region.
    pub fn pages_of(&self, start: u64, end: u64) -> impl Iterator<Item = Range<usize>> + '_ {
        let page_size = self.page_size();
        self.entries.iter().filter_map(move |entry| {
            let from = start.max(entry.region.address);
            let to = end.min(entry.end());
            (from < to).then(|| {
                let first = self.pages_in(from - entry.region.address);
                let last = self.pages_in((to - entry.region.address).saturating_add(page_size - 1));
                entry.first_page + first..entry.first_page + last
            })
        })
    }

    /// The aligned block of `block` pages (a power of two) that holds `page`, clipped to its region.
    ///
    /// Blocks are aligned in the other process's addresses, so that a region's faults fall into as few of
    /// them as possible whatever its offset in the source.
    #[must_use]
    pub fn block_of(&self, page: usize, block: usize) -> Range<usize> {
        let Some(entry) = self.entry_of(page) else { return page..page };
        let base = self.pages_in(entry.region.address);
        let within = page - entry.first_page;
        let start = (base + within) / block * block;
        let first = entry.first_page + start.saturating_sub(base);
        let last = entry.first_page + (start + block).saturating_sub(base);
        first..last.min(entry.first_page + self.pages_in(entry.region.len))
    }

    /// The part of `pages` that lies in the region of its first page.
    #[must_use]
    pub fn clip(&self, pages: Range<usize>) -> Range<usize> {
        let end = self
            .entry_of(pages.start)
            .map_or(pages.start, |entry| entry.first_page + self.pages_in(entry.region.len));
        pages.start..pages.end.min(end)
    }

    /// Address of `page`.
    #[must_use]
    pub fn address_of(&self, page: usize) -> Option<u64> {
        let entry = self.entry_of(page)?;
        Some(entry.region.address + self.bytes(page - entry.first_page))
    }

    /// Offset of `page` in the source.
    #[must_use]
    pub fn source_offset_of(&self, page: usize) -> Option<u64> {
        let entry = self.entry_of(page)?;
        Some(entry.region.source_offset + self.bytes(page - entry.first_page))
    }

    /// Bytes of `count` pages.
    #[must_use]
    pub fn bytes(&self, count: usize) -> u64 {
        (count as u64) << self.page_shift
    }

    fn pages_in(&self, bytes: u64) -> usize {
        (bytes >> self.page_shift) as usize
    }

    fn entry_before(&self, address: u64) -> Option<&Entry> {
        let after = self.entries.partition_point(|entry| entry.region.address <= address);
        self.entries.get(after.checked_sub(1)?)
    }

    fn entry_of(&self, page: usize) -> Option<&Entry> {
        let after = self.entries.partition_point(|entry| entry.first_page <= page);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        (page < entry.first_page + self.pages_in(entry.region.len)).then_some(entry)
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
