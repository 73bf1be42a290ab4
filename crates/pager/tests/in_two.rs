//! What is brought ahead by two threads is as right as what one brings.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread::available_parallelism;
use std::time::Instant;

use pager::{EndReason, PageSource, PagerError, PopulateOptions, ReadNow};
use uffd::{Mapping, MappingKind};

use support::{DEADLINE, PAGE, Served, elsewhere, finish, image, read, serve};

const PAGES: usize = 8192;
const ZEROS: Range<usize> = 3000..3100;

/// An image that counts what is read of it at once by which thread.
#[derive(Debug)]
struct Watched {
    bytes: Vec<u8>,
    /// Pages that are not at hand.
    cold: Range<usize>,
    /// A page that cannot be read.
    broken: Option<usize>,
    by_the_other: AtomicUsize,
}

impl Watched {
    fn new(cold: Range<usize>, broken: Option<usize>) -> Arc<Self> {
        let mut bytes = image(PAGES);
        bytes[ZEROS.start * PAGE..ZEROS.end * PAGE].fill(0);
        Arc::new(Self { bytes, cold, broken, by_the_other: AtomicUsize::new(0) })
    }

    /// Whether the other thread has read any of it. Where there is one CPU it never does.
    fn was_read_by_two(&self) -> bool {
        self.by_the_other.load(Ordering::Relaxed) > 0 || available_parallelism().unwrap().get() < 2
    }
}

impl PageSource for Watched {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        let (first, end) = (offset as usize / PAGE, (offset as usize + buffer.len()) / PAGE);
        if std::thread::current().name() == Some("uffd-hand") {
            self.by_the_other.fetch_add(1, Ordering::Relaxed);
        }
        if first < self.cold.end && self.cold.start < end {
            return Ok(ReadNow::WouldBlock);
        }
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let start = offset as usize;
        let pages = start / PAGE..(start + buffer.len()) / PAGE;
        if self.broken.is_some_and(|page| pages.contains(&page)) {
            return Err(PagerError::Internal("a broken page".to_owned()));
        }
        buffer.copy_from_slice(&self.bytes[start..start + buffer.len()]);
        Ok(())
    }
}

fn populate(served: &Served) -> Result<(), PagerError> {
    let (sender, answer) = channel();
    let deliver = Box::new(move |outcome| drop(sender.send(outcome)));
    served.pager.populate(served.id, 1, PopulateOptions::default(), deliver);
    answer.recv_timeout(DEADLINE).unwrap()
}

/// Serves new memory from new sources until the other thread has had a part in it, which a busy machine may keep it from.
fn until_two_have_read(cold: Range<usize>, broken: Option<usize>, act: impl Fn(&Served, &Watched)) {
    let begun = Instant::now();
    loop {
        let source = Watched::new(cold.clone(), broken);
        let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
        let Some(served) = serve(mapping, Arc::<Watched>::clone(&source), |_| {}) else { return };
        act(&served, &source);
        if source.was_read_by_two() {
            return;
        }
        assert!(begun.elapsed() < DEADLINE * 6, "the other thread never came to anything");
    }
}

#[test]
fn two_threads_bring_every_page_once() {
    until_two_have_read(5000..5040, None, |served, source| {
        populate(served).unwrap();

        assert!(read(&served.mapping, 0, PAGES * PAGE) == source.bytes);
        let stats = served.info.stats.snapshot();
        assert_eq!((stats.faults, stats.pages_prefetched), (0, PAGES as u64));
        assert_eq!(stats.pages_installed + stats.pages_zero, PAGES as u64);
        assert!(stats.pages_zero >= (ZEROS.len() - 32) as u64, "{}", stats.pages_zero);
        served.close();
    });
}

#[test]
fn what_is_given_back_while_two_threads_bring_stays_zero() {
    until_two_have_read(0..0, None, |served, source| {
        let (mapping, over) = (Arc::clone(&served.mapping), Arc::new(AtomicBool::new(false)));
        let ended = Arc::clone(&over);
        let discarding = elsewhere(move || {
            let (mut random, mut discarded) = (1_u64, Vec::new());
            while !ended.load(Ordering::Relaxed) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let page = (random >> 33) as usize % PAGES;
                mapping.discard(page * PAGE, PAGE).unwrap();
                discarded.push(page);
            }
            discarded
        });
        populate(served).unwrap();
        over.store(true, Ordering::Relaxed);
        let mut expected = source.bytes.clone();
        for page in finish(&discarding) {
            expected[page * PAGE..(page + 1) * PAGE].fill(0);
        }

        assert!(read(&served.mapping, 0, PAGES * PAGE) == expected);
        served.close();
    });
}

#[test]
fn what_neither_of_two_threads_can_read_ends_the_session() {
    until_two_have_read(0..0, Some(PAGES - 1), |served, _| {
        assert!(matches!(populate(served), Err(PagerError::SessionOver)));
        assert_eq!(served.end().reason, EndReason::SourceFailed);
    });
}
