//! The memory this process pretends to be a guest's: where each region lies, and which image offset it holds.
//!
//! One reservation without access rights is made first, and the regions are placed inside it with a page
//! between, before and after them. So nothing of this process ever borders on a region, and a pager that
//! runs over an edge hits a hole, not a neighbour.

use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::chunk::{Chunk, Discard};
use crate::failure::Failure;
use crate::hugepages;

/// The kernel's smallest page on the machines this runs on; checked at start.
pub(crate) const BASE_PAGE: usize = 4096;

/// What one `--region` asks for. All in bytes; sizes and offsets are multiples of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// Length of the region.
    pub(crate) size: usize,
    /// Where its first byte lies in the image.
    pub(crate) offset: u64,
}

/// A mapped region.
#[derive(Clone, Copy)]
pub(crate) struct Region {
    /// Address of its first byte.
    pub(crate) base: usize,
    /// Bytes.
    pub(crate) size: usize,
    /// Image offset of its first byte.
    pub(crate) offset: u64,
}

/// A page and what lies there: see [`Memory::page`].
#[derive(Clone, Copy)]
pub(crate) struct Page {
    /// The page's bytes.
    pub(crate) memory: Chunk,
    /// Image offset of its first byte.
    pub(crate) offset: u64,
}

/// All regions. Their pages are numbered from 0 in image order, without the holes between regions.
///
/// The mappings live until the process ends (there is no `Drop`): every [`Chunk`] relies on it.
pub(crate) struct Memory {
    given: Vec<Region>,
    /// In image order, each with the number of its first page.
    image: Vec<(usize, Region)>,
    page_size: usize,
    pages: usize,
    memfd: Option<OwnedFd>,
}

impl Memory {
    /// Maps the regions: private, anonymous, without a swap reservation; huge pages for 2 MiB. With `memfd`: shared, one
    /// behind the other in one memfd, in the order of `specs`. Addresses ascend in that order, or descend with `reverse`.
    ///
    /// # Errors
    /// mmap(2)'s, an empty pool of huge pages, or a kernel with another page size.
    pub(crate) fn map(
        specs: &[RegionSpec],
        page_size: usize,
        reverse: bool,
        memfd: bool,
    ) -> Result<Self, Failure> {
        check_base_page()?;
        if page_size > BASE_PAGE {
            hugepages::check_pool()?;
        }
        let mut order: Vec<usize> = (0..specs.len()).collect();
        if reverse {
            order.reverse();
        }
        let memfd = memfd.then(|| create_memfd(specs)).transpose()?;
        let mut cursor = reserve(specs, page_size)?;
        let mut placed = Vec::with_capacity(specs.len());
        for index in order {
            let Some(spec) = specs.get(index) else { continue };
            cursor += page_size;
            let before: usize = specs.iter().take(index).map(|spec| spec.size).sum();
            map_region(cursor, spec.size, page_size, memfd.as_ref().map(|memfd| (memfd, before)))?;
            placed.push((index, Region { base: cursor, size: spec.size, offset: spec.offset }));
            cursor += spec.size;
        }
        placed.sort_by_key(|(index, _)| *index);
        let given: Vec<Region> = placed.into_iter().map(|(_, region)| region).collect();

        let mut by_offset = given.clone();
        by_offset.sort_by_key(|region| region.offset);
        let mut pages = 0;
        let mut image = Vec::with_capacity(by_offset.len());
        for region in by_offset {
            image.push((pages, region));
            pages += region.size / page_size;
        }
        Ok(Self { given, image, page_size, pages, memfd })
    }

    /// The memfd that holds the regions, if one does.
    pub(crate) fn memfd(&self) -> Option<&OwnedFd> {
        self.memfd.as_ref()
    }

    /// How pages of it are given back.
    pub(crate) fn discard(&self) -> Discard {
        if self.memfd.is_some() { Discard::Remove } else { Discard::DontNeed }
    }

    /// The regions in the order of the command line, which is the order of the handshake.
    pub(crate) fn regions(&self) -> &[Region] {
        &self.given
    }

    /// Bytes of a page of the regions.
    pub(crate) fn page_size(&self) -> usize {
        self.page_size
    }

    /// Number of pages of all regions.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The page with this number, counted in image order.
    pub(crate) fn page(&self, number: usize) -> Option<Page> {
        let behind = self.image.partition_point(|(first, _)| *first <= number);
        let (first, region) = self.image.get(behind.checked_sub(1)?)?;
        let within = (number - first) * self.page_size;
        if within >= region.size {
            return None;
        }
        // SAFETY: `within` is a multiple of the page size below the region's size, itself such a multiple:
        // the page lies inside the region, which `map` mapped for good.
        let memory = unsafe { Chunk::new(region.base + within, self.page_size) };
        Some(Page { memory, offset: region.offset + within as u64 })
    }

