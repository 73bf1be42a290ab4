//! Regions of any numbers: what is accepted is disjoint, aligned, inside the source, and its arithmetic is of one piece.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pager::{AddressMap, Region};

fuzz_target!(|input: (bool, u64, Vec<(u64, u64, u64)>)| {
    let (huge, source_len, regions) = input;
    let page_size: u64 = if huge { 2 << 20 } else { 4096 };
    // Most numbers whole pages: others are refused at once.
    let whole = |number: u64| if number & 15 == 0 { number } else { number / page_size % (1 << 20) * page_size };
    let regions: Vec<Region> = regions
        .into_iter()
        .take(64)
        .map(|(address, len, source_offset)| Region {
            address: whole(address),
            len: whole(len),
            source_offset: whole(source_offset),
        })
        .collect();
    let Ok(map) = AddressMap::new(&regions, page_size, source_len) else { return };

    let sorted: Vec<Region> = map.regions().collect();
    assert_eq!(sorted.len(), regions.len());
    assert!(sorted.windows(2).all(|pair| pair[0].address + pair[0].len <= pair[1].address));
    for region in &sorted {
        let last = region.address + (region.len - 1);
        assert!(region.len > 0 && last < 1 << 56);
        assert!(region.source_offset + region.len <= source_len);
        for number in [region.address, region.len, region.source_offset] {
            assert_eq!(number % page_size, 0);
        }
        for address in [region.address, last, region.address + region.len / 2] {
            let page = map.page_of(address).expect("a page of the region");
            let start = map.address_of(page).expect("its address");
            assert_eq!(start, address / page_size * page_size);
            assert_eq!(map.source_offset_of(page), Some(region.source_offset + (start - region.address)));
            for block in [1, 16, 64] {
                let block = map.block_of(page, block);
                assert!(block.contains(&page) && block.end <= map.pages());
                assert_eq!(map.clip(block.clone()), block);
            }
        }
    }
    let all: usize = map.pages_of(0, u64::MAX).map(|pages| pages.len()).sum();
    assert_eq!(all, map.pages());
});
