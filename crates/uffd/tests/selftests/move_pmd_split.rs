//! MOVE of parts of transparent huge pages: they are split on the way.

use uffd::{Features, Modes, Pages};

use crate::memory::uffd;
use crate::move_pages::{area, case, huge, huge_source, move_in};
use crate::processes::PAGE;

case!(anon, 0, || {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let Some((src, _)) = huge_source() else { return };
    let dst = area(src.mapping.len(), Pages::Small);
    case(uffd, dst, src, PAGE);
    assert_eq!(huge(&dst), 0);
});

// A huge page that cannot lie as one at the destination is split too, and arrives whole.
case!(unaligned_destination, 0, || {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let Some((src, size)) = huge_source() else { return };
    let dst = area(src.mapping.len() + size, Pages::Transparent);
    dst.register(uffd, Modes::MISSING);

    move_in(uffd, dst.at(1), src.start(), size);

    assert!((0..size / PAGE).all(|page| dst.holds(page + 1, page)));
    assert_eq!(huge(&dst), 0);
    assert_eq!(huge(&src), size as u64, "the second one was not touched");
});
