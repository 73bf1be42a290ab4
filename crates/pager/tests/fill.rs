//! Sessions of which everything is there before anybody hears of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use pager::{
    EndReason, FillMode, FillOptions, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region,
    Rest, SessionInfo, SessionOptions,
};
use uffd::{Mapping, MappingKind, Modes, Residency};

use support::area::Gated;
use support::{Bytes, DEADLINE, PAGE, elsewhere, finish, image, read, told, uffd};

const PAGES: usize = 700;

/// Memory that a session begins to be filled with.
struct Filling {
    mapping: Arc<Mapping>,
    pager: Pager,
    id: u64,
    notices: Receiver<Notice>,
}

fn fill(mapping: Mapping, source: Arc<dyn PageSource>, window: Option<u64>) -> Option<Filling> {
    let uffd = uffd()?;
    // SAFETY: no reference to the mapping exists; it is read and written by copying.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
    let options = SessionOptions {
        window,
        fill: FillOptions { mode: FillMode::Fill, ..FillOptions::default() },
        source_timeout: DEADLINE,
        ..SessionOptions::new(
            vec![Region { address: mapping.address(), len: mapping.len() as u64, source_offset: 0 }],
            mapping.page_size() as u64,
            source,
        )
    };
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let id = pager.adopt(uffd, options, observer).unwrap();
    Some(Filling { mapping: Arc::new(mapping), pager, id, notices })
}

impl Filling {
    fn started(&self) -> Arc<SessionInfo> {
        match self.notices.recv_timeout(DEADLINE).unwrap() {
            Notice::SessionStarted(info) => info,
            other => panic!("{other:?}"),
        }
    }

    /// How it ended without having been announced.
    fn ended(&self) -> (EndReason, Option<PagerError>) {
        match self.notices.recv_timeout(DEADLINE).unwrap() {
            Notice::SessionEnded { id, end } if id == self.id => (end.reason, end.error),
            other => panic!("{other:?}"),
        }
    }

    fn close(&self) {
        self.pager.close_session(self.id, Rest::Zero);
        assert_eq!(self.ended().0, EndReason::Closed);
    }

    fn all(&self, state: Residency) -> bool {
        let states = self.mapping.residency(0, self.mapping.len()).unwrap();
        states.iter().all(|&found| found == state)
    }
}

fn private() -> Mapping {
    Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap()
}

#[test]
fn everything_is_there_when_a_filled_session_is_announced() {
    let mut bytes = image(PAGES);
    bytes[100 * PAGE..164 * PAGE].fill(0);
    for (at_hand, window) in [(true, Some(PAGE as u64)), (false, None)] {
        let source: Arc<dyn PageSource> =
            if at_hand { Arc::new(Bytes(bytes.clone())) } else { Gated::new(bytes.clone()) };
        let Some(filling) = fill(private(), source, window) else { return };

        let info = filling.started();

        assert!(filling.all(Residency::Present));
        let stats = info.stats.snapshot();
        assert_eq!((stats.faults, stats.pages_prefetched), (0, PAGES as u64));
        assert_eq!(stats.pages_zero, 64);
        assert!(stats.windows < 32, "in large pieces, whatever the window: {stats:?}");
        assert_eq!(info.filled.get().unwrap().mode, FillMode::Fill);
        assert!(read(&filling.mapping, 0, PAGES * PAGE) == bytes);
        filling.close();
    }
}

#[test]
fn who_touches_it_meanwhile_is_answered_and_nothing_is_announced() {
    let bytes = image(PAGES);
    let source = Gated::new(bytes.clone());
    let gate = source.shut();
    let Some(filling) = fill(private(), Arc::<Gated>::clone(&source), None) else { return };

    let mapping = Arc::clone(&filling.mapping);
    let reader = elsewhere(move || read(&mapping, (PAGES - 1) * PAGE, PAGE));
    // Nothing can be told before the gate opens; that it is not is seen by waiting.
    let nothing = filling.notices.recv_timeout(Duration::from_millis(50));
    assert!(matches!(nothing, Err(RecvTimeoutError::Timeout)), "{nothing:?}");
    drop(gate);

    assert!(finish(&reader) == bytes[(PAGES - 1) * PAGE..]);
    filling.started();
    assert!(filling.all(Residency::Present));
    filling.close();
}

#[test]
fn what_was_given_back_meanwhile_stays_zero() {
    let bytes = image(PAGES);
    let source = Gated::new(bytes.clone());
    let gate = source.shut();
    let Some(filling) = fill(private(), Arc::<Gated>::clone(&source), None) else { return };

    let mapping = Arc::clone(&filling.mapping);
    finish(&elsewhere(move || mapping.discard(30 * PAGE, 5 * PAGE).unwrap()));
    drop(gate);
    filling.started();

    let mut expected = bytes;
    expected[30 * PAGE..35 * PAGE].fill(0);
    assert!(read(&filling.mapping, 0, PAGES * PAGE) == expected);
    filling.close();
}

#[test]
fn a_session_whose_source_fails_while_it_is_filled_is_never_announced_and_its_memory_poisoned() {
    #[derive(Debug)]
    struct Broken;

    impl PageSource for Broken {
        fn size(&self) -> u64 {
            (PAGES * PAGE) as u64
        }

        fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
            self.read(offset, buffer).map(|()| ReadNow::Done)
        }

        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
            buffer.fill(1);
            let there = offset < 64 * PAGE as u64;
            if there { Ok(()) } else { Err(PagerError::Callback("no more".to_owned())) }
        }
    }

    let Some(filling) = fill(private(), Arc::new(Broken), None) else { return };

    let (reason, error) = filling.ended();

    assert_eq!(reason, EndReason::SourceFailed);
    assert_eq!(error.unwrap().to_string(), "no more");
    let states = filling.mapping.residency(0, PAGES * PAGE).unwrap();
    assert!(states[64..].iter().all(|&state| state == Residency::Noted), "poisoned");
}

#[test]
fn a_session_that_is_closed_while_it_is_filled_is_never_announced() {
    let source = Gated::new(image(PAGES));
    let gate = source.shut();
    let Some(filling) = fill(private(), Arc::<Gated>::clone(&source), None) else { return };

    filling.pager.close_session(filling.id, Rest::Poison);

    let (reason, error) = filling.ended();
    assert_eq!(reason, EndReason::Closed);
    assert!(error.is_none(), "{error:?}");
    assert!(filling.all(Residency::Noted), "poisoned");
    drop(gate);
}
