//! What the served process does to its mappings, followed: unmapping, moving, growing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;

use nix::errno::Errno;
use pager::{EndReason, Rest, SessionOptions};
use uffd::{Features, Modes};

use support::area::{
    Area, Gated, Made, Serving, all_events, ended, faults_ended, new_uffd, register, serve_area,
};
use support::huge::HugePages;
use support::{Bytes, PAGE, finish, image};

const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

/// One page at a time, so that what was asked for is all that is there.
fn single(options: &mut SessionOptions) {
    options.window = Some(options.page_size);
}

/// `pages` pages being served, and what they are served from.
fn serving(made: Made, pages: usize) -> Option<(Area, Vec<u8>, Serving)> {
    let uffd = new_uffd(all_events())?;
    let area = Area::new(made, pages);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(area.len() / PAGE);
    let served = serve_area(uffd, area, Arc::new(Bytes(bytes.clone())), single);
    Some((area, bytes, served))
}

/// The same from a source that has to be waited for.
fn gated(
    pages: usize,
    adjust: impl FnOnce(&mut SessionOptions),
) -> Option<(Area, Vec<u8>, Arc<Gated>, Serving)> {
    let uffd = new_uffd(all_events())?;
    let area = Area::new(Made::Private, pages);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(pages);
    let source = Gated::new(bytes.clone());
    let served = serve_area(uffd, area, Arc::<Gated>::clone(&source), adjust);
    Some((area, bytes, source, served))
}

fn of(bytes: &[u8], area: Area, page: usize, pages: usize) -> &[u8] {
    &bytes[page * area.page..(page + pages) * area.page]
}

fn unmapped_pages_are_gone(made: Made) {
    let Some((area, bytes, served)) = serving(made, 6) else { return };
    assert!(area.part(2, 1).read() == of(&bytes, area, 2, 1));

    area.part(2, 2).unmap();
    let anew = area.part(2, 2);
    anew.map(made);

    // Not a fault of the session's: the kernel gives it what fresh memory has.
    let before = served.stats().faults;
    assert!(anew.part(0, 1).is_zero());
    assert_eq!(served.stats().faults, before);
    assert!(area.part(4, 1).read() == of(&bytes, area, 4, 1));
    served.close(Rest::Populate);
    assert!(anew.is_zero());
    assert!(area.part(0, 2).read() == of(&bytes, area, 0, 2));
    assert!(area.part(4, 2).read() == of(&bytes, area, 4, 2));
    served.until_filled(5, 0);
}

#[test]
fn unmapped_pages_leave_the_session_and_who_maps_anew_there_gets_nothing_of_it() {
    unmapped_pages_are_gone(Made::Private);
}

#[test]
fn unmapped_huge_pages_leave_the_session_and_who_maps_anew_there_gets_nothing_of_it() {
    let Some(_pool) = HugePages::reserve(8) else { return };
    unmapped_pages_are_gone(Made::Huge);
}

#[test]
fn a_page_unmapped_while_its_bytes_are_on_the_way_is_not_filled_and_its_waiter_is_woken() {
    let Some((area, bytes, source, served)) = gated(4, |_| {}) else { return };
    let shut = source.shut();
    let waits = area.part(1, 1).peek();
    served.until("the read has begun", |stats| stats.worker_reads == 1);

    area.part(1, 1).unmap();

    assert_eq!(finish(&waits), Err(Errno::EFAULT));
    area.part(1, 1).map(Made::Private);
    drop(shut);
    // The others of the window come all the same.
    assert!(area.part(2, 2).read() == of(&bytes, area, 2, 2));
    assert!(area.part(0, 1).read() == of(&bytes, area, 0, 1));
    assert!(area.part(1, 1).is_zero());
    served.close(Rest::Populate);
    assert!(area.part(1, 1).is_zero());
    served.until_filled(3, 0);
    let stats = served.stats();
    assert_eq!(stats.faults, faults_ended(&stats), "the one that came to nothing is counted too: {stats:?}");
}

