//! WP_UNPOPULATED: protection of pages that are not there is kept as a marker.

use uffd::pagemap::Pagemap;
use uffd::{FaultKind, Features, Modes};

use crate::memory::{Area, Memory, uffd};
use crate::support::{elsewhere, fault, finish};

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::WP_UNPOPULATED) else { return };
    let area = Area::new(memory, 1);
    let map = Pagemap::of_self().unwrap();
    let protected = || area.entry(&map, 0).is_write_protected();
    let present = || area.entry(&map, 0).is_present();
    let protect = |on| uffd.write_protect(area.start(), area.len(), on, true).unwrap();
    area.register(uffd, Modes::WRITE_PROTECT);

    protect(true);
    assert!(protected() && !present(), "a marker on an empty entry");
    protect(false);
    assert!(!protected(), "unprotecting takes the marker away");

    protect(true);
    area.release();
    assert!(!protected(), "and so does MADV_DONTNEED");
    area.span().poke(0, 0, 1);
    assert!(present() && !protected(), "what is faulted in afterwards is not protected");

    area.release();
    protect(true);
    assert_eq!(area.span().peek(0, 0), 0);
    assert!(present() && protected(), "reading a marked page leaves it protected");
    area.release();
    assert!(!present() && !protected(), "MADV_DONTNEED of a protected page");

    // What the marker is for: the first write is told, although nothing was there.
    protect(true);
    let written = elsewhere(move || area.span().poke(0, 0, 2));
    let told = fault(uffd);
    protect(false);
    finish(&written);
    assert_eq!((told.kind, told.write, told.address), (FaultKind::WriteProtect, true, area.start()));
    assert_eq!(area.span().peek(0, 0), 2);
}

cases!(case; anon = Memory::Anon);
