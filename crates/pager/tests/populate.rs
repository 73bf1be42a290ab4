//! Bringing pages that no fault has asked for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "one range of pages, not its numbers")]

mod support;

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pager::{EndReason, PageSource, PagerError, PopulateOptions, Rest};
use uffd::{Mapping, MappingKind, Residency};

use support::area::Gated;
use support::{Bytes, DEADLINE, PAGE, Served, elsewhere, finish, image, read, serve};

const PAGES: usize = 256;

fn serve_pages(source: Arc<dyn PageSource>) -> Option<Served> {
    serve(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap(), source, |_| {})
}

/// Asks for pages, or for all.
fn populate(
    served: &Served,
    request: u64,
    pages: &[Range<usize>],
    rate: Option<u64>,
) -> Receiver<Result<(), PagerError>> {
    let place = |page: usize| served.mapping.address() + (page * PAGE) as u64;
    let ranges: Vec<_> = pages.iter().map(|pages| place(pages.start)..place(pages.end)).collect();
    let options = PopulateOptions { ranges: Some(ranges).filter(|ranges| !ranges.is_empty()), rate };
    let (sender, answer) = channel();
    // A test that has ended wants no answer.
    let deliver = Box::new(move |outcome| drop(sender.send(outcome)));
    served.pager.populate(served.id, request, options, deliver);
    answer
}

fn present(served: &Served) -> Vec<usize> {
    let states = served.mapping.residency(0, PAGES * PAGE).unwrap();
    (0..PAGES).filter(|&page| states[page] == Residency::Present).collect()
}

#[test]
fn what_is_asked_for_is_there_when_that_is_told_and_nothing_else() {
    let bytes = image(PAGES);
    for at_hand in [true, false] {
        let source: Arc<dyn PageSource> =
            if at_hand { Arc::new(Bytes(bytes.clone())) } else { Gated::new(bytes.clone()) };
        let Some(served) = serve_pages(source) else { return };

        populate(&served, 1, &[200..203, 17..40], None).recv_timeout(DEADLINE).unwrap().unwrap();

        assert_eq!(present(&served), (17..40).chain(200..203).collect::<Vec<_>>());
        populate(&served, 2, &[], None).recv_timeout(DEADLINE).unwrap().unwrap();
        assert_eq!(present(&served).len(), PAGES);
        let stats = served.info.stats.snapshot();
        assert_eq!((stats.faults, stats.pages_prefetched), (0, PAGES as u64));
        assert!(read(&served.mapping, 0, PAGES * PAGE) == bytes);
        served.close();
    }
}

#[test]
fn what_was_given_back_stays_zero() {
    let bytes = image(PAGES);
    let Some(served) = serve_pages(Arc::new(Bytes(bytes.clone()))) else { return };
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(30 * PAGE, 5 * PAGE).unwrap()));

    populate(&served, 1, &[], None).recv_timeout(DEADLINE).unwrap().unwrap();

    assert_eq!(present(&served).len(), PAGES - 5);
    let mut expected = bytes;
    expected[30 * PAGE..35 * PAGE].fill(0);
    assert!(read(&served.mapping, 0, PAGES * PAGE) == expected);
    served.close();
}

#[test]
fn no_more_comes_in_a_time_than_the_rate_allows() {
    let Some(served) = serve_pages(Arc::new(Bytes(image(PAGES)))) else { return };
    let started = Instant::now();

    // One MiB at four MiB a second, a sixty-fourth of that at a time: all but the last piece is waited for.
    let slow = populate(&served, 1, &[], Some(4 << 20));
    // A fault is not held up by that, nor is another request, nor the answer to it.
    read(&served.mapping, (PAGES - 1) * PAGE, 1);
    populate(&served, 2, &[128..130], None).recv_timeout(DEADLINE).unwrap().unwrap();
    assert!(slow.try_recv().is_err(), "the slow one has not ended");
    slow.recv_timeout(DEADLINE).unwrap().unwrap();

    assert!(started.elapsed() >= Duration::from_millis(120), "{:?}", started.elapsed());
    assert_eq!(present(&served).len(), PAGES);
    served.close();
}

#[test]
fn a_request_that_is_given_up_or_whose_session_ends_is_told() {
    let source = Gated::new(image(PAGES));
    let Some(served) = serve_pages(Arc::<Gated>::clone(&source)) else { return };
    let gate = source.shut();
    let (first, second) = (populate(&served, 1, &[], None), populate(&served, 2, &[0..16], None));

    served.pager.cancel_populate(served.id, 1);
    assert!(matches!(first.recv_timeout(DEADLINE).unwrap(), Err(PagerError::SessionOver)));
    assert!(second.try_recv().is_err(), "the other goes on");
    served.pager.close_session(served.id, Rest::Zero);
    drop(gate);

    assert!(matches!(second.recv_timeout(DEADLINE).unwrap(), Err(PagerError::SessionOver)));
    assert_eq!(served.end().reason, EndReason::Closed);
    let late = populate(&served, 3, &[], None);
    assert!(matches!(late.recv_timeout(DEADLINE).unwrap(), Err(PagerError::SessionOver)));
}

#[test]
fn what_cannot_be_asked_for_is_refused_and_changes_nothing() {
    let source = Gated::new(image(PAGES));
    let Some(served) = serve_pages(Arc::<Gated>::clone(&source)) else { return };

    let elsewhere = populate(&served, 1, &[3..4, PAGES..PAGES + 1], None);
    let refusal = elsewhere.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(refusal, Err(PagerError::Region { index: 1, .. })), "{refusal:?}");
    assert_eq!(present(&served), [0; 0]);

    let gate = source.shut();
    let waiting: Vec<_> = (0..64).map(|request| populate(&served, request, &[0..1], None)).collect();
    let refusal = populate(&served, 64, &[0..1], None).recv_timeout(DEADLINE).unwrap();
    assert!(matches!(refusal, Err(PagerError::Exhausted(_))), "{refusal:?}");
    drop(gate);
    for one in waiting {
        one.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    served.close();
}
