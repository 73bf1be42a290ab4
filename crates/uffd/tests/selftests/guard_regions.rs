//! Guards on registered memory: touching one is SIGSEGV as everywhere, and no message.

use uffd::{CopyOptions, EventBuffer, FaultKind, Features, Modes};

use crate::memory::{Area, Memory, contents, copy_page, uffd};
use crate::processes::PAGE;
use crate::signals::{hits, replace_pages};
use crate::support::{elsewhere, fault, finish};

const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

fn advise(area: &Area, page: usize, count: usize, advice: i32) -> bool {
    let start = area.mapping.as_ptr().wrapping_add(page * PAGE).cast();
    // SAFETY: pages of an area, to which nothing refers.
    unsafe { libc::madvise(start, count * PAGE, advice) == 0 }
}

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let area = Area::new(memory, 10);
    area.register(uffd, Modes::MISSING);
    if !advise(&area, 0, area.count, MADV_GUARD_INSTALL) {
        println!("skipped: no guards on {memory:?}: {}", std::io::Error::last_os_error());
        return;
    }
    // Without its guard the last page is missing like any other.
    let last = area.count - 1;
    assert!(advise(&area, last, 1, MADV_GUARD_REMOVE));
    let touched = elsewhere(move || area.holds(last, last));
    let told = fault(uffd);
    let bytes = contents(area.count, area.page());
    assert!(copy_page(uffd, area.at(last), &bytes[last * PAGE..], CopyOptions::default()));
    assert!(finish(&touched));
    assert_eq!((told.kind, told.address), (FaultKind::Missing, area.at(last)));

    replace_pages(area);
    for page in 0..last {
        if page.is_multiple_of(2) {
            assert_eq!(area.span().peek(page, 0), 0);
        } else {
            area.span().poke(page, 0, 1);
        }
        assert_eq!(hits(page), 1, "a signal for page {page}");
    }
    assert_eq!(hits(last), 0);
    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)).unwrap(), 0);
    assert_eq!(uffd.waiting().unwrap().total, 0);
}

cases!(case; anon = Memory::Anon, shmem = Memory::Shmem, shmem_private = Memory::ShmemPrivate);
