//! Memory given back while it is being served: what was discarded reads zero, whatever was on its way, and nobody waits
//! for anybody.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pager::{PageSource, PagerError, ReadNow, Rest, StatsSnapshot};
use uffd::{Modes, Userfaultfd};

use support::area::{Area, Gated, Made, Serving, all_events, new_uffd, register, serve_area};
use support::huge::HugePages;
use support::{Bytes, PAGE, elsewhere, finish, image};

fn serving(
    made: Made,
    pages: usize,
    source: impl FnOnce(Vec<u8>) -> Arc<dyn PageSource>,
) -> Option<(Area, Vec<u8>, Serving)> {
    let uffd = new_uffd(all_events())?;
    let area = Area::new(made, pages);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(area.len() / PAGE);
    let served =
        serve_area(uffd, area, source(bytes.clone()), |options| options.window = Some(options.page_size));
    Some((area, bytes, served))
}

fn at_hand(bytes: Vec<u8>) -> Arc<dyn PageSource> {
    Arc::new(Bytes(bytes))
}

fn of(bytes: &[u8], area: Area, page: usize) -> &[u8] {
    &bytes[page * area.page..(page + 1) * area.page]
}

/// A source that holds the event loop up where it is asked for its first page: what is done meanwhile is read in one batch.
#[derive(Debug)]
struct Stalling {
    bytes: Vec<u8>,
    gate: Mutex<()>,
    /// Bytes from the start on that are held up.
    first: usize,
}

impl Stalling {
    fn shut(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap()
    }
}

impl PageSource for Stalling {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if (offset as usize) < self.first {
            drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let start = offset as usize;
        buffer.copy_from_slice(&self.bytes[start..start + buffer.len()]);
        Ok(())
    }
}

/// A session whose event loop is held up as soon as page 0 is touched; a second descriptor tells who waits.
struct Held {
    area: Area,
    bytes: Vec<u8>,
    source: Arc<Stalling>,
    served: Serving,
    watch: Userfaultfd,
}

fn held(made: Made, pages: usize) -> Option<Held> {
    use std::os::fd::AsFd;
    let uffd = new_uffd(all_events())?;
    let watch = Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let area = Area::new(made, pages);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(area.len() / PAGE);
    let source = Arc::new(Stalling { bytes: bytes.clone(), gate: Mutex::new(()), first: area.page });
    let served = serve_area(uffd, area, Arc::<Stalling>::clone(&source), |options| {
        options.window = Some(options.page_size);
    });
    Some(Held { area, bytes, source, served, watch })
}

impl Held {
    /// Waits until so many faults wait to be read.
    fn until_pending(&self, count: u64) {
        let deadline = std::time::Instant::now() + support::DEADLINE;
        while self.watch.waiting().unwrap().pending != count {
            assert!(std::time::Instant::now() < deadline, "{:?}", self.watch.waiting());
            std::thread::yield_now();
        }
    }

    /// Begins to discard a page, and waits until that waits for the pager.
    fn discarding(&self, page: usize, made: Made) -> std::sync::mpsc::Receiver<()> {
        let area = self.area.part(page, 1);
        support::held_up(move || area.discard_here(made))
    }
}

fn states_after_removing(made: Made) {
    let Some((area, bytes, served)) = serving(made, 6, at_hand) else { return };
    let counts = |stats: StatsSnapshot| (stats.pages_installed, stats.pages_zeroed, stats.pages_removed);
    // One that was there, one that was not.
    assert!(area.part(1, 1).read() == of(&bytes, area, 1));
    area.part(1, 2).discard(made);
    served.until("both are taken note of", |stats| stats.pages_removed == 2);

    assert!(area.part(0, 1).read() == of(&bytes, area, 0));
    assert!(area.part(3, 1).read() == of(&bytes, area, 3));
    assert!(area.part(1, 2).is_zero());
    served.until("exactly those", |stats| counts(stats) == (3, 2, 2));

    // Again, after it faulted as zeros and was written to.
    area.part(1, 1).write(b"written!");
    area.part(1, 1).discard(made);
    assert!(area.part(1, 1).is_zero());
    served.until("each time", |stats| counts(stats) == (3, 3, 3));
    served.close(Rest::Poison);
}

#[test]
fn discarding_makes_exactly_the_pages_of_its_range_zero() {
    states_after_removing(Made::Private);
    states_after_removing(Made::Shared);
}

#[test]
fn discarding_makes_exactly_the_huge_pages_of_its_range_zero() {
    let Some(_pool) = HugePages::reserve(8) else { return };
    states_after_removing(Made::Huge);
}

fn discarding_waits_for_the_pager(made: Made) {
    let Some(held) = held(made, 3) else { return };
    let area = held.area;
    let shut = held.source.shut();
    let first = area.part(0, 1).peek();
    held.served.until("the pager is held up", |stats| stats.faults == 1);
    let before = held.served.stats();

    let done = held.discarding(1, made);
    assert!(done.try_recv().is_err(), "nothing is discarded before its event is read");
    drop(shut);

    finish(&done);
    assert!(finish(&first).unwrap() == of(&held.bytes, area, 0));
    assert_eq!(held.served.stats().faults, before.faults, "no fault comes of it by itself");
    area.part(1, 1).write(b"written!");
    assert_eq!(&area.part(1, 1).read()[..9], b"written!\0");
    held.served.close(Rest::Poison);
}

