//! Replaying what an earlier run wanted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};

use pager::{
    Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, Replay, Rest, SessionOptions,
    Trace, TraceEnd, TraceFault, TraceHeader, TraceKind, WorkingSet,
};
use uffd::{Mapping, MappingKind, Modes, Residency};

use support::area::Gated;
use support::{Bytes, DEADLINE, PAGE, Served, elsewhere, finish, image, read, serve, told, uffd};

const PAGES: usize = 1024;

/// A recording of a run that wanted these pages, one after the other.
fn recorded(source: &Arc<dyn PageSource>, pages: impl IntoIterator<Item = usize>) -> Trace {
    let fault = |(nth, page): (usize, usize)| TraceFault {
        time_ns: nth as u64 * 1000,
        kind: TraceKind::Missing,
        write: false,
        page: page as u64,
        before: 0,
        pages: 1,
        latency_ns: 1000,
    };
    Trace {
        header: TraceHeader::of(source, PAGE as u32).unwrap(),
        faults: pages.into_iter().enumerate().map(fault).collect(),
        end: TraceEnd::Complete,
        dropped: 0,
    }
}

/// Serves memory page by page, and replays a run that wanted these pages.
fn replaying(source: Arc<dyn PageSource>, pages: &[usize], hold_back: bool) -> Option<Served> {
    let trace = recorded(&source, pages.iter().copied());
    replaying_by(source, &trace, hold_back, Some(PAGE as u64))
}

/// Serves memory by windows of this size, and replays a recording of a source that may not be read any more.
fn replaying_by(
    source: Arc<dyn PageSource>,
    trace: &Trace,
    hold_back: bool,
    window: Option<u64>,
) -> Option<Served> {
    serve(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap(), source, |options| {
        options.window = window;
        options.working_set.replay = Some(Arc::new(Replay::new(trace, hold_back)));
    })
}

fn replayed(served: &Served) -> Receiver<Result<(), PagerError>> {
    let (sender, answer) = channel();
    // A test that has ended wants no answer.
    served.pager.await_replay(served.id, Box::new(move |outcome| drop(sender.send(outcome))));
    answer
}

fn until_replayed(served: &Served) {
    replayed(served).recv_timeout(DEADLINE).unwrap().unwrap();
}

fn present(served: &Served) -> Vec<usize> {
    let states = served.mapping.residency(0, PAGES * PAGE).unwrap();
    (0..PAGES).filter(|&page| states[page] == Residency::Present).collect()
}

/// Every fourth page or so, in no order.
fn scattered() -> Vec<usize> {
    (0..PAGES).map(|nth| nth * 389 % PAGES).filter(|page| page * 7 % 4 == 1).collect()
}

#[test]
fn what_was_recorded_is_there_without_a_fault_and_nothing_else() {
    let bytes = image(PAGES);
    for at_hand in [true, false] {
        let source: Arc<dyn PageSource> =
            if at_hand { Arc::new(Bytes(bytes.clone())) } else { Gated::new(bytes.clone()) };
        let wanted = scattered();
        let Some(served) = replaying(source, &wanted, false) else { return };

        until_replayed(&served);

        let mut sorted = wanted.clone();
        sorted.sort_unstable();
        assert_eq!(present(&served), sorted);
        let counted = served.stats();
        assert_eq!((counted.faults, counted.replay_late, counted.replay_missed), (0, 0, 0));
        assert_eq!(
            (counted.replay_pages, counted.replay_installed),
            (wanted.len() as u64, wanted.len() as u64)
        );
        assert_eq!(counted.replay_done, 1);
        assert!(read(&served.mapping, 0, PAGES * PAGE) == bytes);
        assert_eq!(served.stats().replay_missed, (PAGES - wanted.len()) as u64);
        until_replayed(&served);
        served.close();
    }
}

#[test]
fn a_slow_source_is_asked_for_neighbours_together() {
    let wanted = scattered();
    let Some(served) = replaying(Gated::new(image(PAGES)), &wanted, false) else { return };

    until_replayed(&served);

    assert_eq!(served.stats().worker_reads, PAGES as u64 / 64, "one read for each block of 64 pages");
    served.close();
    // Those that are far apart are not.
    let Some(served) = replaying(Gated::new(image(PAGES)), &[0, 30, 63, 200], false) else { return };
    until_replayed(&served);
    assert_eq!((served.stats().worker_reads, present(&served)), (4, vec![0, 30, 63, 200]));
    served.close();
}

