//! Write protection and fork: without the FORK event a child has none, with it the child has its parent's; in the parent it
//! stays, whatever becomes of the page.

use std::os::fd::AsFd;

use uffd::pagemap::Pagemap;
use uffd::{Features, Modes, Userfaultfd};

use crate::forking::{Child, idle_child};
use crate::memory::{Area, Memory, uffd};
use crate::processes::PAGE;

/// Memory with its first page written and the uffd it is registered with.
pub struct World {
    pub area: Area,
    pub map: Pagemap,
    uffd: &'static Userfaultfd,
    with_event: bool,
}

impl World {
    pub fn new(memory: Memory, with_event: bool) -> Option<Self> {
        let features = if with_event { Features::EVENT_FORK } else { Features::empty() };
        let uffd = uffd(features)?;
        let area = Area::new(memory, 1);
        area.register(uffd, Modes::WRITE_PROTECT);
        area.fill();
        Some(Self { area, map: Pagemap::of_self().unwrap(), uffd, with_event })
    }

    pub fn protect(&self, on: bool) {
        self.uffd.write_protect(self.area.start(), self.area.len(), on, true).unwrap();
    }

    pub fn is_protected(&self) -> bool {
        self.area.entry(&self.map, 0).is_write_protected()
    }

    /// Forks and looks at the child's page; the child does nothing.
    pub fn fork(&self, when: &str) -> (Child, Option<Userfaultfd>) {
        let (child, of_child) = idle_child(self.with_event.then_some(self.uffd));
        let in_child = self.area.entry(&child.pagemap(), 0).is_write_protected();
        let expected = self.with_event && self.is_protected();
        assert_eq!(in_child, expected, "in the child: {when}");
        if let Some(of_child) = &of_child {
            // The child's protection is the child's: taking it away does not touch the parent's.
            let parent = self.is_protected();
            of_child.write_protect(self.area.start(), self.area.len(), false, true).unwrap();
            assert!(!self.area.entry(&child.pagemap(), 0).is_write_protected());
            assert_eq!(self.is_protected(), parent);
            of_child.write_protect(self.area.start(), self.area.len(), in_child, true).unwrap();
            assert_eq!(self.area.entry(&child.pagemap(), 0).is_write_protected(), in_child);
        }
        // Closing the child's uffd would end its protection.
        (child, of_child)
    }
}

pub fn case(memory: Memory, with_event: bool) {
    let Some(world) = World::new(memory, with_event) else { return };
    assert!(!world.is_protected());
    world.protect(true);
    assert!(world.is_protected());
    world.fork("present");

    // Where there is swap, the page goes there; where not, it stays. Pages of the pool are never swapped.
    if !memory.is_huge() {
        advise(&world.area, libc::MADV_PAGEOUT);
        assert!(world.is_protected(), "paged out");
        world.fork("paged out");
    }
    // Zapped: memory that has a file keeps a marker, anonymous memory has nothing to come back to.
    if memory != Memory::Anon {
        advise(&world.area, libc::MADV_DONTNEED);
        assert!(!world.area.entry(&world.map, 0).is_present());
        assert!(world.is_protected(), "zapped");
        world.fork("zapped");
    }

    world.protect(false);
    assert!(!world.is_protected());
    world.fork("unprotected");
    world.area.span().poke(0, 0, 2);
    assert!(!world.is_protected(), "faulted in again");
    world.fork("faulted in again");
}

fn advise(area: &Area, advice: i32) {
    // SAFETY: an area, to which nothing refers.
    let result = unsafe { libc::madvise(area.mapping.as_ptr().cast(), area.mapping.len(), advice) };
    assert_eq!(result, 0, "madvise {advice}: {}", std::io::Error::last_os_error());
}

/// The frame that the page at an address is in; only root is told.
pub fn frame(map: &Pagemap, address: u64) -> u64 {
    let mut entry = [0; 8];
    let at = address as i64 / PAGE as i64 * entry.len() as i64;
    assert_eq!(nix::sys::uio::pread(map.as_fd(), &mut entry, at).unwrap(), entry.len());
    u64::from_ne_bytes(entry) & ((1 << 55) - 1)
}

cases!(|memory| case(memory, false); all);