fn moved_memory_is_served(made: Made) {
    let Some((area, bytes, served)) = serving(made, 6) else { return };
    let there = Area::reserve(area.page, 4);
    assert!(area.part(1, 2).read() == of(&bytes, area, 1, 2));
    area.part(2, 1).discard(made);

    // Page 1 was there, page 2 discarded, 3 and 4 missing.
    area.part(1, 4).remap(there, MOVE);

    assert!(there.part(0, 1).read() == of(&bytes, area, 1, 1));
    assert!(there.part(1, 1).is_zero());
    assert!(there.part(2, 2).read() == of(&bytes, area, 3, 2));
    assert!(area.part(5, 1).read() == of(&bytes, area, 5, 1));
    assert_eq!(finish(&area.part(1, 1).peek()), Err(Errno::EFAULT));
    // Discarding goes by the new address as well.
    there.part(3, 1).discard(made);
    assert!(there.part(3, 1).is_zero());
    served.close(Rest::Populate);
    assert!(area.part(0, 1).read() == of(&bytes, area, 0, 1));
    served.until_filled(6, 2);
}

#[test]
fn moved_memory_keeps_its_states_and_its_source() {
    moved_memory_is_served(Made::Private);
    moved_memory_is_served(Made::Shared);
}

#[test]
fn moved_huge_pages_keep_their_states_and_their_source() {
    let Some(_pool) = HugePages::reserve(8) else { return };
    moved_memory_is_served(Made::Huge);
}

#[test]
fn a_window_never_reaches_beyond_what_was_moved_together() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let area = Area::new(Made::Private, 64);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(64);
    let served = serve_area(uffd, area, Arc::new(Bytes(bytes.clone())), |_| {});
    let there = Area::reserve(PAGE, 8);

    area.part(20, 8).remap(there, MOVE);

    assert!(there.read() == of(&bytes, area, 20, 8));
    assert!(area.part(0, 20).read() == of(&bytes, area, 0, 20));
    assert!(area.part(28, 36).read() == of(&bytes, area, 28, 36));
    served.until_filled(64, 0);
    served.close(Rest::Poison);
}

#[test]
fn memory_left_mapped_by_a_move_reads_zero_and_the_source_goes_along() {
    let Some((area, bytes, served)) = serving(Made::Private, 4) else { return };
    let there = Area::reserve(PAGE, 4);
    assert!(area.part(0, 1).read() == of(&bytes, area, 0, 1));

    area.remap(there, MOVE | libc::MREMAP_DONTUNMAP);

    assert!(area.is_zero());
    assert!(there.read() == bytes);
    served.until_filled(4, 4);
    // What was left behind can be unmapped, and be somebody else's.
    area.unmap();
    area.map(Made::Private);
    served.close(Rest::Populate);
    assert!(area.is_zero());
}

#[test]
fn memory_moved_back_and_forth_stays_what_it_is() {
    let Some((area, bytes, served)) = serving(Made::Private, 8) else { return };
    let there = Area::reserve(PAGE, 1);

    for page in [3, 0, 7, 3, 4] {
        area.part(page, 1).remap(there, MOVE);
        assert!(there.read() == of(&bytes, area, page, 1));
        there.remap(area.part(page, 1), MOVE);
    }

    assert!(area.read() == bytes);
    served.until_filled(8, 0);
    served.close(Rest::Poison);
}

#[test]
fn shared_memory_mapped_twice_is_one_memory() {
    let Some((area, bytes, served)) = serving(Made::Shared, 4) else { return };
    let again = Area::reserve(PAGE, 3);
    assert!(area.part(1, 1).read() == of(&bytes, area, 1, 1));

    Area { pages: 0, ..area.part(1, 1) }.remap(again, MOVE);

    assert!(again.part(0, 2).read() == of(&bytes, area, 1, 2), "one that is there, and one that is missing");
    assert!(area.part(2, 1).read() == of(&bytes, area, 2, 1));
    again.part(1, 1).advise(libc::MADV_REMOVE);
    assert!(area.part(2, 1).is_zero() && again.part(1, 1).is_zero());
    area.part(3, 1).unmap();
    assert!(again.part(2, 1).read() == of(&bytes, area, 3, 1), "its other place has gone");
    served.close(Rest::Poison);
}