#[test]
fn faults_that_come_first_are_late_those_nobody_expected_are_missed_and_both_get_their_bytes() {
    let bytes = image(PAGES);
    let source = Gated::new(bytes.clone());
    let trace = recorded(&(Arc::<Gated>::clone(&source) as Arc<dyn PageSource>), 0..64);
    let gate = source.shut();
    let serving = replaying_by(Arc::<Gated>::clone(&source) as _, &trace, false, Some(PAGE as u64));
    let Some(served) = serving else { return };
    let waiting: Vec<_> = [5, 700]
        .map(|page| {
            let mapping = Arc::clone(&served.mapping);
            elsewhere(move || read(&mapping, page * PAGE, PAGE))
        })
        .into();
    served.until("both faults", |stats| stats.faults == 2 && stats.replay_late + stats.replay_missed == 2);
    drop(gate);

    assert!(finish(&waiting[0]) == bytes[5 * PAGE..6 * PAGE]);
    assert!(finish(&waiting[1]) == bytes[700 * PAGE..701 * PAGE]);
    until_replayed(&served);
    let counted = served.stats();
    assert_eq!((counted.replay_late, counted.replay_missed), (1, 1));
    assert_eq!(counted.replay_installed, 63, "all but the one that a fault brought");
    assert_eq!(present(&served), (0..64).chain([700]).collect::<Vec<_>>());
    served.close();
}

#[test]
fn what_was_given_back_while_it_was_read_stays_zero() {
    let bytes = image(PAGES);
    let source = Gated::new(bytes.clone());
    let trace = recorded(&(Arc::<Gated>::clone(&source) as Arc<dyn PageSource>), 0..64);
    let gate = source.shut();
    let serving = replaying_by(Arc::<Gated>::clone(&source) as _, &trace, false, None);
    let Some(served) = serving else { return };
    served.until("the read", |stats| stats.worker_reads == 1);
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(10 * PAGE, 5 * PAGE).unwrap()));
    drop(gate);

    until_replayed(&served);

    let mut expected = bytes[..64 * PAGE].to_vec();
    expected[10 * PAGE..15 * PAGE].fill(0);
    assert!(read(&served.mapping, 0, 64 * PAGE) == expected);
    assert_eq!(served.stats().replay_installed, 59);
    served.close();
}

/// A source of which one part never comes before it is let.
#[derive(Debug)]
struct Stuck {
    bytes: Vec<u8>,
    from: u64,
    open: Mutex<bool>,
    opened: Condvar,
}

