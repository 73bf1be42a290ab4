//! pagemap_ioctl: arguments, limits, memory that is not there or not tracked, what mprotect and mremap leave, and writers
//! at the same time.

use std::num::NonZeroU64;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;

use uffd::pagemap::{Categories, Pagemap, PagemapError, ScanOptions};
use uffd::{Event, Features, Modes};

use crate::memory::{Area, Memory, uffd};
use crate::processes::PAGE;
use crate::support::{elsewhere, events, finish};
use crate::tracked::{Found, Tracked};
use crate::wp_mremap::move_away;

const NONE: Found = Found::new();

fn tracked(count: usize) -> Option<Tracked> {
    Tracked::new(Area::new(Memory::Anon, count))
}

fn limited(regions: usize, pages: u64) -> ScanOptions {
    ScanOptions { max_regions: regions, max_pages: NonZeroU64::new(pages), ..ScanOptions::written() }
}

case!(arguments, 0, || {
    let Some(tracked) = tracked(4) else { return };
    let (start, end) = (tracked.area.start(), tracked.area.start() + tracked.area.len());
    let unknown = Categories::from_bits_retain(1 << 40);
    let written = ScanOptions::written();
    let refused = [
        ("all_of", start, ScanOptions { all_of: unknown, ..written }),
        ("any_of", start, ScanOptions { any_of: unknown, ..written }),
        ("inverted", start, ScanOptions { inverted: unknown, ..written }),
        ("report", start, ScanOptions { report: unknown, ..written }),
        ("a start inside a page", start + 1, written),
    ];

    for (what, start, options) in refused {
        let error = tracked.map.scan(start, end, &options).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{what}");
    }

    tracked.write([0, 3]);
    let up = tracked.map.scan(start, end - PAGE as u64 + 1, &written).unwrap();
    assert_eq!(tracked.found(&up.regions), [(0, 1), (3, 4)], "an end inside a page is rounded up");
    assert_eq!(up.walk_end, end);
    let nothing = tracked.map.scan(start, start, &written).unwrap();
    assert_eq!((nothing.regions.len(), nothing.walk_end), (0, start));
    // Everything that is not written, and what is neither.
    let clean = ScanOptions { inverted: Categories::WRITTEN, ..written };
    assert_eq!(tracked.found(&tracked.scan(&clean).regions), [(1, 3)]);
    let both = ScanOptions { any_of: Categories::FILE | Categories::GUARD, ..written };
    assert_eq!(tracked.scan(&both).regions, []);
});

case!(limits, 0, || {
    let Some(tracked) = tracked(16) else { return };
    let seen = |options: &ScanOptions| {
        let result = tracked.scan(options);
        (tracked.found(&result.regions), tracked.stopped(&result))
    };
    tracked.write(0..16);
    assert_eq!(seen(&limited(1, 0)), (vec![(0, 16)], 16), "all are one region");
    assert_eq!(seen(&limited(4, 5)), (vec![(0, 5)], 5));
    assert_eq!(seen(&limited(4, 16)), (vec![(0, 16)], 16));
    assert_eq!(seen(&limited(4, 1000)), (vec![(0, 16)], 16));

    // Two of three pages: (0, 2), (3, 5), (6, 8), (9, 11), (12, 14), (15, 16).
    tracked.take();
    tracked.write((0..16).filter(|page| page % 3 != 2));
    assert_eq!(seen(&limited(6, 0)).0.len(), 6);
    let (two, stopped) = seen(&limited(2, 0));
    assert_eq!(two, [(0, 2), (3, 5)]);
    assert!((5..=6).contains(&stopped), "in front of the third: {stopped}");
    assert_eq!(seen(&limited(6, 3)), (vec![(0, 2), (3, 4)], 4));
    let (four, stopped) = seen(&limited(6, 4));
    assert_eq!(four, [(0, 2), (3, 5)]);
    assert!((5..=6).contains(&stopped), "{stopped}");

    // What a limit left out is not protected, and comes next.
    let taken = tracked.scan(&ScanOptions { max_pages: NonZeroU64::new(3), ..ScanOptions::take_written() });
    assert_eq!(tracked.found(&taken.regions), [(0, 2), (3, 4)]);
    let one = tracked.scan(&ScanOptions { max_regions: 1, ..ScanOptions::take_written() });
    assert_eq!(tracked.found(&one.regions), [(4, 5)]);
    assert_eq!(tracked.take(), [(6, 8), (9, 11), (12, 14), (15, 16)]);
    assert_eq!(tracked.take(), NONE);
});

case!(unpopulated, 0, || {
    let area = Area::new(Memory::Anon, 8);
    let Some(tracked) = Tracked::unprotected(area, Features::empty()) else { return };

    assert_eq!(tracked.written(), [(0, 8)], "never protected is written");
    let part = tracked.scan_part(2, 5, &ScanOptions::take_written());
    assert_eq!(tracked.found(&part.regions), [(2, 5)]);
    assert_eq!(tracked.take(), [(0, 2), (5, 8)]);
    assert_eq!(tracked.take(), NONE, "holes were protected like pages");
    assert!(area.span().is_zero(1));
    assert_eq!(tracked.take(), NONE, "reading is not writing");
    area.span().poke(1, 0, 1);
    tracked.take();
    area.mapping.discard(PAGE, PAGE).unwrap();
    assert_eq!(tracked.take(), [(1, 2)], "what was taken away is written");
});

