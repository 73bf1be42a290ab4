//! MOVE of transparent huge pages: in one step, and they stay huge.

use uffd::{Features, Pages};

use crate::memory::uffd;
use crate::move_pages::{area, case, huge, huge_source};

case!(anon, 0, || {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let Some((src, size)) = huge_source() else { return };
    let dst = area(src.mapping.len(), Pages::Transparent);
    case(uffd, dst, src, size);
    assert_eq!(huge(&dst), dst.len(), "they are still huge");
});
