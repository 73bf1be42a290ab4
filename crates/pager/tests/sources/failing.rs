//! Whatever a source does wrong, its session ends by its policy: no page of zeros, nobody who waits for ever.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use pager::{
    EndReason, Fetch, FileSource, PageSource, Pager, PagerError, PagerOptions, ReadNow, RetryOptions,
    RetrySource, SessionOptions,
};
use uffd::{CopyOptions, Mapping, MappingError, MappingKind, Residency, Userfaultfd};

use crate::support::{Bytes, DEADLINE, PAGE, Served, elsewhere, finish, image, read, serve};

const PAGES: usize = 64;

/// Memory of `PAGES` pages, a page at a time.
pub(super) fn served(source: Arc<dyn PageSource>) -> Option<Served> {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    serve(mapping, source, |options| options.window = Some(PAGE as u64))
}

/// What reading a byte gives, on a thread under the deadline.
fn touch(served: &Served, page: usize) -> Result<(), MappingError> {
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.read_checked(page * PAGE, &mut [0])))
}

fn is_fault(result: &Result<(), MappingError>) -> bool {
    matches!(result, Err(error) if error.errno() == libc::EFAULT)
}

/// A fault on `page` fails, ends the session, and poisons every page that is not there.
pub(super) fn assert_poisoned(served: &Served, page: usize) -> Option<PagerError> {
    let result = touch(served, page);
    assert!(is_fault(&result), "{result:?}");

    let end = served.end();

    assert_eq!(end.reason, EndReason::SourceFailed, "{:?}", end.error);
    let states = served.mapping.residency(0, served.mapping.len()).unwrap();
    let missing =
        states.iter().filter(|&&state| state != Residency::Noted && state != Residency::Present).count();
    assert_eq!(missing, 0, "pages that would read zero");
    assert_eq!(states[page], Residency::Noted);
    end.error
}

/// How a source goes wrong at page 40, and that everything else is good.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    FailsAtHand,
    FailsOnWorker,
    PanicsAtHand,
    PanicsOnWorker,
    PanicsWhenAsked,
    PanicsAboutZeros,
}

#[derive(Debug)]
struct Faulty {
    wrong: Wrong,
    good: Bytes,
}

impl Faulty {
    fn reaches_bad(offset: u64, len: usize) -> bool {
        let bad = 40 * PAGE as u64;
        (offset..offset + len as u64).contains(&bad)
    }
}

fn eio() -> PagerError {
    PagerError::Source { path: "broken".into(), syscall: "pread", errno: Errno::EIO }
}

impl PageSource for Faulty {
    fn size(&self) -> u64 {
        self.good.size()
    }
    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        match self.wrong {
            Wrong::FailsOnWorker | Wrong::PanicsOnWorker | Wrong::PanicsWhenAsked => Ok(ReadNow::WouldBlock),
            Wrong::FailsAtHand if Self::reaches_bad(offset, buffer.len()) => Err(eio()),
            Wrong::PanicsAtHand => {
                assert!(!Self::reaches_bad(offset, buffer.len()), "a source that panics");
                self.good.read_now(offset, buffer)
            }
            _ => self.good.read_now(offset, buffer),
        }
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        if Self::reaches_bad(offset, buffer.len()) {
            assert_ne!(self.wrong, Wrong::PanicsOnWorker, "a source that panics");
            return Err(eio());
        }
        self.good.read(offset, buffer)
    }
    fn fetch(&self, fetch: Fetch) -> Result<(), Fetch> {
        let bad = self.wrong == Wrong::PanicsWhenAsked && Self::reaches_bad(fetch.offset(), fetch.len());
        assert!(!bad, "a source that panics");
        Err(fetch)
    }
    fn zeros(&self, _: u64, _: u64) -> bool {
        assert_ne!(self.wrong, Wrong::PanicsAboutZeros, "a source that panics");
        false
    }
}

#[test]
fn a_source_that_fails_or_panics_poisons_what_is_missing_and_keeps_what_is_there() {
    let bytes = image(PAGES);
    for wrong in [
        Wrong::FailsAtHand,
        Wrong::FailsOnWorker,
        Wrong::PanicsAtHand,
        Wrong::PanicsOnWorker,
        Wrong::PanicsWhenAsked,
    ] {
        let source = Faulty { wrong, good: Bytes(bytes.clone()) };
        let Some(served) = served(Arc::new(source)) else { return };
        assert!(read(&served.mapping, 7 * PAGE, PAGE) == bytes[7 * PAGE..8 * PAGE]);

        let error = assert_poisoned(&served, 40).unwrap();

        let panics = !matches!(wrong, Wrong::FailsAtHand | Wrong::FailsOnWorker);
        assert_eq!(matches!(error, PagerError::Internal(_)), panics, "{wrong:?}: {error}");
        assert!(read(&served.mapping, 7 * PAGE, PAGE) == bytes[7 * PAGE..8 * PAGE]);
        assert!(is_fault(&touch(&served, 0)));
    }
}

