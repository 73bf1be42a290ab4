//! COPY into memory that may only be read fills it and leaves it so: writing is SIGSEGV.

use uffd::{CopyOptions, Features, Modes};

use crate::memory::{Area, Memory, contents, copy_page, uffd};
use crate::signals::{hits, replace_pages};

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let area = Area::usual(memory);
    area.register(uffd, Modes::MISSING);
    // SAFETY: an area, to which nothing refers.
    let result = unsafe { libc::mprotect(area.mapping.as_ptr().cast(), area.mapping.len(), libc::PROT_READ) };
    assert_eq!(result, 0);
    let bytes = contents(area.count, area.page());
    for (page, bytes) in bytes.chunks(area.page()).enumerate() {
        assert!(copy_page(uffd, area.at(page), bytes, CopyOptions::default()));
    }
    replace_pages(area);

    for page in 0..area.count {
        assert!(area.holds(page, page));
        assert_eq!(hits(page), 0, "reading page {page}");
        area.span().poke(page, 0, 1);
        assert_eq!(hits(page), 1, "writing to page {page}");
    }
}

cases!(case; all);
