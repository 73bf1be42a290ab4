//! POISON: pages with odd numbers are filled, the others poisoned; exactly those give SIGBUS.

use uffd::{CopyOptions, Features, Modes};

use crate::memory::{Area, Memory, contents, copy_page, uffd};
use crate::serving::Server;
use crate::signals::{hits, replace_pages};

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::POISON) else { return };
    let area = Area::usual(memory);
    area.register(uffd, Modes::MISSING);
    replace_pages(area);
    let source = contents(area.count, area.page());
    let server = Server::start(uffd, move |fault| {
        let page = area.index(fault.address);
        if page.is_multiple_of(2) {
            uffd.poison(area.at(page), area.page() as u64, true).unwrap();
        } else {
            let from = page * area.page();
            let bytes = &source[from..from + area.page()];
            assert!(copy_page(uffd, area.at(page), bytes, CopyOptions::default()));
        }
    });

    for page in 0..area.count {
        let poisoned = page.is_multiple_of(2);
        // Other memory takes the place of a poisoned page when the signal comes.
        assert!(if poisoned { area.span().is_zero(page) } else { area.holds(page, page) }, "page {page}");
        assert_eq!(hits(page), u32::from(poisoned), "page {page}");
    }

    assert_eq!(server.stop().missing, area.count);
}

cases!(case; all);
