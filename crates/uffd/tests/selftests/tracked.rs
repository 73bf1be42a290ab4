//! Memory whose writes are tracked without messages: what the tests of PAGEMAP_SCAN look at.

use uffd::pagemap::{Pagemap, Region, ScanOptions, ScanResult};
use uffd::{AnonymousOptions, Features, Mapping, Modes, Pages, Userfaultfd, transparent_huge_page_size};

use crate::memory::{Area, Memory, uffd};
use crate::processes::PAGE;

/// Pages from one to behind another, in the area's own pages.
pub type Found = Vec<(usize, usize)>;

#[derive(Debug)]
pub struct Tracked {
    pub area: Area,
    pub uffd: &'static Userfaultfd,
    pub map: Pagemap,
}

impl Tracked {
    /// Registered, but nothing is protected yet.
    pub fn unprotected(area: Area, more: Features) -> Option<Self> {
        let uffd = uffd(Features::WP_ASYNC | more)?;
        area.register(uffd, Modes::WRITE_PROTECT);
        Some(Self { area, uffd, map: Pagemap::of_self().unwrap() })
    }

    /// All of it is protected.
    pub fn new(area: Area) -> Option<Self> {
        let tracked = Self::unprotected(area, Features::empty())?;
        tracked.protect();
        Some(tracked)
    }

    pub fn protect(&self) {
        self.uffd.write_protect(self.area.start(), self.area.len(), true, true).unwrap();
    }

    pub fn write(&self, pages: impl IntoIterator<Item = usize>) {
        pages.into_iter().for_each(|page| self.area.span().poke(page, 0, 7));
    }

    /// One scan of all of it.
    pub fn scan(&self, options: &ScanOptions) -> ScanResult {
        self.scan_part(0, self.area.count, options)
    }

    /// One scan of some of its pages.
    pub fn scan_part(&self, from: usize, to: usize, options: &ScanOptions) -> ScanResult {
        let end = self.area.start() + (to * self.area.page()) as u64;
        self.map.scan(self.area.at(from), end, options).unwrap()
    }

    /// What was written, left as it is.
    pub fn written(&self) -> Found {
        self.found(&self.scan(&ScanOptions::written()).regions)
    }

    /// What was written, protected again.
    pub fn take(&self) -> Found {
        self.found(&self.scan(&ScanOptions::take_written()).regions)
    }

    pub fn found(&self, regions: &[Region]) -> Found {
        let page = |address: u64| {
            let offset = (address - self.area.start()) as usize;
            assert!(offset.is_multiple_of(self.area.page()), "a page in parts");
            offset / self.area.page()
        };
        regions.iter().map(|region| (page(region.start), page(region.end))).collect()
    }

    /// The page that a scan stopped in front of.
    pub fn stopped(&self, result: &ScanResult) -> usize {
        (result.walk_end - self.area.start()) as usize / self.area.page()
    }
}

/// Anonymous memory that may be transparent huge pages, and how many ordinary pages one has.
pub fn transparent(count: usize) -> Option<(Area, usize)> {
    let Some(size) = transparent_huge_page_size() else {
        println!("skipped: the kernel has no transparent huge pages");
        return None;
    };
    let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
    let area = Area::of(Memory::Anon, Mapping::anonymous(count * size, options).unwrap());
    Some((area, size / PAGE))
}