case!(unmapped, 0, || {
    let Some(tracked) = tracked(8) else { return };
    tracked.write(0..8);
    let hole = tracked.area.mapping.as_ptr().wrapping_add(2 * PAGE).cast();
    // SAFETY: pages of an area that are not touched any more.
    let result = unsafe { libc::munmap(hole, 3 * PAGE) };
    assert_eq!(result, 0);

    let inside = tracked.scan_part(2, 5, &ScanOptions::take_written());

    assert_eq!((inside.regions.len(), tracked.stopped(&inside)), (0, 5));
    assert_eq!(tracked.take(), [(0, 2), (5, 8)]);
    assert_eq!(tracked.take(), NONE);
});

// Messages or none, registered or not: what nobody tracks can be looked at, but not taken.
case!(untracked, 0, || {
    let (by_messages, registered_nowhere) = (Area::new(Memory::Anon, 2), Area::new(Memory::Anon, 2));
    let Some(sync) = uffd(Features::empty()) else { return };
    by_messages.register(sync, Modes::WRITE_PROTECT);
    let map = Pagemap::of_self().unwrap();
    for area in [by_messages, registered_nowhere] {
        area.fill();
        let (start, end) = (area.start(), area.start() + area.len());
        let silent = ScanOptions { require_tracking: false, ..ScanOptions::take_written() };
        let scan = |options: &ScanOptions| map.scan(start, end, options).map(|found| found.regions.len());

        assert_eq!(scan(&ScanOptions::take_written()), Err(PagemapError::NotTracked { found: Vec::new() }));
        assert_eq!(scan(&silent), Ok(0));
        assert_eq!(scan(&ScanOptions::written()), Ok(1), "all of it is written");
        assert!((0..area.count).all(|page| !area.entry(&map, page).is_write_protected()));
    }
});

case!(mprotect, 0, || {
    let Some(tracked) = tracked(4) else { return };
    tracked.write([0, 1]);
    tracked.take();
    tracked.write([1]);
    let protect = |protection: i32| {
        let area = &tracked.area;
        // SAFETY: an area, which is not touched while it cannot be.
        let result = unsafe { libc::mprotect(area.mapping.as_ptr().cast(), area.mapping.len(), protection) };
        assert_eq!(result, 0);
    };

    protect(libc::PROT_NONE);
    assert_eq!(tracked.written(), [(1, 2)]);
    protect(libc::PROT_READ | libc::PROT_WRITE);

    assert_eq!(tracked.take(), [(1, 2)], "what it was before");
    tracked.write([0, 3]);
    assert_eq!(tracked.take(), [(0, 1), (3, 4)]);
});

case!(mremap, 0, || {
    let area = Area::new(Memory::Anon, 4);
    let Some(tracked) = Tracked::unprotected(area, Features::EVENT_REMAP) else { return };
    area.fill();
    tracked.protect();
    tracked.write([1]);

    let moved = elsewhere(move || move_away(&area));
    let told = events(tracked.uffd, 1).remove(0);
    let there = Tracked { area: finish(&moved), ..tracked };

    assert!(matches!(told, Event::Remap { to, .. } if to == there.area.start()));
    assert_eq!(there.take(), [(1, 2)], "what it was before");
    there.write([0, 3]);
    assert_eq!(there.take(), [(0, 1), (3, 4)]);
});

// Whoever copies what was taken, while others write on, has everything in the end.
case!(transact, 0, || {
    const WRITERS: usize = 3;
    const ROUNDS: u64 = 200;
    let Some(tracked) = tracked(WRITERS * 16) else { return };
    let span = tracked.area.span();
    let mut copies = vec![0; span.count()];
    let copy = |copies: &mut Vec<u64>| {
        for (from, to) in tracked.take() {
            (from..to).for_each(|page| copies[page] = span.peek(page, 1));
        }
    };
    let (together, writing) = (Barrier::new(WRITERS + 1), AtomicUsize::new(WRITERS));
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (together, writing) = (&together, &writing);
            scope.spawn(move || {
                together.wait();
                for round in 1..=ROUNDS {
                    // Pages of all writers are neighbours: they share regions of what is found.
                    (writer..span.count()).step_by(WRITERS).for_each(|page| span.poke(page, 1, round));
                    thread::yield_now();
                }
                writing.fetch_sub(1, SeqCst);
            });
        }
        together.wait();
        while writing.load(SeqCst) > 0 {
            copy(&mut copies);
        }
    });
    copy(&mut copies);

    assert_eq!(copies, vec![ROUNDS; span.count()]);
    assert_eq!(tracked.take(), NONE);
});
