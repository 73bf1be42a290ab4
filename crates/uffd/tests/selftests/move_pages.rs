//! MOVE: pages arrive from a twin of the area, page by page, huge page by huge page, and with huge pages split on the way.

use nix::errno::Errno;
use uffd::pagemap::{Categories, Pagemap, ScanOptions};
use uffd::{
    AnonymousOptions, Features, Mapping, Modes, MoveOptions, Pages, Residency, UffdError, Userfaultfd,
    transparent_huge_page_size,
};

use crate::memory::{Area, Memory, uffd};
use crate::processes::PAGE;
use crate::serving::Server;

pub fn area(len: usize, pages: Pages) -> Area {
    let options = AnonymousOptions { pages, shared: false };
    Area::of(Memory::Anon, Mapping::anonymous(len, options).unwrap())
}

/// Bytes of the area that are parts of transparent huge pages.
pub fn huge(area: &Area) -> u64 {
    let options =
        ScanOptions { all_of: Categories::HUGE, report: Categories::HUGE, ..ScanOptions::default() };
    let map = Pagemap::of_self().unwrap();
    let found = map.scan_to_end(area.start(), area.start() + area.len(), &options).unwrap();
    found.regions.iter().map(|region| region.end - region.start).sum()
}

pub fn move_in(uffd: &Userfaultfd, dst: u64, src: u64, len: usize) {
    loop {
        // SAFETY: both sides are areas, to which no reference exists.
        match unsafe { uffd.move_pages(dst, src, len as u64, MoveOptions::default()) } {
            Ok(()) => return,
            // Also the answer to locks that somebody else has.
            Err(UffdError::Changing) => std::thread::yield_now(),
            Err(error) => panic!("MOVE to {dst:#x}: {error}"),
        }
    }
}

/// Touches the destination in order; each fault is answered by moving the chunk around it. Exactly one fault for each.
pub fn case(uffd: &'static Userfaultfd, dst: Area, src: Area, chunk: usize) {
    src.fill();
    dst.register(uffd, Modes::MISSING);
    let server = Server::start(uffd, move |fault| {
        let chunk_start = (fault.address - dst.start()) / chunk as u64 * chunk as u64;
        move_in(uffd, dst.start() + chunk_start, src.start() + chunk_start, chunk);
    });

    for page in 0..dst.count {
        assert!(dst.holds(page, page), "page {page}");
    }

    let faults = server.stop();
    assert_eq!(faults.missing, dst.mapping.len() / chunk);
    assert_eq!((faults.minor, faults.write_protect), (0, 0));
    let left = src.mapping.residency(0, src.mapping.len()).unwrap();
    assert!(left.iter().all(|state| *state == Residency::Absent), "the source is empty");
    assert!((0..src.count).all(|page| src.span().is_zero(page)));
}

pub fn huge_source() -> Option<(Area, usize)> {
    let Some(size) = transparent_huge_page_size() else {
        println!("skipped: the kernel has no transparent huge pages");
        return None;
    };
    let src = area(2 * size, Pages::Transparent);
    src.fill();
    if huge(&src) != src.len() {
        println!("skipped: no transparent huge pages could be had");
        return None;
    }
    Some((src, size))
}

case!(anon, 0, || {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    case(uffd, area(64 * PAGE, Pages::Small), area(64 * PAGE, Pages::Small), PAGE);
});

// A forked child has the source's pages as well, so they cannot be taken away from it: the source of the kernel's tests
// is not inherited.
case!(source_shared_with_a_child, 0, || {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let (dst, src) = (area(2 * PAGE, Pages::Small), area(2 * PAGE, Pages::Small));
    src.fill();
    dst.register(uffd, Modes::MISSING);
    let child = crate::forking::idle_child(None).0;
    let (to, from) = (dst.start(), src.start());
    // SAFETY: both sides are areas, to which no reference exists.
    let refused = unsafe { uffd.move_pages(to, from, PAGE as u64, MoveOptions::default()) };
    drop(child);
    src.span().poke(0, 0, src.span().peek(0, 0));

    assert_eq!(refused.unwrap_err().errno(), Some(Errno::EBUSY as i32));
    move_in(uffd, to, from, PAGE);
    assert!(dst.holds(0, 0));
});
