//! Memory that tests map, move, unmap and share with forked children themselves, and a session that serves it.
//!
//! An area is never unmapped by itself: its addresses stay its own until the test program ends, whatever a test does
//! with what is mapped there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use pager::{
    EndReason, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, SessionEnd, SessionInfo,
    SessionOptions, StatsSnapshot,
};
use uffd::{CreateOptions, Factory, Features, Modes, Userfaultfd};

use super::huge::HUGE;
use super::{DEADLINE, PAGE, elsewhere, finish, told, until_counted};

/// What an area is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    Private,
    Shared,
    Huge,
}

/// Addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub address: u64,
    pub pages: usize,
    pub page: usize,
}

impl Area {
    /// `pages` fresh pages.
    pub fn new(made: Made, pages: usize) -> Self {
        let page = if made == Made::Huge { HUGE } else { PAGE };
        let area = Self::reserve(page, pages);
        area.map(made);
        area
    }

    /// Addresses that nothing is mapped at and nobody else gets: far below where the kernel looks for free ones, so that
    /// what a test unmaps stays unmapped. Neither sanitizer needs them for itself.
    pub fn reserve(page: usize, pages: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0x5900_0000_0000);
        let apart = (pages * page + 1).next_multiple_of(HUGE) as u64;
        let area = Self { address: NEXT.fetch_add(apart, Ordering::Relaxed), pages, page };
        if page == HUGE {
            super::huge::AREAS.lock().unwrap().push(area);
        }
        area
    }

    /// Maps fresh memory here.
    pub fn map(self, made: Made) {
        let kind = match made {
            Made::Private => libc::MAP_PRIVATE,
            Made::Shared => libc::MAP_SHARED,
            Made::Huge => libc::MAP_PRIVATE | libc::MAP_HUGETLB | libc::MAP_NORESERVE,
        };
        let flags = kind | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: addresses of this area's own, to whose memory no reference exists.
        let address = unsafe { libc::mmap(self.ptr(), self.len(), protection, flags, -1, 0) };
        assert_eq!(address, self.ptr(), "{}", Errno::last());
    }

    pub fn len(self) -> usize {
        self.pages * self.page
    }

    pub fn ptr(self) -> *mut libc::c_void {
        self.address as *mut libc::c_void
    }

    /// The part of it from page `first` on.
    pub fn part(self, first: usize, pages: usize) -> Self {
        assert!(first + pages <= self.pages);
        Self { address: self.address + (first * self.page) as u64, pages, ..self }
    }

    /// What is in it, or EFAULT: by the kernel, which does not end a process that asks for what is not there.
    pub fn peek(self) -> Receiver<Result<Vec<u8>, Errno>> {
        elsewhere(move || {
            let mut bytes = vec![0; self.len()];
            let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            let remote = libc::iovec { iov_base: self.ptr(), iov_len: self.len() };
            // SAFETY: writes into `bytes` only, which lives across the call.
            let read = unsafe {
                libc::process_vm_readv(
                    std::process::id() as i32,
                    &raw const local,
                    1,
                    &raw const remote,
                    1,
                    0,
                )
            };
            Errno::result(read).map(|read| {
                bytes.truncate(read as usize);
                bytes
            })
        })
    }

    /// What is in it, under the deadline.
    pub fn read(self) -> Vec<u8> {
        finish(&self.peek()).unwrap()
    }

    /// Writes its first bytes, under the deadline.
    pub fn write(self, bytes: &'static [u8]) {
        finish(&elsewhere(move || {
            let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let remote = libc::iovec { iov_base: self.ptr(), iov_len: bytes.len() };
            // SAFETY: reads `bytes`, and writes to the area's own memory, to which no reference exists.
            let wrote = unsafe {
                libc::process_vm_writev(
                    std::process::id() as i32,
                    &raw const local,
                    1,
                    &raw const remote,
                    1,
                    0,
                )
            };
            assert_eq!(wrote, bytes.len() as isize, "{}", Errno::last());
        }));
    }

    pub fn is_zero(self) -> bool {
        self.read().iter().all(|&byte| byte == 0)
    }

    /// munmap(2).
    pub fn unmap(self) {
        // SAFETY: the area's own memory, to which no reference exists.
        finish(&elsewhere(move || assert_eq!(unsafe { libc::munmap(self.ptr(), self.len()) }, 0)));
    }

    /// Gives its memory back: it reads zero afterwards.
    pub fn discard(self, made: Made) {
        self.advise(if made == Made::Shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED });
    }

    /// The same on this thread, which waits until the event is read.
    pub fn discard_here(self, made: Made) {
        let advice = if made == Made::Shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: the area's own memory, to which no reference exists.
        assert_eq!(unsafe { libc::madvise(self.ptr(), self.len(), advice) }, 0);
    }

    /// madvise(2).
    pub fn advise(self, advice: i32) {
        // SAFETY: as above.
        finish(&elsewhere(move || assert_eq!(unsafe { libc::madvise(self.ptr(), self.len(), advice) }, 0)));
    }

    /// mremap(2) to `to`, which is as long as it is to be.
    pub fn remap(self, to: Self, flags: i32) {
        finish(&elsewhere(move || assert_eq!(self.remap_raw(to, flags), to.ptr(), "{}", Errno::last())));
    }

    /// The bare call, for children.
    pub fn remap_raw(self, to: Self, flags: i32) -> *mut libc::c_void {
        // SAFETY: both are areas' own memory, to which no reference exists.
        unsafe { libc::mremap(self.ptr(), self.len(), to.len(), flags, to.ptr()) }
    }

    /// For children: munmap(2).
    pub fn unmap_raw(self) -> bool {
        // SAFETY: the area's own memory, to which no reference exists.
        unsafe { libc::munmap(self.ptr(), self.len()) == 0 }
    }

    /// For children: MADV_DONTNEED.
    pub fn discard_raw(self) -> bool {
        // SAFETY: as above.
        unsafe { libc::madvise(self.ptr(), self.len(), libc::MADV_DONTNEED) == 0 }
    }

    /// For children: whether page `page` holds the words of page `of` of [`super::image`]. Does not allocate.
    pub fn holds(self, page: usize, of: usize) -> bool {
        let words = self.page / 8;
        (0..words).all(|word| self.word(page * words + word) == super::word(of * words + word))
    }

    /// For children: whether page `page` is zero. Does not allocate.
    pub fn zero(self, page: usize) -> bool {
        let words = self.page / 8;
        (0..words).all(|word| self.word(page * words + word) == 0)
    }

    /// One word, by touching it: waits where its page is missing, and ends the process where it is poisoned.
    pub fn word(self, index: usize) -> u64 {
        assert!(index < self.len() / 8);
        let at = (self.address as *const u64).wrapping_add(index);
        // SAFETY: the area's own memory, in reach of it; others may write meanwhile, so it is read as volatile.
        unsafe { at.read_volatile() }
    }
}

