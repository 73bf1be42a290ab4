//! Sessions that are held: nobody gets poison, zeros or a signal, and when they go on nothing is lost and nothing is stale.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::libc;
use pager::{EndReason, FailurePolicy, Hold, Notice, PageSource, PagerError, Rest, SessionOptions};
use uffd::{Mapping, MappingKind};

use support::area::{Area, Gated, Made, all_events, new_uffd, register, serve_area};
use support::sources::{Failing, FailingLate};
use support::{
    Bytes, DEADLINE, PAGE, Reading, Served, elsewhere, finish, image, page_of, read, reading, serve,
};

const PAGES: usize = 16;
const HOLD: FailurePolicy = FailurePolicy::Hold { timeout: None };

fn page_by_page(policy: FailurePolicy) -> impl FnOnce(&mut SessionOptions) {
    move |options| {
        options.window = Some(PAGE as u64);
        options.policy = policy;
    }
}

fn held(source: Arc<dyn PageSource>, policy: FailurePolicy) -> Option<Served> {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    serve(mapping, source, page_by_page(policy))
}

/// It is told that the session is held.
fn told(served: &Served) -> Hold {
    match served.notices.recv_timeout(DEADLINE).unwrap() {
        Notice::Held { id, hold, .. } if id == served.id => hold,
        other => panic!("{other:?}"),
    }
}

fn answer<T: Send + 'static>(
    ask: impl FnOnce(Box<dyn FnOnce(Result<T, PagerError>) + Send>),
) -> Result<T, PagerError> {
    let (sender, receiver) = channel();
    ask(Box::new(move |answer| drop(sender.send(answer))));
    receiver.recv_timeout(DEADLINE).unwrap()
}

fn hold(served: &Served) -> Result<(), PagerError> {
    answer(|deliver| served.pager.hold(served.id, deliver))
}

fn resume(served: &Served, source: Option<Arc<dyn PageSource>>) -> Result<(), PagerError> {
    answer(|deliver| served.pager.resume(served.id, source, deliver))
}

#[test]
fn faults_of_a_source_that_fails_are_held_and_all_are_answered_when_it_is_resumed() {
    for swapped in [false, true] {
        let bytes = image(PAGES);
        let source = Failing::new(&bytes);
        let Some(served) = held(Arc::<Failing>::clone(&source), HOLD) else { return };
        let waiting: Vec<Reading> = (0..PAGES).map(|page| reading(&served.mapping, page)).collect();
        let again = reading(&served.mapping, 3);

        let hold = told(&served);
        let failure = hold.failure.expect("why it is held");
        assert_eq!(failure.reason, EndReason::SourceFailed);
        assert!(failure.error.is_some() && hold.until.is_none() && !hold.asks);
        served.until("its faults", |stats| stats.faults >= PAGES as u64);
        assert!(waiting.iter().chain([&again]).all(|answer| answer.try_recv().is_err()));

        source.fails.store(swapped, Ordering::SeqCst);
        let other: Option<Arc<dyn PageSource>> = swapped.then(|| Arc::new(Bytes(bytes.clone())) as _);
        resume(&served, other).unwrap();

        for (page, answer) in waiting.iter().enumerate() {
            assert!(finish(answer).unwrap() == page_of(&bytes, page), "page {page}");
        }
        finish(&again).unwrap();
        served.close();
        assert_eq!(served.info.stats.snapshot().pages_poisoned, 0);
    }
}

#[test]
fn a_session_that_fails_again_is_held_again() {
    let bytes = image(PAGES);
    let source = Failing::new(&bytes);
    let Some(served) = held(Arc::<Failing>::clone(&source), HOLD) else { return };
    let waiting = reading(&served.mapping, 1);
    for _ in 0..3 {
        told(&served);
        resume(&served, None).unwrap();
    }
    told(&served);
    source.fails.store(false, Ordering::SeqCst);
    resume(&served, None).unwrap();
    assert!(finish(&waiting).unwrap() == page_of(&bytes, 1));
    served.close();
}

#[test]
fn what_is_discarded_while_it_is_held_reads_zero_when_it_goes_on() {
    let bytes = image(PAGES);
    let source = Failing::new(&bytes);
    let Some(served) = held(Arc::<Failing>::clone(&source), HOLD) else { return };
    let waiting: Vec<Reading> = (0..4).map(|page| reading(&served.mapping, page)).collect();
    told(&served);
    served.until("its faults", |stats| stats.faults >= 4);

    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(2 * PAGE, 4 * PAGE).unwrap()));
    source.fails.store(false, Ordering::SeqCst);
    resume(&served, None).unwrap();

    for (page, answer) in waiting.iter().enumerate() {
        let expected = if page < 2 { page_of(&bytes, page) } else { &[0; PAGE] };
        assert!(finish(answer).unwrap() == expected, "page {page}");
    }
    assert!(read(&served.mapping, 4 * PAGE, 2 * PAGE) == [0; 2 * PAGE]);
    assert!(read(&served.mapping, 6 * PAGE, PAGE) == page_of(&bytes, 6));
    served.close();
}

