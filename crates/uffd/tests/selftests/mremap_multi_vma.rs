//! mremap(2) of several mappings at once (Linux 6.17) leaves those alone that are registered.

use nix::errno::Errno;
use uffd::{AnonymousOptions, Features, Mapping, Modes, Pages};

use crate::memory::{Area, Memory, uffd};
use crate::processes::PAGE;

const PAGES: usize = 3;

/// Pages with contents, of which the middle one is a mapping of its own.
fn divided() -> Area {
    let area = Area::new(Memory::Anon, PAGES);
    area.fill();
    let middle = area.mapping.as_ptr().wrapping_add(PAGE).cast();
    // SAFETY: a page of an area, to which nothing refers.
    let result = unsafe { libc::mprotect(middle, PAGE, libc::PROT_READ) };
    assert_eq!(result, 0);
    area
}

fn move_to(area: &Area, place: &Area) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (old, len, new) = (area.mapping.as_ptr().cast(), area.mapping.len(), place.mapping.as_ptr());
    // SAFETY: areas live for ever and are touched through raw pointers.
    let moved = unsafe { libc::mremap(old, len, len, flags, new) };
    if moved == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

fn place() -> Area {
    let options = AnonymousOptions { pages: Pages::Small, shared: false };
    Area::of(Memory::Anon, Mapping::anonymous(PAGES * PAGE, options).unwrap())
}

case!(anon, 0, || {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let (free, target) = (divided(), place());
    if let Err(errno) = move_to(&free, &target) {
        println!("skipped: this kernel moves one mapping at a time: {errno}");
        return;
    }
    assert!((0..PAGES).all(|page| target.holds(page, page)), "unregistered, all of them move");

    let (area, target) = (divided(), place());
    // SAFETY: an area is touched through raw pointers only.
    unsafe { uffd.register(area.at(1), PAGE as u64, Modes::MISSING) }.unwrap();

    assert_eq!(move_to(&area, &target), Err(Errno::EFAULT));
    assert!(area.holds(1, 1), "the registered one is where it was");
    // And still registered: elsewhere a COPY would be refused as not registered.
    let bytes = area.bytes(1);
    // SAFETY: `bytes` lives across the call; no reference to the destination exists.
    let again = unsafe { uffd.copy(area.at(1), bytes.as_ptr(), PAGE, uffd::CopyOptions::default()) };
    assert_eq!(again, Err(uffd::UffdError::PageExist));
});