#[test]
fn a_source_that_panics_when_asked_about_zeros_is_read_instead() {
    let bytes = image(PAGES);
    let Some(served) =
        served(Arc::new(Faulty { wrong: Wrong::PanicsAboutZeros, good: Bytes(bytes.clone()) }))
    else {
        return;
    };

    assert!(read(&served.mapping, 0, PAGE) == bytes[..PAGE]);
    served.close();
}

/// Lets a pager that is there serve more memory; what it tells of that.
fn adopt(
    pager: &Pager,
    uffd: Userfaultfd,
    mapping: &Mapping,
    source: Arc<dyn PageSource>,
) -> Receiver<pager::Notice> {
    let (address, len) = (mapping.address(), mapping.len() as u64);
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(address, len, uffd::Modes::MISSING) }.unwrap();
    let options = SessionOptions {
        window: Some(PAGE as u64),
        source_timeout: DEADLINE,
        ..SessionOptions::new(vec![pager::Region { address, len, source_offset: 0 }], PAGE as u64, source)
    };
    let (observer, notices) = crate::support::told();
    pager.adopt(uffd, options, observer).unwrap();
    notices
}

#[test]
fn a_source_that_fails_does_not_end_another_session_of_the_same_pager() {
    let bytes = image(PAGES);
    let source = Faulty { wrong: Wrong::PanicsAtHand, good: Bytes(bytes.clone()) };
    let Some(bad) = served(Arc::new(source)) else { return };
    let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
    let uffd = crate::support::uffd().unwrap();
    let _notices = adopt(&bad.pager, uffd, &mapping, Arc::new(Bytes(bytes.clone())));

    assert_poisoned(&bad, 40);

    assert!(read(&mapping, 0, PAGES * PAGE) == bytes);
}

/// Says it has more bytes than it can give.
#[derive(Debug)]
struct Boaster(Bytes);

impl PageSource for Boaster {
    fn size(&self) -> u64 {
        2 * self.0.size()
    }
    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if offset + buffer.len() as u64 > self.0.size() {
            let (expected, actual) = (self.size(), self.0.size());
            return Err(PagerError::SourceTruncated { path: "boaster".into(), expected, actual });
        }
        self.0.read_now(offset, buffer)
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.read_now(offset, buffer).map(|_| ())
    }
}

#[test]
fn a_source_that_lies_about_its_length_serves_what_it_has_and_then_fails() {
    let bytes = image(PAGES / 2);
    let Some(served) = served(Arc::new(Boaster(Bytes(bytes.clone())))) else { return };
    assert!(read(&served.mapping, 0, PAGES / 2 * PAGE) == bytes);

    let error = assert_poisoned(&served, PAGES / 2);

    assert!(matches!(error, Some(PagerError::SourceTruncated { .. })), "{error:?}");
}

#[test]
fn a_file_cut_short_while_it_is_served_is_a_failure_at_every_page_also_those_it_still_has() {
    for (left, page) in [(10 * PAGE + 100, 10), (10 * PAGE + 100, 0), (PAGES * PAGE - 1, PAGES - 1)] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, image(PAGES)).unwrap();
        let Some(served) = served(Arc::new(FileSource::open(&path).unwrap())) else { return };
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(left as u64).unwrap();

        let error = assert_poisoned(&served, page);

        assert!(matches!(error, Some(PagerError::SourceTruncated { .. })), "{error:?}");
    }
}

/// Always late: says when it is read, and answers when it may.
#[derive(Debug)]
pub(super) struct Late {
    good: Bytes,
    asked: Mutex<Sender<u64>>,
    gate: Mutex<Receiver<()>>,
}

impl Late {
    pub(super) fn new(bytes: Vec<u8>) -> (Arc<Self>, Receiver<u64>, Sender<()>) {
        let (asked, questions) = channel();
        let (open, gate) = channel();
        (
            Arc::new(Self { good: Bytes(bytes), asked: Mutex::new(asked), gate: Mutex::new(gate) }),
            questions,
            open,
        )
    }
}

impl PageSource for Late {
    fn size(&self) -> u64 {
        self.good.size()
    }
    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        // Both ends hang up when the test is over.
        let _ = self.asked.lock().unwrap().send(offset);
        let _ = self.gate.lock().unwrap().recv();
        self.good.read(offset, buffer)
    }
}