/// Everything a process does to its memory.
pub fn all_events() -> Features {
    Features::EVENT_REMOVE | Features::EVENT_UNMAP | Features::EVENT_REMAP
}

pub fn new_uffd(require: Features) -> Option<Userfaultfd> {
    match Factory::open().create(&CreateOptions { require, ..CreateOptions::default() }) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

pub fn register(uffd: &Userfaultfd, area: Area, modes: Modes) {
    // SAFETY: no reference to the area exists.
    unsafe { uffd.register(area.address, area.len() as u64, modes) }.unwrap();
}

/// A session of an area.
pub struct Serving {
    pub pager: Pager,
    pub id: u64,
    pub info: Arc<SessionInfo>,
    pub notices: Receiver<Notice>,
}

/// Serves an area from the first byte of a source on.
pub fn serve_area(
    uffd: Userfaultfd,
    area: Area,
    source: Arc<dyn PageSource>,
    adjust: impl FnOnce(&mut SessionOptions),
) -> Serving {
    let region = Region { address: area.address, len: area.len() as u64, source_offset: 0 };
    let mut options = SessionOptions {
        source_timeout: std::time::Duration::from_secs(10),
        ..SessionOptions::new(vec![region], area.page as u64, source)
    };
    adjust(&mut options);
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let id = pager.adopt(uffd, options, observer).unwrap();
    let info = started(&notices);
    Serving { pager, id, info, notices }
}

/// The next session that starts.
pub fn started(notices: &Receiver<Notice>) -> Arc<SessionInfo> {
    loop {
        if let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() {
            return info;
        }
    }
}

/// How a session ends.
pub fn ended(notices: &Receiver<Notice>, of: u64) -> SessionEnd {
    loop {
        match notices.recv_timeout(DEADLINE).unwrap() {
            Notice::SessionEnded { id, end } if id == of => return end,
            _ => {}
        }
    }
}

/// How many faults have come to an end, whichever. When a session is over, all of them have.
pub fn faults_ended(stats: &StatsSnapshot) -> u64 {
    stats.faults_installed
        + stats.faults_zeroed
        + stats.faults_poisoned
        + stats.already_present
        + stats.joined
        + stats.unanswered
}

impl Serving {
    pub fn stats(&self) -> StatsSnapshot {
        self.info.stats.snapshot()
    }

    /// Waits until the counters say so.
    pub fn until(&self, what: &str, is_so: impl Fn(StatsSnapshot) -> bool) {
        until_counted(&self.info, what, is_so);
    }

    /// Waits until exactly so many pages are counted: those who waited for them go on before they are.
    pub fn until_filled(&self, from_source: u64, with_zeros: u64) {
        self.until("as many pages filled", |stats| {
            (stats.pages_installed, stats.pages_zeroed) == (from_source, with_zeros)
        });
    }

    /// Ends the session on purpose.
    pub fn close(&self, rest: pager::Rest) {
        self.pager.close_session(self.id, rest);
        assert_eq!(ended(&self.notices, self.id).reason, EndReason::Closed);
    }
}

/// Memory as a source that is never at hand, and that workers get only when the gate is open.
#[derive(Debug)]
pub struct Gated {
    bytes: Vec<u8>,
    gate: Mutex<()>,
}

impl Gated {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes, gate: Mutex::new(()) })
    }

    /// Shut until this is dropped.
    pub fn shut(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap()
    }
}

impl PageSource for Gated {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        let start = offset as usize;
        buffer.copy_from_slice(&self.bytes[start..start + buffer.len()]);
        Ok(())
    }
}