#[test]
fn memory_that_grows_reads_zero_where_it_is_new() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let whole = Area::reserve(PAGE, 8);
    let area = whole.part(0, 4);
    area.map(Made::Private);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(8);
    let served = serve_area(uffd, area, Arc::new(Bytes(bytes.clone())), single);

    // In place, which no event tells. Its last page, by which the new part is known, is missing first and there later.
    area.remap(whole.part(0, 6), 0);
    assert!(whole.part(5, 1).is_zero());
    assert!(whole.part(0, 4).read() == bytes[..4 * PAGE]);
    assert!(whole.part(4, 1).is_zero());
    // And while it moves.
    let there = Area::reserve(PAGE, 10);
    whole.part(0, 6).remap(there, MOVE);
    assert!(there.part(6, 4).is_zero());
    assert!(there.part(0, 4).read() == bytes[..4 * PAGE]);
    assert!(there.part(4, 2).is_zero());

    served.until_filled(4, 6);
    served.close(Rest::Poison);
}

#[test]
fn memory_that_shrinks_loses_its_tail() {
    let Some((area, bytes, served)) = serving(Made::Private, 8) else { return };

    area.remap(area.part(0, 4), 0);
    area.part(4, 4).map(Made::Private);

    served.close(Rest::Populate);
    assert!(area.part(0, 4).read() == bytes[..4 * PAGE]);
    assert!(area.part(4, 4).is_zero());
}

#[test]
fn bytes_on_their_way_reach_the_page_where_it_is_by_then() {
    let Some((area, bytes, source, served)) = gated(8, |_| {}) else { return };
    let there = Area::reserve(PAGE, 2);
    let shut = source.shut();
    let left_behind = area.part(3, 1).peek();
    served.until("the read has begun", |stats| stats.worker_reads == 1);

    area.part(3, 2).remap(there, MOVE);
    assert_eq!(finish(&left_behind), Err(Errno::EFAULT), "it is woken, and finds nothing there");
    let waits = there.peek();
    served.until("it waits at the new place", |stats| stats.faults >= 2);
    drop(shut);

    assert!(finish(&waits).unwrap() == of(&bytes, area, 3, 2));
    assert!(area.part(0, 3).read() == of(&bytes, area, 0, 3));
    assert!(area.part(5, 3).read() == of(&bytes, area, 5, 3));
    assert_eq!(served.stats().worker_reads, 1, "one read was enough for all of it");
    served.close(Rest::Poison);
}

#[test]
fn many_threads_that_wait_for_a_page_that_leaves_are_all_woken_and_the_session_goes_on() {
    const THREADS: usize = 24;
    let Some((area, bytes, source, served)) = gated(4, |options| options.window = Some(PAGE as u64)) else {
        return;
    };
    let shut = source.shut();
    let waiting: Vec<_> = (0..THREADS).map(|_| area.part(1, 1).peek()).collect();
    served.until("all of them wait", |stats| stats.faults as usize >= THREADS);

    area.part(1, 1).unmap();

    assert!(waiting.iter().all(|waits| finish(waits) == Err(Errno::EFAULT)));
    drop(shut);
    // Likewise for memory that a move left behind, which all of them find to be zeros.
    let there = Area::reserve(PAGE, 1);
    area.part(2, 1).remap(there, MOVE | libc::MREMAP_DONTUNMAP);
    let waiting: Vec<_> = (0..THREADS).map(|_| area.part(2, 1).peek()).collect();
    assert!(waiting.iter().all(|waits| finish(waits).unwrap() == [0; PAGE]));
    assert!(there.read() == of(&bytes, area, 2, 1));
    assert!(area.part(3, 1).read() == of(&bytes, area, 3, 1));
    served.close(Rest::Poison);
}

