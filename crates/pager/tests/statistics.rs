//! What a session counts and measures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pager::{Histogram, Latencies, Rest};
use uffd::{Mapping, MappingKind};

use support::area::Gated;
use support::{Bytes, PAGE, Served, elsewhere, finish, image, read, serve};

const PAGES: usize = 64;

/// One page is installed for each fault.
fn serve_pages(source: Arc<dyn pager::PageSource>) -> Option<Served> {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    serve(mapping, source, |options| options.window = Some(PAGE as u64))
}

fn latencies(served: &Served) -> Latencies {
    served.info.stats.latencies()
}

/// How many took at least so long, as far as buckets tell.
fn at_least(histogram: &Histogram, time: Duration) -> u64 {
    let below =
        |bucket: usize| Histogram::bound(bucket).is_some_and(|bound| u128::from(bound) <= time.as_nanos());
    histogram.counts.iter().enumerate().filter(|&(bucket, _)| !below(bucket)).map(|(_, count)| count).sum()
}

#[test]
fn every_fault_has_its_turn_its_read_and_its_installing_measured_once() {
    let Some(served) = serve_pages(Arc::new(Bytes(image(PAGES)))) else { return };

    read(&served.mapping, 0, PAGES * PAGE);
    served.close();

    let (stats, measured) = (served.info.stats.snapshot(), latencies(&served));
    assert!(stats.faults >= PAGES as u64, "{stats:?}");
    assert_eq!(measured.queue.count(), stats.faults);
    assert_eq!(measured.source.count(), stats.windows);
    assert_eq!(measured.install.count(), stats.windows);
    assert!(measured.source.sum_ns > 0 && measured.install.sum_ns > 0);
    assert!(measured.source.sum_ns + measured.install.sum_ns <= stats.busy_ns, "both are parts of it");
    assert_eq!((measured.prefetch_source.count(), measured.prefetch_install.count()), (0, 0));
    assert_eq!(stats.pages_prefetched, 0);
}

#[test]
fn a_source_that_takes_its_time_is_seen_in_its_histogram_and_in_no_other() {
    const SLOW: Duration = Duration::from_millis(40);
    let source = Gated::new(image(PAGES));
    let Some(served) = serve_pages(Arc::<Gated>::clone(&source)) else { return };

    let gate = source.shut();
    let mapping = Arc::clone(&served.mapping);
    let reader = elsewhere(move || read(&mapping, 0, PAGE));
    while served.info.stats.snapshot().worker_reads == 0 {
        thread::yield_now();
    }
    // The time itself is what is measured.
    thread::sleep(SLOW);
    drop(gate);
    finish(&reader);
    served.close();

    let measured = latencies(&served);
    assert_eq!(at_least(&measured.source, SLOW), 1, "{:?}", measured.source);
    assert!(u128::from(measured.source.sum_ns) >= SLOW.as_nanos());
    assert_eq!((measured.queue.count(), measured.install.count()), (1, 1));
    assert_eq!(measured.prefetch_source.count(), 0);
}

#[test]
fn what_is_brought_without_a_fault_is_told_apart() {
    for at_hand in [true, false] {
        let source: Arc<dyn pager::PageSource> =
            if at_hand { Arc::new(Bytes(image(PAGES))) } else { Gated::new(image(PAGES)) };
        let Some(served) = serve_pages(source) else { return };
        read(&served.mapping, 0, 1);

        served.pager.close_session(served.id, Rest::Populate);
        served.end();

        let (stats, measured) = (served.info.stats.snapshot(), latencies(&served));
        assert_eq!(stats.pages_prefetched, PAGES as u64 - 1, "{stats:?}");
        assert_eq!((measured.source.count(), measured.install.count()), (1, 1), "the fault's own");
        assert_eq!(measured.prefetch_source.count(), PAGES as u64 - 1);
        assert_eq!(measured.prefetch_install.count(), PAGES as u64 - 1);
    }
}
