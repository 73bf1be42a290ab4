//! mremap(2) of registered huge pages works: contents move along, and without a REMAP event the registration does not.

use uffd::{EventBuffer, Features, Modes};

use crate::memory::{Area, Memory, contents, uffd};
use crate::wp_mremap::move_away;

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let area = Area::usual(memory);
    let half = area.count / 2;
    area.register(uffd, Modes::MISSING);
    let bytes = contents(half, area.page());
    // SAFETY: `bytes` lives across the call; no reference to the destination exists.
    unsafe { uffd.copy(area.start(), bytes.as_ptr(), bytes.len(), uffd::CopyOptions::default()) }.unwrap();

    let moved = move_away(&area);

    assert!((0..half).all(|page| moved.holds(page, page)));
    // These were missing: nobody answers, so nobody may be asked.
    assert!((half..moved.count).all(|page| moved.span().is_zero(page)));
    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)).unwrap(), 0);
}

cases!(case; hugetlb = Memory::Hugetlb, hugetlb_private = Memory::HugetlbPrivate);
