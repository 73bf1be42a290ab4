//! Minor faults, then MADV_COLLAPSE: what was mapped page by page becomes huge pages with the same contents.

use uffd::pagemap::{Categories, Pagemap, ScanOptions};
use uffd::{Mapping, MemfdOptions, Pages, transparent_huge_page_size};

use crate::memory::{Area, Memory};

fn case(memory: Memory) {
    let Some(size) = transparent_huge_page_size() else {
        println!("skipped: the kernel has no transparent huge pages");
        return;
    };
    let options = MemfdOptions { pages: Pages::Transparent, ..MemfdOptions::default() };
    let area = Area::of(memory, Mapping::with_memfd(2 * size, &options).unwrap());
    crate::minor::case(area, false);
    let before: Vec<Vec<u8>> = (0..area.count).map(|page| area.bytes(page)).collect();

    let collapsed = area.mapping.collapse(0, area.mapping.len()).unwrap();

    assert_eq!((collapsed.done, collapsed.refused), (2 * size, None));
    let huge = ScanOptions { all_of: Categories::HUGE, report: Categories::HUGE, ..ScanOptions::default() };
    let (start, end) = (area.start(), area.start() + area.len());
    let found = Pagemap::of_self().unwrap().scan_to_end(start, end, &huge).unwrap();
    let regions: Vec<_> = found.regions.iter().map(|region| (region.start, region.end)).collect();
    assert_eq!(regions, [(start, end)], "all of it is huge pages");
    assert!((0..area.count).all(|page| area.bytes(page) == before[page]));
}

cases!(case; shmem = Memory::Shmem);