#[test]
fn memory_that_moves_while_it_is_held_is_served_where_it_is_then() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let bytes = image(PAGES);
    let area = Area::new(Made::Private, PAGES);
    let to = Area::reserve(PAGE, PAGES);
    register(&uffd, area, uffd::Modes::MISSING);
    let source = Failing::new(&bytes);
    let serving = serve_area(uffd, area, Arc::<Failing>::clone(&source), page_by_page(HOLD));
    let waiting = area.part(5, 1).peek();
    serving.until("a fault", |stats| stats.faults > 0);
    answer(|deliver| serving.pager.hold(serving.id, deliver)).unwrap();

    area.part(8, 8).remap(to.part(0, 8), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    source.fails.store(false, Ordering::SeqCst);
    answer(|deliver| serving.pager.resume(serving.id, None, deliver)).unwrap();

    assert!(finish(&waiting).unwrap() == page_of(&bytes, 5));
    assert!(to.part(0, 8).read() == bytes[8 * PAGE..]);
    serving.close(Rest::Zero);
}

#[test]
fn bytes_of_the_failed_source_that_come_late_are_never_installed() {
    let bytes = image(PAGES);
    let old = Gated::new(vec![0xaa; PAGES * PAGE]);
    let shut = old.shut();
    let Some(served) = serve(
        Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap(),
        Arc::<Gated>::clone(&old),
        |options| {
            page_by_page(HOLD)(options);
            options.source_timeout = Duration::from_millis(50);
        },
    ) else {
        return;
    };
    let waiting: Vec<Reading> = (0..4).map(|page| reading(&served.mapping, page)).collect();
    assert_eq!(told(&served).failure.unwrap().reason, EndReason::Stalled);
    served.until("its faults", |stats| stats.faults >= 4);

    // The same pages are being read of both at the same time.
    let new = Gated::new(bytes.clone());
    let new_shut = new.shut();
    resume(&served, Some(Arc::<Gated>::clone(&new))).unwrap();
    drop(shut);
    // Nobody has it any more: what it brought has come, and gone.
    let deadline = Instant::now() + DEADLINE;
    while Arc::strong_count(&old) > 1 {
        assert!(Instant::now() < deadline, "a read that was given up is kept");
        std::thread::yield_now();
    }
    assert!(waiting.iter().all(|answer| answer.try_recv().is_err()));
    drop(new_shut);

    for (page, answer) in waiting.iter().enumerate() {
        match finish(answer) {
            Ok(page_bytes) => assert!(page_bytes == page_of(&bytes, page), "page {page}"),
            Err(error) => panic!("{error}"),
        }
    }
    served.close();
}

#[test]
fn a_failure_from_before_it_was_resumed_does_not_hold_it_again() {
    let bytes = image(PAGES);
    let (source, fail) = FailingLate::new(&bytes);
    let Some(served) = held(Arc::<FailingLate>::clone(&source), HOLD) else { return };
    let waiting = reading(&served.mapping, 3);
    let deadline = Instant::now() + DEADLINE;
    while source.reads.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "nothing is read");
        std::thread::yield_now();
    }

    resume(&served, None).unwrap();
    fail.send(()).unwrap();

    assert!(finish(&waiting).unwrap() == page_of(&bytes, 3));
    assert!(read(&served.mapping, 0, PAGES * PAGE) == bytes);
    served.close();
}

#[test]
fn a_held_session_is_closed_as_its_owner_says() {
    for rest in [Rest::Poison, Rest::Populate, Rest::Zero] {
        let bytes = image(PAGES);
        let source = Failing::new(&bytes);
        let Some(served) = held(Arc::<Failing>::clone(&source), HOLD) else { return };
        let waiting = reading(&served.mapping, 3);
        told(&served);

        source.fails.store(rest != Rest::Populate, Ordering::SeqCst);
        served.pager.close_session(served.id, rest);

        let end = served.end();
        assert_eq!(end.reason, EndReason::Closed);
        // Why it was held is not forgotten.
        assert!(end.error.is_some());
        match (rest, finish(&waiting)) {
            (Rest::Poison, Err(_)) => {}
            (Rest::Populate, Ok(page)) => assert!(page == page_of(&bytes, 3)),
            (Rest::Zero, Ok(page)) => assert!(page == [0; PAGE]),
            (_, other) => panic!("{rest:?}: {other:?}"),
        }
    }
}

#[test]
fn a_source_that_still_fails_while_a_held_session_is_populated_ends_in_poison() {
    let bytes = image(PAGES);
    let Some(served) = held(Failing::new(&bytes), HOLD) else { return };
    let waiting = reading(&served.mapping, 3);
    told(&served);

    served.pager.close_session(served.id, Rest::Populate);

    assert!(finish(&waiting).is_err());
    served.end();
}