#[test]
fn discarding_waits_until_the_pager_has_read_of_it_and_writing_then_finds_zeros() {
    discarding_waits_for_the_pager(Made::Private);
}

#[test]
fn discarding_huge_pages_waits_until_the_pager_has_read_of_it_and_writing_then_finds_zeros() {
    let Some(_pool) = HugePages::reserve(5) else { return };
    discarding_waits_for_the_pager(Made::Huge);
}

fn removal_goes_before_the_faults_of_its_batch(made: Made) {
    let Some(held) = held(made, 4) else { return };
    let area = held.area;
    let shut = held.source.shut();
    let first = area.part(0, 1).peek();
    held.served.until("the pager is held up", |stats| stats.faults == 1);
    // The faults come first, and are read first: on the page that goes, and on another.
    let (gone, other) = (area.part(1, 1).peek(), area.part(2, 1).peek());
    held.until_pending(2);
    let done = held.discarding(1, made);
    drop(shut);

    finish(&done);
    assert!(finish(&first).unwrap() == of(&held.bytes, area, 0));
    assert!(finish(&gone).unwrap().iter().all(|&byte| byte == 0));
    assert!(finish(&other).unwrap() == of(&held.bytes, area, 2));
    assert!(area.part(3, 1).read() == of(&held.bytes, area, 3));
    held.served.until("each once", |stats| (stats.pages_installed, stats.pages_removed) == (3, 1));
    held.served.close(Rest::Poison);
}

#[test]
fn a_removal_is_applied_before_the_faults_that_were_read_with_it() {
    removal_goes_before_the_faults_of_its_batch(Made::Private);
}

#[test]
fn a_removal_of_a_huge_page_is_applied_before_the_faults_that_were_read_with_it() {
    let Some(_pool) = HugePages::reserve(6) else { return };
    removal_goes_before_the_faults_of_its_batch(Made::Huge);
}

fn a_write_that_waits(made: Made) {
    let Some(held) = held(made, 3) else { return };
    let area = held.area;
    let shut = held.source.shut();
    let first = area.part(0, 1).peek();
    held.served.until("the pager is held up", |stats| stats.faults == 1);
    let writing = elsewhere(move || area.part(1, 1).write(b"written!"));
    held.until_pending(1);
    let done = held.discarding(1, made);
    drop(shut);

    finish(&done);
    finish(&writing);
    finish(&first).unwrap();
    // The kernel may discard the page before or after the write reaches it; the rest of the page is zero either way.
    let found = area.part(1, 1).read();
    assert!(found[..8] == *b"written!" || found[..8] == [0; 8]);
    assert!(found[8..].iter().all(|&byte| byte == 0));
    // Whatever became of that write, none that comes after the discarding is lost.
    area.part(1, 1).write(b"and then");
    assert_eq!(&area.part(1, 1).read()[..8], b"and then");
    held.served.close(Rest::Poison);
}

#[test]
fn a_write_that_waits_while_its_page_is_discarded_finds_zeros_and_never_the_source() {
    a_write_that_waits(Made::Private);
}

#[test]
fn a_write_that_waits_while_its_huge_page_is_discarded_finds_zeros_and_never_the_source() {
    let Some(_pool) = HugePages::reserve(5) else { return };
    a_write_that_waits(Made::Huge);
}

fn stale_bytes_are_not_installed(made: Made) {
    let mut gate = None;
    let Some((area, bytes, served)) = serving(made, 4, |bytes| {
        let source = Gated::new(bytes);
        gate = Some(Arc::clone(&source));
        source
    }) else {
        return;
    };
    let source = gate.unwrap();
    let shut = source.shut();
    let (gone, other) = (area.part(1, 1).peek(), area.part(2, 1).peek());
    served.until("both reads have begun", |stats| stats.worker_reads == 2);

    // Returns while the reads are under way: it waits for nobody but the event loop.
    area.part(1, 1).discard(made);
    drop(shut);

    assert!(finish(&gone).unwrap().iter().all(|&byte| byte == 0));
    assert!(finish(&other).unwrap() == of(&bytes, area, 2));
    served.until("one of each", |stats| (stats.pages_installed, stats.pages_zeroed) == (1, 1));
    served.close(Rest::Poison);
}

#[test]
fn bytes_that_were_read_before_their_page_was_discarded_are_not_installed() {
    stale_bytes_are_not_installed(Made::Private);
    stale_bytes_are_not_installed(Made::Shared);
}

#[test]
fn bytes_that_were_read_before_their_huge_page_was_discarded_are_not_installed() {
    let Some(_pool) = HugePages::reserve(6) else { return };
    stale_bytes_are_not_installed(Made::Huge);
}
