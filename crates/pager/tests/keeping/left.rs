//! Killed between reading a message and marking it: what the process that is gone has read is done by the one that comes.

use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use pager::{EndReason, LeftBehind, Notice, Pager, PagerError, PagerOptions, Rest};
use uffd::{Features, Modes, Userfaultfd};

use crate::memory::{Served, at, get, page, put, resume, served, try_resume};
use crate::support::area::{Area, Made, all_events, started};
use crate::support::children::{Child, Steps, fork, turn};
use crate::support::kept::Kept;
use crate::support::{DEADLINE, elsewhere, finish, held_up, image, told};

const PAGES: usize = 64;

/// A session whose pager is dead.
fn orphaned(features: Features) -> Option<Served> {
    let served = served(PAGES, features, Modes::MISSING, |_| {})?;
    assert!(served.area.part(3, 1).read() == page(&served.bytes, 3));
    Some(served)
}

#[test]
fn a_removal_that_was_read_and_no_more_never_brings_old_bytes_back() {
    let Some(Served { area, bytes, uffd, process, kept }) = orphaned(all_events()) else { return };
    process.kill();
    // Pages that were there, and pages that were not.
    let discarding = held_up(move || area.part(3, 3).discard_here(Made::Private));
    assert_eq!(kept.read_and_die(&uffd), 1);
    finish(&discarding);

    let resumed = resume(&kept, PAGES);

    assert!(area.part(3, 3).is_zero());
    assert!(area.part(6, 1).read() == page(&bytes, 6));
    let ring = kept.words();
    assert!((0..64).all(|slot| get(&ring, at::RING + slot * 4) == 0), "it is marked");
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
}

#[test]
fn faults_that_were_read_and_no_more_are_answered_and_wait_for_nobody() {
    let Some(Served { area, bytes, uffd, process, kept }) = orphaned(all_events()) else { return };
    process.kill();
    let waiting: Vec<_> = (10..14).map(|at| (at, area.part(at, 1).peek())).collect();
    let mut read = 0;
    while read < waiting.len() {
        read += kept.read_and_die(&uffd);
        std::thread::yield_now();
    }

    let resumed = resume(&kept, PAGES);

    for (at, answer) in waiting {
        assert!(finish(&answer).unwrap() == page(&bytes, at));
    }
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
}

/// Moves pages 8 to 11 elsewhere, both of whose messages (the move, and that the old place is gone) are read by who dies.
fn moved(served: &Served) -> Area {
    let there = Area::reserve(served.area.page, 4);
    let from = served.area.part(8, 4);
    let moving = held_up(move || {
        assert_eq!(
            from.remap_raw(there, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED),
            there.ptr(),
            "{}",
            Errno::last()
        );
    });
    let mut read = 0;
    while read < 2 {
        // One after the other: the second comes when the first was read. They are two reads' worth of one ring.
        let first = read;
        read += served.kept.read_and_die(&served.uffd);
        if first == 0 && read == 1 {
            shift_ring(served);
        }
        std::thread::yield_now();
    }
    finish(&moving);
    unshift_ring(served);
    there
}

/// Puts the first message of the ring aside, behind the others.
fn shift_ring(served: &Served) {
    copy_message(served, 0, 63);
}

fn unshift_ring(served: &Served) {
    copy_message(served, 0, 1);
    copy_message(served, 63, 0);
    put(&served.kept.words(), at::RING + 63 * 4, 0);
}

fn copy_message(served: &Served, from: usize, to: usize) {
    let words = served.kept.words();
    for word in 0..4 {
        put(&words, at::RING + to * 4 + word, get(&words, at::RING + from * 4 + word));
    }
}

#[test]
fn a_move_that_was_read_and_no_more_is_followed() {
    let Some(mut served) = orphaned(all_events()) else { return };
    served.process = served.process.replaced();
    let there = moved(&served);

    let resumed = resume(&served.kept, PAGES);

    check_moved(&served, there);
    assert_eq!(resumed.info.stats.snapshot().pages_removed, 0);
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
}

fn check_moved(served: &Served, there: Area) {
    for at in 0..4 {
        assert!(
            there.part(at, 1).read() == page(&served.bytes, 8 + at),
            "page {at} of those that were moved"
        );
    }
    for at in (0..PAGES).filter(|at| !(8..12).contains(at)) {
        assert!(served.area.part(at, 1).read() == page(&served.bytes, at), "page {at}");
    }
    let gone = finish(&served.area.part(8, 1).peek());
    assert_eq!(gone, Err(Errno::EFAULT));
}

#[test]
fn a_move_that_was_put_down_and_not_marked_is_not_done_twice() {
    // After the move; after both.
    for done in 1..=2 {
        let Some(mut served) = orphaned(all_events()) else { return };
        served.process = served.process.replaced();
        let there = moved(&served);
        let words = served.kept.words();
        let messages: HashMap<usize, u64> =
            (0..8).map(|word| (at::RING + word, get(&words, at::RING + word))).collect();
        let reads = get(&words, at::READS);
        // It follows both, and is killed.
        let successor = crate::support::kept::PagerProcess::start("pager_process");
        successor.resume(&served.kept, crate::support::kept::Source::AtHand(PAGES));
        successor.started();
        successor.kill();
        // As if it had been before it could mark them; of one that has done the first only, the second map is not there yet.
        for (index, word) in messages {
            put(&words, index, word);
        }
        put(&words, at::READS, reads);
        if done == 1 {
            put(&words, at::MAP, get(&words, at::MAP) - 1);
            spoil_newest_map(&served, 1);
        }

        let resumed = resume(&served.kept, PAGES);

        assert_eq!(resumed.info.taken_over, 2);
        check_moved(&served, there);
        resumed.pager.close_session(resumed.info.id, Rest::Poison);
    }
}

