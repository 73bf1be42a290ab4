//! Sessions that answer write-protect faults, alone and together with missing ones: what is written is told, all of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pager::{DirtyPages, Pager, PagerError, PagerOptions, Region, Rest, SessionModes, SessionOptions};
use uffd::{Features, Modes};

use support::area::{Area, Gated, Made, Serving, all_events, ended, new_uffd, register, serve_area, started};
use support::children::{Steps, fork, turn};
use support::huge::HugePages;
use support::{Bytes, DEADLINE, PAGE, elsewhere, finish, image, told};

const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
const BOTH: Modes = Modes::MISSING.union(Modes::WRITE_PROTECT);

fn tracked(options: &mut SessionOptions) {
    options.modes.write_protect = true;
}

/// Memory served from an image whose writes are tracked, one page at a time on huge pages, windows of eight else.
fn serving(made: Made, pages: usize) -> Option<(Area, Vec<u8>, Serving)> {
    serving_with(made, pages, all_events())
}

fn serving_with(made: Made, pages: usize, features: Features) -> Option<(Area, Vec<u8>, Serving)> {
    let uffd = new_uffd(features)?;
    let area = Area::new(made, pages);
    register(&uffd, area, BOTH);
    let bytes = image(area.len() / PAGE);
    let served = serve_area(uffd, area, Arc::new(Bytes(bytes.clone())), |options| {
        options.window = Some(8 * PAGE as u64);
        tracked(options);
    });
    Some((area, bytes, served))
}

fn take(served: &Serving) -> DirtyPages {
    served.pager.take_dirty(served.id, usize::MAX).wait(DEADLINE).unwrap()
}

/// The pages of an area that were written to, by their addresses.
fn dirty(served: &Serving, area: Area) -> Vec<usize> {
    let told = take(served);
    assert!(!told.more);
    let pages = told.ranges.iter().flat_map(|range| {
        assert_eq!(range.source_offset, Some(range.address - area.address));
        let first = ((range.address - area.address) as usize) / area.page;
        first..first + range.len as usize / area.page
    });
    pages.collect()
}

fn writes_are_told_once(made: Made) {
    let Some((area, bytes, served)) = serving(made, 12) else { return };
    assert!(area.part(0, 3).read() == bytes[..3 * area.page]);
    assert_eq!(dirty(&served, area), [0; 0], "reading is not writing");

    // One that is there, two that are missing.
    for page in [1, 9, 10] {
        area.part(page, 1).write(b"written!");
    }
    assert_eq!(dirty(&served, area), [1, 9, 10]);
    assert_eq!(dirty(&served, area), [0; 0]);

    area.part(9, 1).write(b"again");
    assert_eq!(dirty(&served, area), [9]);
    assert_eq!(&area.part(9, 1).read()[..8], b"againen!");
    assert!(area.part(9, 1).read()[8..] == bytes[9 * area.page + 8..10 * area.page]);
    assert!(area.part(2, 7).read() == bytes[2 * area.page..9 * area.page]);
    served.close(Rest::Poison);
}

#[test]
fn every_write_is_told_once_and_no_read() {
    writes_are_told_once(Made::Private);
    writes_are_told_once(Made::Shared);
}

#[test]
fn every_write_to_huge_pages_is_told_once_and_no_read() {
    let Some(_pool) = HugePages::reserve(14) else { return };
    writes_are_told_once(Made::Huge);
}

fn discarded_pages_count_as_written(made: Made) {
    let Some((area, bytes, served)) = serving(made, 6) else { return };
    assert!(area.part(0, 3).read() == bytes[..3 * area.page]);
    area.part(1, 1).discard(made);
    area.part(4, 1).discard(made);

    assert_eq!(dirty(&served, area), [1, 4]);
    assert_eq!(dirty(&served, area), [1, 4], "it was announced before it was done");
    assert_eq!(dirty(&served, area), [0; 0]);
    // Absent: it comes as zeros, protected. Both ways of touching it end, and only one counts.
    assert!(area.part(1, 1).is_zero());
    assert_eq!(dirty(&served, area), [0; 0]);
    area.part(1, 1).write(b"present");
    area.part(4, 1).write(b"absent");
    assert_eq!(dirty(&served, area), [1, 4]);
    assert_eq!(&area.part(4, 1).read()[..8], b"absent\0\0");
    served.close(Rest::Poison);
}

#[test]
fn discarded_pages_count_as_written_and_are_tracked_as_zeros() {
    discarded_pages_count_as_written(Made::Private);
    discarded_pages_count_as_written(Made::Shared);
}

#[test]
fn discarded_huge_pages_count_as_written_and_are_tracked_as_zeros() {
    let Some(_pool) = HugePages::reserve(8) else { return };
    discarded_pages_count_as_written(Made::Huge);
}

