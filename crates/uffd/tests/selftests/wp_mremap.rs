//! uffd-wp-mremap: protected pages of every size that move without a REMAP event are not protected any more; with it they
//! stay so.

use uffd::pagemap::Pagemap;
use uffd::{AnonymousOptions, EventBuffer, Features, Mapping, Modes, Pages};

use crate::memory::{Area, Memory, uffd};
use crate::support::{elsewhere, events, finish};

/// Protects all of the area, which is populated, moves it, and looks at every page of the new place.
pub fn case(area: Area, features: Features) {
    let Some(uffd) = uffd(features) else { return };
    let map = Pagemap::of_self().unwrap();
    let protected =
        |area: &Area| (0..area.count).filter(|&page| area.entry(&map, page).is_write_protected()).count();
    area.register(uffd, Modes::WRITE_PROTECT);
    uffd.write_protect(area.start(), area.len(), true, true).unwrap();
    assert_eq!(protected(&area), area.count);

    let moved = elsewhere(move || move_away(&area));
    let told = features.contains(Features::EVENT_REMAP);
    if told {
        drop(events(uffd, 1));
    }
    let moved = finish(&moved);

    assert_eq!(protected(&moved), if told { moved.count } else { 0 });
    // Present or not: protecting a part of a huge page of shmem leaves markers, and so does moving them.
    assert!((0..moved.count).all(|page| moved.holds(page, page)));
    if !told {
        // Nobody would answer, if it were still a fault.
        (0..moved.count).for_each(|page| moved.span().poke(page, 0, 0));
        assert_eq!(uffd.read_events(&mut EventBuffer::new(1)).unwrap(), 0);
    }
}

/// mremap(2) to other addresses, aligned for huge pages.
pub fn move_away(area: &Area) -> Area {
    let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
    let place = Area::of(area.memory, Mapping::anonymous(area.mapping.len(), options).unwrap());
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (old, len, new) = (area.mapping.as_ptr().cast(), area.mapping.len(), place.mapping.as_ptr());
    // SAFETY: areas live for ever and are touched through raw pointers; the old one is not touched any more, and the new
    // place holds nothing yet.
    let moved = unsafe { libc::mremap(old, len, len, flags, new) };
    assert_eq!(moved, new.cast(), "mremap: {}", std::io::Error::last_os_error());
    place
}

pub fn populated(area: Area) -> Area {
    area.fill();
    area
}

cases!(|memory| case(populated(Area::usual(memory)), Features::empty()); all);
