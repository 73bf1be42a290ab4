//! Sessions that were ending, or held, when their pager was killed; and those that nobody can take over.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use pager::{EndReason, FailurePolicy, KeptSession, Notice, Pager, PagerError, PagerOptions, Rest};
use uffd::Modes;
use uffd::liveness::PidFd;

use crate::memory::{Served, page, resume, served, served_by};
use crate::support::area::{all_events, ended};
use crate::support::kept::{Kept, Source};
use crate::support::{DEADLINE, PAGE, finish, image, told};

const PAGES: usize = 64;
/// Of a sweep that is not over when it is killed.
const MANY: usize = 1 << 16;

#[test]
fn what_was_being_populated_to_be_closed_is_populated_and_closed_by_the_successor() {
    let source = Source::Never(PAGES);
    let Some(served) = served_by(PAGES, source, None, |_| {}) else { return };
    let Served { area, process, kept, .. } = served;
    process.close(kept.session.id, true);
    process.kill();

    let resumed = resume(&kept, PAGES);

    let end = ended(&resumed.notices, kept.session.id);
    assert_eq!((end.reason, end.error.is_none()), (EndReason::Closed, true));
    assert!(area.read() == image(PAGES));
}

#[test]
fn what_had_failed_is_not_served_by_the_successor_and_the_reason_is_told() {
    let stalls = |session: &mut KeptSession| session.source_timeout = Duration::from_millis(20);
    let Some(served) = served_by(MANY, Source::Never(MANY), None, stalls) else { return };
    let Served { area, process, kept, .. } = served;
    assert_eq!(finish(&area.part(9, 1).peek()), Err(Errno::EFAULT), "it stalls, and is poisoned first");
    process.kill();

    let resumed = resume(&kept, MANY);

    let end = ended(&resumed.notices, kept.session.id);
    assert_eq!(end.reason, EndReason::Stalled);
    let error = end.error.unwrap();
    assert_eq!(error.code(), "ERR_UFFD_TIMEOUT");
    assert!(error.to_string().contains("the source did not answer within 20 ms"), "{error}");
    assert_eq!(finish(&area.part(60_000, 1).peek()), Err(Errno::EFAULT));
}

#[test]
fn what_was_held_is_held_by_the_successor_until_it_is_resumed() {
    let Some(served) = served(PAGES, all_events(), Modes::MISSING, |_| {}) else { return };
    let Served { area, bytes, process, kept, .. } = served;
    process.hold(kept.session.id);
    let waiting = area.part(9, 1).peek();
    process.kill();

    let resumed = resume(&kept, PAGES);

    let Notice::Held { hold, .. } = resumed.notices.recv_timeout(DEADLINE).unwrap() else {
        panic!("it is not held")
    };
    assert!(hold.failure.is_none() && hold.until.is_none() && !hold.asks);
    assert!(waiting.try_recv().is_err());
    resumed.pager.resume(kept.session.id, None, Box::new(|_| {}));
    assert!(finish(&waiting).unwrap() == page(&bytes, 9));
    resumed.pager.close_session(kept.session.id, Rest::Poison);
}

/// Fails a session whose pager is dead.
fn fail(kept: &Kept) -> (Pager, std::sync::mpsc::Receiver<Notice>) {
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let why = PagerError::Internal("it could not be started again".to_owned());
    pager.fail_session(&kept.session, kept.descriptors(), why, observer).unwrap();
    (pager, notices)
}

/// A session of so many pages whose pager is dead, with threads that wait for it: how long until each of those was poisoned, and
/// until everything was.
fn time_to_poison(pages: usize) -> Option<(Duration, Duration)> {
    let Served { area, process, kept, .. } = served_by(pages, Source::Made(pages), None, |_| {})?;
    assert_eq!(area.part(pages / 2, 1).read().len(), PAGE);
    process.kill();
    let waiting: Vec<_> = (0..4).map(|nth| area.part(pages / 5 * nth + 7, 1).peek()).collect();
    let began = Instant::now();

    let (_pager, notices) = fail(&kept);

    for answer in waiting {
        assert_eq!(finish(&answer), Err(Errno::EFAULT));
    }
    let waited = began.elapsed();
    let end = ended(&notices, kept.session.id);
    let took = began.elapsed();
    assert_eq!(end.reason, EndReason::PagerLost);
    assert!(end.error.unwrap().to_string().contains("could not be started again"));
    assert_eq!(finish(&area.part(pages - 1, 1).peek()), Err(Errno::EFAULT));
    assert_eq!(area.part(pages / 2, 1).read().len(), PAGE, "what is there stays");
    Some((waited, took))
}

/// The best of some attempts: others use this machine as well.
fn poisoned_within(pages: usize, waiting: Duration, all: Duration) {
    let mut attempts = Vec::new();
    for _ in 0..5 {
        let Some((waited, took)) = time_to_poison(pages) else { return };
        attempts.push((waited, took));
        if waited < waiting && took < all {
            println!("{} MiB: {attempts:?}", (pages * PAGE) >> 20);
            return;
        }
    }
    panic!("{attempts:?}");
}

#[test]
fn who_waits_where_nobody_can_take_over_is_poisoned_within_50_ms_and_256_mib_within_150() {
    poisoned_within(MANY, Duration::from_millis(50), Duration::from_millis(150));
}

#[test]
fn larger_memory_that_nobody_can_take_over_is_poisoned_at_2_gib_a_second() {
    poisoned_within(16 * MANY, Duration::from_millis(50), Duration::from_secs(2));
}

#[test]
fn a_process_that_is_to_be_killed_is_killed_where_nobody_can_take_over() {
    // Whose memory it is makes no difference to who is killed: one that the test can spare.
    let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let spare = PidFd::open(other.id() as i32).unwrap();
    let kills = |session: &mut KeptSession| session.policy = FailurePolicy::Kill;
    if let Some(Served { process, kept, .. }) = served_by(PAGES, Source::AtHand(PAGES), Some(&spare), kills) {
        process.kill();

        let (_pager, notices) = fail(&kept);

        assert!(spare.wait(DEADLINE).unwrap(), "it is killed");
        assert_eq!(ended(&notices, kept.session.id).reason, EndReason::PagerLost);
    }
    // It may be dead.
    let _ = other.kill();
    other.wait().unwrap();
}