#[test]
fn memory_that_is_all_there_is_tracked_without_a_source() {
    for made in [Made::Private, Made::Shared] {
        let Some(uffd) = new_uffd(all_events() | Features::WP_UNPOPULATED) else { return };
        let area = Area::new(made, 6);
        area.part(0, 1).write(b"before");
        register(&uffd, area, Modes::WRITE_PROTECT);
        let served = serve_area(uffd, area, Arc::new(Bytes(image(6))), |options| {
            options.modes = SessionModes { missing: false, write_protect: true, ..SessionModes::default() };
        });

        area.part(0, 1).write(b"after!");
        area.part(3, 1).write(b"first");
        assert!(area.part(4, 1).is_zero());

        assert_eq!(dirty(&served, area), [0, 3], "{made:?}");
        assert_eq!(dirty(&served, area), [0; 0], "{made:?}");
        served.close(Rest::Poison);
        assert!(area.part(4, 2).is_zero(), "{made:?}: none of it was missing");
    }
}

#[test]
fn no_write_is_lost_however_often_it_is_asked() {
    const PAGES: usize = 32;
    let Some((area, bytes, served)) = serving(Made::Private, PAGES) else { return };
    let done = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&done);
    let writing = elsewhere(move || {
        let mut value = 1_u64;
        while !stop.load(Ordering::Relaxed) {
            value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = area.part((value >> 33) as usize % PAGES, 1);
            let word = (page.address as usize + (value >> 40) as usize % 512 * 8) as *mut u64;
            // SAFETY: the area's own memory, aligned, to which no reference exists.
            unsafe { word.write_volatile(value) };
        }
    });
    let mut copy = bytes;
    let mut told = 0;
    let refresh = |copy: &mut Vec<u8>| -> usize {
        let ranges = take(&served).ranges;
        for range in &ranges {
            let first = (range.address - area.address) as usize;
            let part = area.part(first / PAGE, range.len as usize / PAGE);
            copy[first..first + part.len()].copy_from_slice(&part.read());
        }
        ranges.len()
    };

    let deadline = Instant::now() + DEADLINE;
    while told < 500 {
        assert!(Instant::now() < deadline, "nobody writes");
        told += refresh(&mut copy);
    }
    done.store(true, Ordering::Relaxed);
    finish(&writing);
    refresh(&mut copy);

    assert!(area.read() == copy);
    served.close(Rest::Poison);
}

#[test]
fn writes_are_told_where_memory_is_by_now_and_by_where_it_belongs() {
    let Some((area, _, served)) = serving(Made::Private, 8) else { return };
    let there = Area::reserve(PAGE, 4);
    area.part(2, 1).write(b"before");
    area.part(7, 1).write(b"unmapped");

    area.part(1, 4).remap(there, MOVE);
    area.part(7, 1).unmap();
    there.part(3, 1).write(b"after");

    let told: Vec<_> =
        take(&served).ranges.iter().map(|dirty| (dirty.address, dirty.source_offset)).collect();
    let at = |page: usize| (there.part(page, 1).address, Some((page as u64 + 1) * PAGE as u64));
    assert_eq!(told, [at(1), at(3)]);
    served.close(Rest::Poison);
}

#[test]
fn memory_that_grew_is_always_told() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let whole = Area::reserve(PAGE, 8);
    let area = whole.part(0, 4);
    area.map(Made::Private);
    register(&uffd, area, BOTH);
    let served = serve_area(uffd, area, Arc::new(Bytes(image(4))), tracked);
    area.remap(whole.part(0, 6), 0);

    whole.part(5, 1).write(b"new");

    for _ in 0..2 {
        let told = take(&served).ranges;
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].address, told[0].source_offset), (whole.part(4, 1).address, None));
        assert_eq!(told[0].len, 2 * PAGE as u64);
    }
    served.close(Rest::Poison);
}

#[test]
fn a_forked_child_is_tracked_apart() {
    let _turn = turn();
    let Some((area, _, served)) = serving_with(Made::Private, 6, all_events() | Features::EVENT_FORK) else {
        return;
    };
    area.part(0, 1).write(b"both");
    let (ready, end) = (Steps::new(), Steps::new());
    let (told, wait) = (ready.stepper(), end.waiter());
    let act = move || {
        for page in [1, 4] {
            let start = area.part(page, 1).ptr().cast::<u8>();
            // SAFETY: the area's own memory, to which no reference exists.
            unsafe { start.write_volatile(1) };
        }
        told();
        wait();
        i32::from(!area.holds(3, 3))
    };
    // SAFETY: touches memory and makes bare system calls.
    let child = unsafe { fork(act) };
    let of_child = started(&served.notices);
    area.part(2, 1).write(b"parent");
    ready.wait();

    let of_the_child: Vec<u64> = {
        let told = served.pager.take_dirty(of_child.id, usize::MAX).wait(DEADLINE).unwrap();
        told.ranges
            .iter()
            .flat_map(|range| (range.address..range.address + range.len).step_by(PAGE))
            .collect()
    };
    let at = |page: usize| area.part(page, 1).address;
    assert_eq!(of_the_child, [at(0), at(1), at(4)]);
    assert_eq!(dirty(&served, area), [0, 2]);
    end.step();
    assert_eq!(child.exit_code(), 0);
    ended(&served.notices, of_child.id);
    served.close(Rest::Poison);
}

