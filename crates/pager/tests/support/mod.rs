//! What every test of the pager needs: memory of this process that a pager serves, and who is told.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

pub mod area;
pub mod children;
pub mod huge;
pub mod kept;
pub mod sources;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pager::{
    EndReason, Notice, Observer, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, SessionEnd,
    SessionInfo, SessionOptions, StatsSnapshot,
};
use uffd::{CreateOptions, Factory, Features, Mapping, MappingError, Modes, Userfaultfd};

/// Long enough for a busy machine; a test that waits this long has failed.
pub const DEADLINE: Duration = Duration::from_secs(10);
pub const PAGE: usize = 4096;

/// Hears what becomes of sessions.
pub struct Told(Mutex<Sender<Notice>>);

impl Observer for Told {
    fn notice(&self, notice: Notice) {
        // A test that has ended hears nothing any more.
        let _ = self.0.lock().unwrap().send(notice);
    }
}

/// An observer, and what it hears.
pub fn told() -> (Arc<dyn Observer>, Receiver<Notice>) {
    let (sender, receiver) = channel();
    (Arc::new(Told(Mutex::new(sender))), receiver)
}

/// The word of [`image`] at an index.
pub fn word(index: usize) -> u64 {
    (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Bytes that tell where they are: no two pages are alike, none is zero.
pub fn image(pages: usize) -> Vec<u8> {
    (0..pages * PAGE / 8).map(word).flat_map(u64::to_ne_bytes).collect()
}

/// One page of these bytes.
pub fn page_of(bytes: &[u8], page: usize) -> &[u8] {
    &bytes[page * PAGE..(page + 1) * PAGE]
}

/// Memory as a source, always at hand.
#[derive(Debug)]
pub struct Bytes(pub Vec<u8>);

impl PageSource for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

/// A userfaultfd of this process that follows what becomes of its memory, or a printed reason why not.
pub fn uffd() -> Option<Userfaultfd> {
    let follow = Features::EVENT_REMOVE | Features::EVENT_UNMAP | Features::EVENT_REMAP;
    match Factory::open().create(&CreateOptions { require: follow, ..CreateOptions::default() }) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// Memory of this process being served.
pub struct Served {
    /// Unmapped before the pager ends, which would otherwise have to be there to read of it: see `Drop`.
    pub mapping: Arc<Mapping>,
    pub pager: Pager,
    pub id: u64,
    pub info: Arc<SessionInfo>,
    pub notices: Receiver<Notice>,
}

/// Serves a mapping from a source, with what else a test wants of it.
pub fn serve(
    mapping: Mapping,
    source: Arc<dyn PageSource>,
    adjust: impl FnOnce(&mut SessionOptions),
) -> Option<Served> {
    serve_by(uffd()?, mapping, source, adjust)
}

/// The same by a userfaultfd that the test has made.
pub fn serve_by(
    uffd: Userfaultfd,
    mapping: Mapping,
    source: Arc<dyn PageSource>,
    adjust: impl FnOnce(&mut SessionOptions),
) -> Option<Served> {
    // SAFETY: no reference to the mapping exists; it is read and written by copying.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
    let region = Region { address: mapping.address(), len: mapping.len() as u64, source_offset: 0 };
    let mut options = SessionOptions {
        source_timeout: DEADLINE,
        ..SessionOptions::new(vec![region], mapping.page_size() as u64, source)
    };
    adjust(&mut options);
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let id = pager.adopt(uffd, options, observer).unwrap();
    let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else {
        panic!("the session did not start")
    };
    Some(Served { mapping: Arc::new(mapping), pager, id, info, notices })
}

impl Served {
    pub fn stats(&self) -> StatsSnapshot {
        self.info.stats.snapshot()
    }

    /// Waits until the counters say so.
    pub fn until(&self, what: &str, is_so: impl Fn(StatsSnapshot) -> bool) {
        until_counted(&self.info, what, is_so);
    }

    /// How the session ended.
    pub fn end(&self) -> SessionEnd {
        loop {
            if let Notice::SessionEnded { end, .. } = self.notices.recv_timeout(DEADLINE).unwrap() {
                return end;
            }
        }
    }

    /// Ends the session on purpose, leaving what is missing to the kernel.
    pub fn close(&self) {
        self.pager.close_session(self.id, pager::Rest::Zero);
        assert_eq!(self.end().reason, EndReason::Closed);
    }
}

/// Waits until the counters of a session say so.
pub fn until_counted(info: &SessionInfo, what: &str, is_so: impl Fn(StatsSnapshot) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so(info.stats.snapshot()) {
        assert!(Instant::now() < deadline, "never: {what}; {:?}", info.stats.snapshot());
        std::thread::yield_now();
    }
}

/// Does something on a thread that may wait for a page; the answer comes when it is done.
pub fn elsewhere<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, answer) = channel();
    std::thread::spawn(move || done.send(act()));
    answer
}

/// Does something on a thread that waits until its event is read. It does when this returns.
pub fn held_up<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (begun, thread) = channel();
    let done = elsewhere(move || {
        begun.send(nix::unistd::gettid()).unwrap();
        act()
    });
    let thread = finish(&thread);
    let deadline = Instant::now() + DEADLINE;
    // In state D it has queued its event; nothing else on its way there lasts.
    let path = format!("/proc/self/task/{thread}/stat");
    while !std::fs::read_to_string(&path).unwrap_or_default().contains(") D ") {
        assert!(Instant::now() < deadline, "it does not wait");
        std::thread::yield_now();
    }
    done
}

pub fn finish<T>(answer: &Receiver<T>) -> T {
    answer.recv_timeout(DEADLINE).expect("it still waits")
}

/// What [`reading`] comes to.
pub type Reading = Receiver<Result<Vec<u8>, MappingError>>;

/// A page read on another thread: its bytes, or why it cannot be had.
pub fn reading(mapping: &Arc<Mapping>, page: usize) -> Reading {
    let mapping = Arc::clone(mapping);
    elsewhere(move || {
        let mut bytes = vec![0; PAGE];
        mapping.read_checked(page * PAGE, &mut bytes).map(|()| bytes)
    })
}

/// Reads a part of a mapping on another thread, under the deadline.
pub fn read(mapping: &Arc<Mapping>, offset: usize, len: usize) -> Vec<u8> {
    let mapping = Arc::clone(mapping);
    finish(&elsewhere(move || {
        let mut bytes = vec![0; len];
        mapping.read_checked(offset, &mut bytes).unwrap();
        bytes
    }))
}
