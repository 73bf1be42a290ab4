//! The page that is waited for comes before its neighbours where those are not at hand, or take long.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pager::{PageSource, PagerError, ReadNow};
use uffd::{Mapping, MappingKind};

use support::{PAGE, Served, elsewhere, finish, image, read, serve};

const WINDOW: usize = 16;
const PAGES: usize = 4 * WINDOW;

/// A source that gives more than a page only when its gate is open.
#[derive(Debug)]
struct Slow {
    bytes: Vec<u8>,
    gate: Mutex<()>,
    /// A page alone is at hand.
    pages_at_hand: bool,
}

impl Slow {
    fn copy(&self, offset: u64, buffer: &mut [u8]) {
        let start = offset as usize;
        buffer.copy_from_slice(&self.bytes[start..start + buffer.len()]);
    }

    /// Shut until this is dropped.
    fn shut(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap()
    }
}

impl PageSource for Slow {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if buffer.len() > PAGE || !self.pages_at_hand {
            return Ok(ReadNow::WouldBlock);
        }
        self.copy(offset, buffer);
        Ok(ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        if buffer.len() > PAGE {
            drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.copy(offset, buffer);
        Ok(())
    }
}

/// The session, its source, and its first page that a window begins with.
fn served(pages_at_hand: bool) -> Option<(Served, Arc<Slow>, usize)> {
    let source = Arc::new(Slow { bytes: image(PAGES), gate: Mutex::new(()), pages_at_hand });
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let first =
        (mapping.address() as usize / PAGE).next_multiple_of(WINDOW) - mapping.address() as usize / PAGE;
    let served = serve(mapping, Arc::<Slow>::clone(&source), |options| {
        options.window = Some((WINDOW * PAGE) as u64);
    })?;
    Some((served, source, first))
}

fn until(served: &Served, installed: u64, reads: u64) {
    let counted = (installed, reads);
    served.until("as many pages by as many reads", |stats| {
        (stats.pages_installed, stats.worker_reads) == counted
    });
}

#[test]
fn a_page_at_hand_does_not_wait_for_its_neighbours() {
    let Some((served, source, first)) = served(true) else { return };
    let gate = source.shut();

    let page = first + 5;
    assert!(read(&served.mapping, page * PAGE, PAGE) == source.bytes[page * PAGE..(page + 1) * PAGE]);
    until(&served, 1, 1);
    let mapping = Arc::clone(&served.mapping);
    let neighbour = elsewhere(move || {
        let mut bytes = vec![0; PAGE];
        mapping.read_checked((page + 1) * PAGE, &mut bytes).unwrap();
        bytes
    });
    drop(gate);

    assert!(finish(&neighbour) == source.bytes[(page + 1) * PAGE..(page + 2) * PAGE]);
    until(&served, WINDOW as u64, 1);
    assert!(read(&served.mapping, 0, PAGES * PAGE) == source.bytes);
    served.close();
}

#[test]
fn neighbours_given_back_while_they_are_on_the_way_behind_the_page_stay_zero() {
    let Some((served, source, first)) = served(true) else { return };
    let gate = source.shut();
    read(&served.mapping, (first + 5) * PAGE, 1);
    until(&served, 1, 1);

    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard((first + 4) * PAGE, 4 * PAGE).unwrap()));
    drop(gate);
    until(&served, 1 + WINDOW as u64 - 4, 1);

    let mut expected = source.bytes[first * PAGE..(first + WINDOW) * PAGE].to_vec();
    expected[4 * PAGE..8 * PAGE].fill(0);
    assert!(read(&served.mapping, first * PAGE, WINDOW * PAGE) == expected);
    served.close();
}

#[test]
fn where_windows_take_long_the_page_is_read_before_the_rest_of_its_window() {
    let Some((served, source, first)) = served(false) else { return };
    let gate = source.shut();
    let mapping = Arc::clone(&served.mapping);
    let reader = elsewhere(move || mapping.read_checked(first * PAGE, &mut [0]).unwrap());
    until(&served, 0, 1);
    // This long the first window takes, as a whole.
    let slow = Instant::now() + Duration::from_millis(5);
    while Instant::now() < slow {
        thread::yield_now();
    }
    drop(gate);
    finish(&reader);
    until(&served, WINDOW as u64, 1);

    let gate = source.shut();
    let page = first + WINDOW + 9;
    assert!(read(&served.mapping, page * PAGE, PAGE) == source.bytes[page * PAGE..(page + 1) * PAGE]);
    until(&served, WINDOW as u64 + 1, 3);
    drop(gate);

    until(&served, 2 * WINDOW as u64, 3);
    assert!(read(&served.mapping, 0, PAGES * PAGE) == source.bytes);
    served.close();
}