#[test]
fn bytes_that_come_after_their_page_was_discarded_are_not_installed() {
    let bytes = image(PAGES);
    let (source, asked, open) = Late::new(bytes.clone());
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, source, |options| options.window = Some(4 * PAGE as u64)) else {
        return;
    };
    let mapping = Arc::clone(&served.mapping);
    // Whatever it finds: the page is discarded while it waits.
    let faulting = elsewhere(move || {
        let mut first = vec![1; PAGE];
        mapping.read_checked(0, &mut first).unwrap();
        first
    });
    assert_eq!(asked.recv_timeout(DEADLINE).unwrap() % (4 * PAGE as u64), 0);

    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || {
        mapping.discard(0, PAGE).unwrap();
        mapping.discard(2 * PAGE, PAGE).unwrap();
    }));
    for _ in 0..PAGES {
        open.send(()).unwrap();
    }

    assert!(finish(&faulting) == [0; PAGE]);
    assert!(read(&served.mapping, 0, PAGE) == [0; PAGE]);
    assert!(read(&served.mapping, 2 * PAGE, PAGE) == [0; PAGE]);
    assert!(read(&served.mapping, PAGE, PAGE) == bytes[PAGE..2 * PAGE]);
    assert!(read(&served.mapping, 3 * PAGE, 8 * PAGE) == bytes[3 * PAGE..11 * PAGE]);
    served.close();
}

/// Whether a thread of this program sleeps.
fn sleeps(thread: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    // The name before it may hold anything but a closing bracket further on.
    !stat.rsplit(')').next().unwrap().trim_start().starts_with('R')
}

#[test]
fn a_page_that_somebody_else_brought_without_waking_wakes_its_thread_when_its_bytes_come() {
    let (source, asked, open) = Late::new(image(PAGES));
    let Some(uffd) = crate::support::uffd() else { return };
    let behind = Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let notices = adopt(&pager, uffd, &mapping, source);
    let pager::Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else {
        panic!("no start")
    };
    let (tell, told) = channel();
    let faulting = {
        let mapping = Arc::clone(&mapping);
        elsewhere(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let mut page = [0; PAGE];
            mapping.read_checked(5 * PAGE, &mut page).unwrap();
            page
        })
    };
    let thread = told.recv_timeout(DEADLINE).unwrap();
    assert_eq!(asked.recv_timeout(DEADLINE).unwrap(), 5 * PAGE as u64);
    while !sleeps(thread) {
        std::thread::yield_now();
    }
    let brought = [0x11; PAGE];
    let quietly = CopyOptions { wake: false, ..CopyOptions::default() };
    // SAFETY: the bytes are this test's; no reference to the mapping exists.
    unsafe { behind.copy(mapping.address() + 5 * PAGE as u64, brought.as_ptr(), PAGE, quietly) }.unwrap();
    assert!(sleeps(thread));

    open.send(()).unwrap();

    assert!(finish(&faulting) == brought);
    assert_eq!(info.stats.snapshot().pages_installed, 0);
}

#[test]
fn a_session_whose_source_stalls_can_be_closed_and_what_comes_later_is_not_installed() {
    let (source, asked, open) = Late::new(image(PAGES));
    let Some(served) = served(source) else { return };
    let mapping = Arc::clone(&served.mapping);
    let faulting = elsewhere(move || mapping.read_checked(9 * PAGE, &mut [0]));
    asked.recv_timeout(DEADLINE).unwrap();

    served.pager.close_session(served.id, pager::Rest::Poison);

    assert_eq!(served.end().reason, EndReason::Closed);
    assert!(is_fault(&finish(&faulting)));
    open.send(()).unwrap();
    drop(open);
    assert!(is_fault(&touch(&served, 9)));
    assert!(
        served.mapping.residency(0, PAGES * PAGE).unwrap().iter().all(|&state| state == Residency::Noted)
    );
}

/// Fails the first two times that a place is read, in ways that pass.
#[derive(Debug)]
pub(super) struct Flaky {
    good: Bytes,
    /// How often each place was read.
    reads: Mutex<HashMap<u64, u32>>,
}

impl Flaky {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { good: Bytes(bytes), reads: Mutex::default() }
    }
}

impl PageSource for Flaky {
    fn size(&self) -> u64 {
        self.good.size()
    }
    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let mut reads = self.reads.lock().unwrap();
        let before = reads.entry(offset).or_default();
        *before += 1;
        if *before <= 2 {
            return Err(eio());
        }
        drop(reads);
        self.good.read(offset, buffer)
    }
}

#[test]
fn a_source_that_goes_on_failing_ends_the_session_with_how_often_it_was_tried() {
    let options =
        RetryOptions { attempts: 3, first_pause: Duration::from_micros(50), ..RetryOptions::default() };
    let faulty: Arc<dyn PageSource> =
        Arc::new(Faulty { wrong: Wrong::FailsOnWorker, good: Bytes(image(PAGES)) });
    let Some(served) = served(Arc::new(RetrySource::new(faulty, options).unwrap())) else { return };

    let error = assert_poisoned(&served, 40).unwrap();

    assert!(matches!(error, PagerError::GaveUp { attempts: 3, .. }), "{error}");
}