#[test]
fn an_answer_has_no_more_ranges_than_were_asked_for_and_the_next_goes_on() {
    let Some((area, _, served)) = serving(Made::Private, 16) else { return };
    for page in [0, 2, 4, 6, 8] {
        area.part(page, 1).write(b"written");
    }
    let some = || {
        let told = served.pager.take_dirty(served.id, 2).wait(DEADLINE).unwrap();
        let pages = told.ranges.iter().map(|range| (range.address - area.address) / PAGE as u64);
        (pages.collect::<Vec<_>>(), told.more)
    };

    assert_eq!(some(), (vec![0, 2], true));
    // A page in front that is written to all the time does not keep the others from being told.
    area.part(0, 1).write(b"again");
    assert_eq!(some(), (vec![4, 6], true));
    assert_eq!(some(), (vec![8, 0], true));
    assert_eq!(some(), (vec![], false));
    served.close(Rest::Poison);
}

#[test]
fn protected_memory_that_cannot_be_served_is_poisoned_and_never_zero() {
    for made in [Made::Private, Made::Shared] {
        let Some((area, bytes, served)) = serving(made, 24) else { return };
        assert!(area.part(0, 1).read() == bytes[..PAGE]);
        area.part(1, 1).write(b"written!");

        served.close(Rest::Poison);

        assert_eq!(&area.part(1, 1).read()[..8], b"written!", "{made:?}: not protected any more");
        area.part(1, 1).write(b"and on");
        assert_eq!(finish(&area.part(20, 1).peek()), Err(Errno::EFAULT), "{made:?}");
    }
}

#[test]
fn bytes_that_come_late_are_tracked_like_all_others() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let area = Area::new(Made::Private, 4);
    register(&uffd, area, BOTH);
    let source = Gated::new(image(4));
    let served = serve_area(uffd, area, Arc::<Gated>::clone(&source), tracked);
    let shut = source.shut();
    let writing = elsewhere(move || area.part(1, 1).write(b"late"));
    served.until("the read has begun", |stats| stats.worker_reads == 1);
    drop(shut);

    finish(&writing);

    assert_eq!(dirty(&served, area), [1]);
    served.close(Rest::Poison);
}

#[test]
fn asking_for_what_is_not_tracked_is_refused_by_name() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let area = Area::new(Made::Private, 4);
    register(&uffd, area, Modes::MISSING);
    let served = serve_area(uffd, area, Arc::new(Bytes(image(4))), |_| {});
    let ask = || served.pager.take_dirty(served.id, 1).wait(DEADLINE);

    assert!(matches!(ask(), Err(PagerError::Unsupported(_))));
    served.close(Rest::Poison);
    assert!(matches!(ask(), Err(PagerError::SessionOver)));
}

#[test]
fn a_session_that_cannot_be_is_refused_and_leaves_nothing_behind() {
    let area = Area::new(Made::Private, 4);
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let region = Region { address: area.address, len: area.len() as u64, source_offset: 0 };
    let adopt = |registered: Modes, modes: SessionModes| {
        let uffd = new_uffd(Features::empty())?;
        register(&uffd, area, registered);
        let options = SessionOptions {
            source_timeout: Duration::from_secs(10),
            modes,
            ..SessionOptions::new(vec![region], PAGE as u64, Arc::new(Bytes(image(4))))
        };
        Some(pager.adopt(uffd, options, told().0).unwrap_err())
    };
    let none = SessionModes { missing: false, ..SessionModes::default() };
    let alone = SessionModes { missing: false, write_protect: true, ..SessionModes::default() };
    let both = SessionModes { write_protect: true, ..SessionModes::default() };

    let Some(error) = adopt(Modes::MISSING, none) else { return };
    assert!(error.to_string().contains("answers no faults"), "{error}");
    let error = adopt(Modes::WRITE_PROTECT, alone).unwrap();
    assert!(error.to_string().contains("wp-unpopulated"), "{error}");
    let error = adopt(Modes::MISSING, both).unwrap();
    assert!(matches!(error, PagerError::Kernel { .. }), "{error}: it is not registered for that");
    // Its userfaultfd was closed each time: the memory is ordinary memory again.
    assert!(area.is_zero());
}

#[test]
fn an_answer_that_nobody_waits_for_any_more_holds_nothing_up() {
    let Some((area, bytes, served)) = serving(Made::Private, 4) else { return };
    area.part(1, 1).write(b"written!");

    let late = served.pager.take_dirty(served.id, 1).wait(Duration::ZERO);

    assert!(late.is_ok() || matches!(late, Err(PagerError::Timeout { .. })));
    assert!(area.part(2, 1).read() == bytes[2 * PAGE..3 * PAGE]);
    served.close(Rest::Poison);
}