    /// Every page in image order, with its number.
    pub(crate) fn numbered_pages(&self) -> impl Iterator<Item = (usize, Page)> + '_ {
        (0..self.pages).filter_map(|number| Some((number, self.page(number)?)))
    }

    /// The numbers of the pages of the region that holds page `number`.
    pub(crate) fn neighbours(&self, number: usize) -> Range<usize> {
        let behind = self.image.partition_point(|(first, _)| *first <= number);
        match self.image.get(behind.wrapping_sub(1)) {
            Some((first, region)) => *first..*first + region.size / self.page_size,
            None => 0..0,
        }
    }

    /// The memory that holds image bytes `offset..offset + len`, in image order, one chunk a region.
    ///
    /// # Errors
    /// A length of 0, or bytes that no region holds.
    pub(crate) fn chunks(&self, offset: u64, len: usize) -> Result<Vec<Chunk>, Failure> {
        let hole = |at: u64| Failure::new(format!("no region holds image offset {at:#x}"));
        let end = match offset.checked_add(len as u64) {
            Some(end) if len > 0 => end,
            _ => return Err(Failure::new(format!("no range: {len} bytes at image offset {offset:#x}"))),
        };
        let mut chunks = Vec::new();
        let mut at = offset;
        while at < end {
            let behind = self.image.partition_point(|(_, region)| region.offset <= at);
            let (_, region) =
                behind.checked_sub(1).and_then(|last| self.image.get(last)).ok_or_else(|| hole(at))?;
            // Below the region's size, or refused: it fits.
            let within = (at - region.offset) as usize;
            if at - region.offset >= region.size as u64 {
                return Err(hole(at));
            }
            let part = (region.size - within).min((end - at) as usize);
            // SAFETY: `within < region.size` and `part` ends at the region's end at the latest; `map` mapped
            // the region for good.
            chunks.push(unsafe { Chunk::new(region.base + within, part) });
            at += part as u64;
        }
        Ok(chunks)
    }

    /// The numbers of the pages that make up image bytes `offset..offset + len`. Unlike regions of different
    /// offsets, the pages of one such range are numbered without a gap.
    ///
    /// # Errors
    /// As [`Memory::chunks`], also for a range that is not made of whole pages.
    pub(crate) fn page_numbers(&self, offset: u64, len: usize) -> Result<Range<usize>, Failure> {
        let page = self.page_size;
        if !offset.is_multiple_of(page as u64) || !len.is_multiple_of(page) {
            return Err(Failure::new(format!(
                "offset {offset:#x} and length {len} have to be multiples of the page size ({page})"
            )));
        }
        self.chunks(offset, len)?;
        let behind = self.image.partition_point(|(_, region)| region.offset <= offset);
        let (first, region) = behind
            .checked_sub(1)
            .and_then(|last| self.image.get(last))
            .ok_or_else(|| Failure::new(format!("no region holds image offset {offset:#x}")))?;
        let start = first + (offset - region.offset) as usize / page;
        Ok(start..start + len / page)
    }

    /// Resident pages of all regions. Faults nothing in.
    ///
    /// # Errors
    /// What mincore(2) says.
    pub(crate) fn resident_pages(&self) -> Result<u64, Failure> {
        let mut resident = 0;
        for region in &self.given {
            // SAFETY: exactly the region, which `map` mapped for good.
            let whole = unsafe { Chunk::new(region.base, region.size) };
            resident += whole.resident_pages(self.page_size, BASE_PAGE)? as u64;
        }
        Ok(resident)
    }
}

fn check_base_page() -> Result<(), Failure> {
    // SAFETY: sysconf reads a constant of the system and touches no memory of ours.
    let actual = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    if usize::try_from(actual) == Ok(BASE_PAGE) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "sysconf(_SC_PAGESIZE): this kernel's pages have {actual} bytes, needed are {BASE_PAGE}"
    )))
}

/// Reserves addresses for all regions and the gaps around them; the result is a multiple of `page_size`.
fn reserve(specs: &[RegionSpec], page_size: usize) -> Result<usize, Failure> {
    let total = specs
        .iter()
        // One gap each, one more at the end, and room to round the start up.
        .try_fold(2 * page_size, |sum: usize, spec| sum.checked_add(spec.size)?.checked_add(page_size))
        .ok_or_else(|| Failure::new("--region: the sizes add up to more than the address space"))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: without MAP_FIXED the kernel picks free addresses; nothing existing changes.
    let start = unsafe { libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Failure::errno(format!("mmap({total} bytes, PROT_NONE) to reserve addresses")));
    }
    Ok(start.expose_provenance().next_multiple_of(page_size))
}

/// A memfd without a page in it that is as long as all regions together.
fn create_memfd(specs: &[RegionSpec]) -> Result<OwnedFd, Failure> {
    let size: usize = specs.iter().map(|spec| spec.size).sum();
    // SAFETY: the name is a constant that ends with a zero byte.
    let fd = unsafe { libc::memfd_create(c"peer".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Failure::errno("memfd_create"));
    }
    // SAFETY: the kernel has just returned this descriptor to the only caller, and nothing else knows it.
    let memfd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes numbers. `reserve` refuses sizes that do not fit the address space.
    if unsafe { libc::ftruncate(memfd.as_raw_fd(), size as libc::off_t) } != 0 {
        return Err(Failure::errno(format!("ftruncate({size}) of the memfd")));
    }
    Ok(memfd)
}

/// Maps one region over the part of the reservation at `address`: of a memfd from an offset on, or anonymous.
fn map_region(
    address: usize,
    size: usize,
    page_size: usize,
    memfd: Option<(&OwnedFd, usize)>,
) -> Result<(), Failure> {
    let mut flags = libc::MAP_FIXED
        | match memfd {
            Some(_) => libc::MAP_SHARED,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        };
    let (fd, offset) = memfd.map_or((-1, 0), |(memfd, offset)| (memfd.as_raw_fd(), offset as libc::off_t));
    if page_size > BASE_PAGE {
        flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    }
    let wanted = ptr::with_exposed_provenance_mut(address);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: MAP_FIXED replaces `address..address + size`, which `map` placed inside the reservation that
    // `reserve` has just made for it and that nothing else uses.
    let mapped = unsafe { libc::mmap(wanted, size, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(Failure::errno(format!("mmap({size} bytes in pages of {page_size}, flags {flags:#x})")));
    }
    // Chunks find the mapping again by its address alone.
    mapped.expose_provenance();
    Ok(())
}
