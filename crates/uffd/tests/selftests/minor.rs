//! Minor faults: pages that the file has, which the server changes through the alias before they are mapped.

use uffd::pagemap::Pagemap;
use uffd::{ContinueOptions, FaultKind, Features, Modes, UffdError, Userfaultfd};

use crate::memory::{Area, Memory, contents, uffd};
use crate::serving::{Faults, Server};

/// The server's answer: flips every bit of the page and maps it.
fn flip_and_continue(uffd: &Userfaultfd, area: Area, alias: Area, page: usize, write_protect: bool) {
    let flipped: Vec<u8> = alias.bytes(page).iter().map(|byte| !byte).collect();
    alias.mapping.write(page * area.page(), &flipped).unwrap();
    let options = ContinueOptions { write_protect, ..ContinueOptions::default() };
    let proceed = || uffd.continue_pages(area.at(page), area.page() as u64, options);
    assert_eq!(proceed(), Ok(()));
    assert_eq!(proceed(), Err(UffdError::PageExist), "a second time");
}

/// One minor fault for each page, and no other; afterwards everything is the opposite of what was written.
pub fn case(area: Area, write_protect: bool) {
    let Some(uffd) = uffd(Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS) else { return };
    let alias = area.alias();
    alias.fill();
    let wp = if write_protect { Modes::WRITE_PROTECT } else { Modes::empty() };
    area.register(uffd, Modes::MINOR | wp);
    let server = Server::start(uffd, move |fault| {
        let page = area.index(fault.address);
        match fault.kind {
            FaultKind::Minor => flip_and_continue(uffd, area, alias, page, write_protect),
            FaultKind::WriteProtect => {
                uffd.write_protect(area.at(page), area.page() as u64, false, true).unwrap()
            }
            FaultKind::Missing => panic!("missing, but the file has it"),
        }
    });
    let flipped: Vec<u8> = contents(area.count, area.page()).iter().map(|byte| !byte).collect();
    let map = Pagemap::of_self().unwrap();

    for (page, expected) in flipped.chunks(area.page()).enumerate() {
        assert!(area.bytes(page) == expected, "page {page}");
        assert_eq!(area.entry(&map, page).is_write_protected(), write_protect);
    }
    let after_reading = if write_protect { area.count } else { 0 };
    for page in 0..area.count {
        area.span().poke(page, 0, 0);
    }

    let expected = Faults { missing: 0, minor: area.count, write_protect: after_reading };
    assert_eq!(server.stop(), expected);
    assert!((0..area.count).all(|page| alias.span().peek(page, 0) == 0), "the file got the writes");
}

cases!(|memory| case(Area::usual(memory), false); shmem = Memory::Shmem, hugetlb = Memory::Hugetlb);