#[test]
fn memory_moved_about_while_it_is_touched_is_never_wrong() {
    const PAGES: usize = 64;
    let Some((area, bytes, _source, served)) = gated(PAGES, |options| options.window = Some(4 * PAGE as u64))
    else {
        return;
    };
    let there = Area::reserve(PAGE, PAGES);
    let touching: Vec<_> = (0..3_usize)
        .map(|thread| {
            let bytes = bytes.clone();
            support::elsewhere(move || {
                let mut found = 0;
                for round in 0..400 {
                    let page = (round * 7 + thread * 13) % PAGES;
                    let place = if round % 2 == 0 { area } else { there };
                    // Where it is not at this moment, there is nothing, and never something else.
                    if let Ok(read) = finish(&place.part(page, 1).peek()) {
                        assert!(read == of(&bytes, area, page, 1), "page {page}");
                        found += 1;
                    }
                }
                found
            })
        })
        .collect();
    let moving = support::elsewhere(move || {
        for round in 0..100 {
            let (from, to) = if round % 2 == 0 { (area, there) } else { (there, area) };
            // All of it or a part, the map is cut and mended. In three pieces, because the kernel moves one mapping at a time
            // and does not make one again of what it has cut for every kind of page.
            let pieces: &[(usize, usize)] =
                if round % 4 < 2 { &[(0, 16), (16, 32), (48, 16)] } else { &[(16, 32)] };
            for &(first, pages) in pieces {
                let (from, to) = (from.part(first, pages), to.part(first, pages));
                assert_eq!(from.remap_raw(to, MOVE), to.ptr(), "{}", Errno::last());
            }
        }
    });

    finish(&moving);
    let found: usize = touching.iter().map(finish).sum();

    assert!(found > 0);
    assert!(area.read() == bytes);
    served.close(Rest::Poison);
}

#[test]
fn memory_moved_about_while_the_rest_of_it_is_populated_is_all_there() {
    const PAGES: usize = 2048;
    for _ in 0..20 {
        let Some((area, bytes, served)) = serving(Made::Private, PAGES) else { return };
        let there = Area::reserve(PAGE, PAGES);
        served.pager.close_session(served.id, Rest::Populate);
        // Until the session is over, which is as long as there is anything to bring.
        let moving = support::elsewhere(move || {
            for _ in 0..100 {
                for (from, to) in [(area, there), (there, area)] {
                    assert_eq!(from.remap_raw(to, MOVE), to.ptr(), "{}", Errno::last());
                }
            }
        });
        finish(&moving);
        assert_eq!(ended(&served.notices, served.id).reason, EndReason::Closed);
        assert!(area.read() == bytes);
    }
}

#[test]
fn memory_scattered_into_too_many_pieces_ends_the_session_by_name() {
    const PAGES: usize = 3 * 8192;
    let Some((area, _, served)) = serving(Made::Private, PAGES) else { return };

    finish(&support::elsewhere(move || {
        for page in (1..PAGES).step_by(2) {
            // SAFETY: the area's own memory, to which no reference exists.
            assert_eq!(unsafe { libc::munmap(area.part(page, 1).ptr(), PAGE) }, 0);
        }
    }));

    let end = ended(&served.notices, served.id);
    assert_eq!(end.reason, EndReason::Exhausted);
    assert!(end.error.unwrap().to_string().contains("pieces"));
    assert_eq!(finish(&area.part(0, 1).peek()), Err(Errno::EFAULT), "poisoned, by the policy");
}

#[test]
fn registered_memory_that_is_no_part_of_the_session_ends_it_instead_of_hanging() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let (area, other) = (Area::new(Made::Private, 4), Area::new(Made::Private, 4));
    register(&uffd, area, Modes::MISSING);
    register(&uffd, other, Modes::MISSING);
    let served = serve_area(uffd, area, Arc::new(Bytes(image(4))), single);

    assert_eq!(finish(&other.part(2, 1).peek()), Err(Errno::EFAULT));

    let end = ended(&served.notices, served.id);
    assert_eq!(end.reason, EndReason::Protocol);
    let error = end.error.unwrap().to_string();
    assert!(error.contains(&format!("{:#x}", other.part(2, 1).address)), "{error}");
}

#[test]
fn faults_outside_what_is_followed_are_not_there_without_events() {
    // Without REMAP events a move takes the registration off: nothing of it reaches the session.
    let Some(uffd) = new_uffd(Features::empty()) else { return };
    let area = Area::new(Made::Private, 4);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(4);
    let served = serve_area(uffd, area, Arc::new(Bytes(bytes.clone())), single);
    let there = Area::reserve(PAGE, 2);

    area.part(0, 2).remap(there, MOVE);

    assert!(there.is_zero());
    assert!(area.part(2, 2).read() == of(&bytes, area, 2, 2));
    served.close(Rest::Poison);
}