impl PageSource for Stuck {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let mut open = self.open.lock().unwrap();
        while !*open && offset >= self.from {
            open = self.opened.wait(open).unwrap();
        }
        buffer.copy_from_slice(&self.bytes[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }
}

#[test]
fn a_fault_is_answered_however_many_reads_of_the_replay_are_stuck() {
    let bytes = image(PAGES);
    let opened = Condvar::new();
    let source =
        Arc::new(Stuck { bytes: bytes.clone(), from: 64 * PAGE as u64, open: Mutex::new(true), opened });
    let wanted: Vec<usize> = (1..PAGES / 32).map(|block| block * 32 + 70 % 32).collect();
    let trace = recorded(
        &(Arc::<Stuck>::clone(&source) as Arc<dyn PageSource>),
        wanted.iter().copied().filter(|&page| page >= 64),
    );
    *source.open.lock().unwrap() = false;
    let serving = replaying_by(Arc::<Stuck>::clone(&source) as _, &trace, false, Some(PAGE as u64));
    let Some(served) = serving else { return };
    served.until("as many reads as may be", |stats| stats.worker_reads == 16);

    assert!(read(&served.mapping, 3 * PAGE, PAGE) == bytes[3 * PAGE..4 * PAGE]);

    let early = replayed(&served);
    *source.open.lock().unwrap() = true;
    source.opened.notify_all();
    early.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(present(&served).len(), trace.faults.len() + 1);
    served.close();
}

#[test]
fn one_page_in_sixty_four_is_held_back_and_those_that_are_wanted_are_counted() {
    let bytes = image(PAGES);
    let all: Vec<usize> = (0..PAGES).collect();
    let Some(served) = replaying(Arc::new(Bytes(bytes.clone())), &all, true) else { return };
    until_replayed(&served);
    let held = served.stats().replay_held;

    assert_eq!(present(&served).len() as u64, PAGES as u64 - held);
    assert!((1..100).contains(&held), "about 16: {held}");
    assert!(read(&served.mapping, 0, PAGES / 2 * PAGE) == bytes[..PAGES / 2 * PAGE]);
    let half = served.stats().replay_held_faults;
    assert_eq!((served.stats().replay_late, served.stats().replay_missed), (0, 0));
    assert!(read(&served.mapping, PAGES / 2 * PAGE, PAGES / 2 * PAGE) == bytes[PAGES / 2 * PAGE..]);
    let counted = served.stats();
    assert!(half <= held && counted.replay_held_faults == held && counted.faults == held);
    assert_eq!(counted.replay_held_hidden, 0);
    served.close();
}

#[test]
fn a_page_held_back_that_a_neighbour_brings_along_tells_nothing() {
    let source: Arc<dyn PageSource> = Arc::new(Bytes(image(PAGES)));
    let trace = recorded(&source, 0..PAGES);
    let Some(served) = replaying_by(source, &trace, true, Some(2 << 20)) else { return };
    until_replayed(&served);

    // Windows bring runs of missing pages, and pages that are held back are rarely neighbours.
    read(&served.mapping, 0, PAGES * PAGE);

    let counted = served.stats();
    assert_eq!(counted.replay_held_faults + counted.replay_held_hidden, counted.replay_held);
    served.close();
}

#[test]
fn pages_are_found_by_their_place_in_the_image_wherever_the_memory_lies() {
    let Some(uffd) = uffd() else { return };
    let bytes = image(PAGES);
    let source: Arc<dyn PageSource> = Arc::new(Bytes(bytes.clone()));
    let trace = recorded(&source, [10, 600, 601, 900]);
    let mapping = Arc::new(Mapping::new(512 * PAGE, MappingKind::Private).unwrap());
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
    // The first half of the memory is the last quarter of the image, the second its first.
    let half = mapping.len() as u64 / 2;
    let regions = vec![
        Region { address: mapping.address(), len: half, source_offset: 768 * PAGE as u64 },
        Region { address: mapping.address() + half, len: half, source_offset: 0 },
    ];
    let working_set = WorkingSet { record: None, replay: Some(Arc::new(Replay::new(&trace, false))) };
    let options = SessionOptions {
        source_timeout: DEADLINE,
        working_set,
        ..SessionOptions::new(regions, PAGE as u64, source)
    };
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let id = pager.adopt(uffd, options, observer).unwrap();
    let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else {
        panic!("it did not start")
    };
    let served = Served { mapping, pager, id, info, notices };

    until_replayed(&served);

    let states = served.mapping.residency(0, 512 * PAGE).unwrap();
    let there: Vec<usize> = (0..512).filter(|&page| states[page] == Residency::Present).collect();
    assert_eq!(there, [900 - 768, 256 + 10]);
    assert!(read(&served.mapping, (900 - 768) * PAGE, PAGE) == bytes[900 * PAGE..901 * PAGE]);
    served.close();
}

#[test]
fn a_session_that_ends_before_tells_who_waits_and_one_that_replays_nothing_as_well() {
    let source = Gated::new(image(PAGES));
    let trace = recorded(&(Arc::<Gated>::clone(&source) as Arc<dyn PageSource>), 0..64);
    let gate = source.shut();
    let serving = replaying_by(Arc::<Gated>::clone(&source) as _, &trace, false, None);
    let Some(served) = serving else { return };
    let waiting = replayed(&served);
    served.pager.close_session(served.id, Rest::Zero);
    drop(gate);
    assert!(matches!(waiting.recv_timeout(DEADLINE).unwrap(), Err(PagerError::SessionOver)));
    served.end();

    let plain =
        serve(Mapping::new(PAGE, MappingKind::Private).unwrap(), Arc::new(Bytes(image(1))), |_| {}).unwrap();
    let refused = replayed(&plain).recv_timeout(DEADLINE).unwrap();
    assert!(matches!(refused, Err(PagerError::Unsupported(_))), "{refused:?}");
    plain.close();
}

#[test]
fn a_source_of_another_size_is_refused_before_anything_starts() {
    let Some(uffd) = uffd() else { return };
    let small: Arc<dyn PageSource> = Arc::new(Bytes(image(2)));
    let trace = recorded(&small, [1]);
    let source: Arc<dyn PageSource> = Arc::new(Bytes(image(4)));
    let working_set = WorkingSet { record: None, replay: Some(Arc::new(Replay::new(&trace, false))) };
    let options = SessionOptions {
        source_timeout: DEADLINE,
        working_set,
        ..SessionOptions::new(
            vec![Region { address: 1 << 30, len: PAGE as u64, source_offset: 0 }],
            PAGE as u64,
            source,
        )
    };

    let error = options.prepare(&uffd).err().unwrap();

    assert_eq!(error.code(), "ERR_UFFD_TRACE_IMAGE");
}
