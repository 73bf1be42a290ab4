//! ZEROPAGE works exactly where REGISTER says so.

use nix::errno::Errno;
use uffd::{Features, Ioctls, Modes, Operation, UffdError};

use crate::memory::{Area, Memory, uffd};
use crate::support::{elsewhere, fault, finish};

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let area = Area::usual(memory);
    let ioctls = area.register(uffd, Modes::MISSING);
    assert_eq!(ioctls.contains(Ioctls::ZEROPAGE), !memory.is_huge());
    let page = area.page() as u64;

    if memory.is_huge() {
        let refused = UffdError::System { operation: Operation::Zeropage, errno: Errno::EINVAL };
        assert_eq!(uffd.zero(area.start(), page, true), Err(refused));
        return;
    }
    let waiting = elsewhere(move || area.span().is_zero(0));
    assert_eq!(fault(uffd).address, area.start());
    assert_eq!(uffd.zero(area.start(), page, true), Ok(()));
    assert!(finish(&waiting), "who waited reads zeros");
    assert_eq!(uffd.zero(area.start(), page, true), Err(UffdError::PageExist));
    if memory == Memory::Shmem {
        // Not mapped there yet, but in the page cache.
        let alias = area.alias();
        alias.register(uffd, Modes::MISSING);
        assert_eq!(uffd.zero(alias.start(), page, true), Err(UffdError::PageExist));
    }
    // One page and no more: a second call for all says that it stopped at once, and one behind it that it did all.
    assert_eq!(uffd.zero(area.start(), area.len(), true), Err(UffdError::PageExist));
    assert_eq!(uffd.zero(area.at(1), area.len() - page, true), Ok(()));
    assert!((0..area.count).all(|page| area.span().is_zero(page)));
}

cases!(case; all);