/// Tears the slot of the map that is `ahead` of the one that is told to be complete.
fn spoil_newest_map(served: &Served, ahead: u64) {
    let words = served.kept.words();
    let generation = get(&words, at::MAP) + ahead;
    let slot = map_slot(&words, generation);
    // Half of a piece, as it is when it is being written.
    put(&words, slot + 8, get(&words, slot + 8) ^ 0x5a5a_0000);
}

fn map_slot(words: &uffd::Words, generation: u64) -> usize {
    let bitmap = (get(words, at::PAGES) as usize).div_ceil(64).next_multiple_of(8);
    let pieces = get(words, 5) as usize;
    let slot = (8 + pieces * 4).next_multiple_of(8);
    at::BITMAPS + 2 * bitmap + (generation % 2) as usize * slot
}

#[test]
fn a_map_that_was_being_written_is_not_used_and_the_one_before_it_is() {
    let Some(mut served) = orphaned(all_events()) else { return };
    served.process = served.process.replaced();
    spoil_newest_map(&served, 1);
    let there = moved(&served);

    let resumed = resume(&served.kept, PAGES);

    check_moved(&served, there);
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
}

/// What is left of a session whose pager is dead, and of a child.
struct Forked {
    area: Area,
    kept: Kept,
    child: Child,
    /// What the table of that pager had.
    left: LeftBehind,
    _uffd: Userfaultfd,
}

/// A session whose pager is dead, and a child that was forked since: its FORK message was read, and no more, into this process's table, as
/// which number. The child waits for a step, then looks at a page that was there, and at two that were not.
fn forking(steps: &Steps) -> Option<Forked> {
    let Served { area, uffd, process, kept, .. } = orphaned(all_events() | Features::EVENT_FORK)?;
    let dead = process.pid();
    process.kill();
    let wait = steps.waiter();
    let act = move || {
        wait();
        i32::from(!(area.holds(3, 3) && area.holds(5, 5) && area.holds(6, 6)))
    };
    // SAFETY: reads one byte, touches memory, makes bare system calls.
    let forking = elsewhere(move || unsafe { fork(act) });
    while kept.read_and_leave(&uffd) == 0 {
        std::thread::yield_now();
    }
    let child = finish(&forking);
    let ring = kept.words();
    assert_eq!(get(&ring, at::TABLE), dead as u64);
    let number = get(&ring, at::RING + 1) as i32;
    // SAFETY: reading the message has put it into this process's table, and nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let mut left = LeftBehind::default();
    left.add(dead, number, fd);
    Some(Forked { area, kept, child, left, _uffd: uffd })
}

#[test]
fn a_child_whose_fork_was_read_and_no_more_is_served_from_what_its_pagers_table_had() {
    let _turn = turn();
    let steps = Steps::new();
    let Some(Forked { area, kept, child, left, _uffd }) = forking(&steps) else { return };
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    pager.inherit(left);

    let (outcome, notices) = try_resume(&pager, &kept, PAGES);

    outcome.unwrap();
    let parent = started(&notices);
    let of_child = started(&notices);
    assert_eq!((parent.lost_children, of_child.parent), (0, Some(kept.session.id)));
    // What its parent discards is the child's as it was.
    area.part(6, 1).discard(Made::Private);
    assert!(area.part(6, 1).is_zero());
    steps.step();
    assert_eq!(child.exit_code(), 0);
    assert!(area.part(5, 1).read() == page(&image(PAGES), 5));
    pager.close_session(kept.session.id, Rest::Poison);
}

#[test]
fn a_child_whose_fork_was_read_and_no_more_meets_the_policy_where_nobody_can_take_over() {
    let _turn = turn();
    let steps = Steps::new();
    let Some(Forked { kept, child, left, .. }) = forking(&steps) else { return };
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    pager.inherit(left);
    let (observer, notices) = told();
    let why = PagerError::Internal("nobody goes on".to_owned());

    pager.fail_session(&kept.session, kept.descriptors(), why, observer).unwrap();

    let mut reasons = Vec::new();
    while reasons.len() < 2 {
        if let Notice::SessionEnded { end, .. } = notices.recv_timeout(DEADLINE).unwrap() {
            reasons.push(end.reason);
        }
    }
    assert_eq!(reasons, [EndReason::PagerLost; 2]);
    steps.step();
    assert!(matches!(child.wait(), WaitStatus::Signaled(_, Signal::SIGBUS, _)));
}

#[test]
fn a_child_whose_fork_was_read_and_no_more_is_counted_as_lost() {
    let _turn = turn();
    let Some(Served { area, bytes, uffd, process, kept }) = orphaned(all_events() | Features::EVENT_FORK)
    else {
        return;
    };
    process.kill();
    let steps = Steps::new();
    let wait = steps.waiter();
    // SAFETY: reads one byte.
    let forking = elsewhere(move || unsafe {
        fork(move || {
            wait();
            0
        })
    });
    while kept.read_and_die(&uffd) == 0 {
        std::thread::yield_now();
    }
    let child = finish(&forking);

    let resumed = resume(&kept, PAGES);

    assert_eq!(resumed.info.lost_children, 1);
    assert!(area.part(20, 1).read() == page(&bytes, 20), "its parent is served on");
    steps.step();
    assert_eq!(child.exit_code(), 0);
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
}