#[test]
fn a_session_held_on_purpose_answers_nothing_and_loses_nothing() {
    let bytes = image(PAGES);
    let Some(served) = held(Arc::new(Bytes(bytes.clone())), FailurePolicy::Poison) else { return };
    assert!(read(&served.mapping, 0, PAGE) == page_of(&bytes, 0));
    hold(&served).unwrap();
    assert!(told(&served).failure.is_none());
    let waiting = reading(&served.mapping, 1);
    served.until("its faults", |stats| stats.faults >= 2);
    assert!(waiting.recv_timeout(Duration::from_millis(50)).is_err());
    // What is there is there.
    assert!(read(&served.mapping, 0, PAGE) == page_of(&bytes, 0));

    resume(&served, None).unwrap();
    // Again is fine.
    resume(&served, None).unwrap();

    assert!(finish(&waiting).unwrap() == page_of(&bytes, 1));
    served.close();
    assert!(matches!(hold(&served), Err(PagerError::SessionOver)));
    assert!(matches!(resume(&served, None), Err(PagerError::SessionOver)));
}

#[test]
fn a_source_that_is_too_short_is_refused_and_the_session_is_held_on() {
    let bytes = image(PAGES);
    let Some(served) = held(Failing::new(&bytes), HOLD) else { return };
    let waiting = reading(&served.mapping, 1);
    told(&served);

    let short = Arc::new(Bytes(bytes[..PAGES * PAGE - 1].to_vec()));
    assert_eq!(resume(&served, Some(short)).unwrap_err().code(), "ERR_UFFD_PROTOCOL");
    assert!(waiting.recv_timeout(Duration::from_millis(20)).is_err());

    resume(&served, Some(Arc::new(Bytes(bytes.clone())))).unwrap();
    assert!(finish(&waiting).unwrap() == page_of(&bytes, 1));
    served.close();
}

#[test]
fn a_hold_that_lasts_too_long_and_a_question_that_nobody_answers_end_in_poison() {
    let timeout = Duration::from_millis(50);
    for policy in [FailurePolicy::Hold { timeout: Some(timeout) }, FailurePolicy::Ask { timeout }] {
        let bytes = image(PAGES);
        let Some(served) = held(Failing::new(&bytes), policy) else { return };
        let since = Instant::now();
        let waiting = reading(&served.mapping, 1);
        let hold = told(&served);
        assert_eq!(hold.asks, matches!(policy, FailurePolicy::Ask { .. }));
        assert!(hold.until.is_some());

        assert!(finish(&waiting).is_err());
        assert!(since.elapsed() >= timeout);
        assert_eq!(served.end().reason, EndReason::SourceFailed);
        // Too late.
        served.pager.decide(served.id, HOLD);
    }
}

#[test]
fn who_is_asked_decides() {
    let ask = FailurePolicy::Ask { timeout: DEADLINE };
    let bytes = image(PAGES);
    let Some(served) = held(Failing::new(&bytes), ask) else { return };
    let waiting = reading(&served.mapping, 1);
    assert!(told(&served).asks);
    served.pager.decide(served.id, FailurePolicy::Poison);
    assert!(finish(&waiting).is_err());
    assert_eq!(served.end().reason, EndReason::SourceFailed);

    let source = Failing::new(&bytes);
    let Some(served) = held(Arc::<Failing>::clone(&source), ask) else { return };
    let waiting = reading(&served.mapping, 1);
    assert!(told(&served).asks);
    served.pager.decide(served.id, HOLD);
    // From now on it is held, and that is told.
    let hold = told(&served);
    assert!(!hold.asks && hold.until.is_none() && hold.failure.is_some());
    served.pager.decide(served.id, FailurePolicy::Poison);
    source.fails.store(false, Ordering::SeqCst);
    resume(&served, None).unwrap();
    assert!(finish(&waiting).unwrap() == page_of(&bytes, 1));
    served.close();
}

#[test]
fn a_held_session_whose_pager_ends_is_poisoned() {
    let bytes = image(PAGES);
    let Some(served) = held(Failing::new(&bytes), HOLD) else { return };
    let waiting = reading(&served.mapping, 1);
    told(&served);
    let Served { pager, .. } = served;

    drop(pager);

    assert!(finish(&waiting).is_err());
}

#[test]
fn a_held_session_costs_no_time() {
    alone::alone("a_held_session_costs_no_time", Duration::from_secs(60), || {
        let bytes = image(PAGES);
        let Some(served) = held(Failing::new(&bytes), HOLD) else { return };
        let waiting: Vec<Reading> = (0..PAGES).map(|page| reading(&served.mapping, page)).collect();
        told(&served);
        served.until("its faults", |stats| stats.faults >= PAGES as u64);
        let before = busy();
        std::thread::sleep(Duration::from_millis(300));
        let used = busy().saturating_sub(before);
        assert!(used < Duration::from_millis(30), "{used:?} in 300 ms");
        served.pager.close_session(served.id, Rest::Poison);
        assert!(waiting.iter().all(|answer| finish(answer).is_err()));
    });
}

/// Processor time of this process.
fn busy() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let of =
        |time: nix::sys::time::TimeVal| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
    of(usage.user_time()) + of(usage.system_time())
}
