//! Memory that tests map, move, unmap and share with forked children themselves, and a session that serves it.
//!
//! An area is never unmapped by itself: its addresses stay its own until the test program ends, whatever a test does
//! with what is mapped there.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use pager::{
    EndReason, FailurePolicy, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region,
    SessionEnd, SessionInfo, SessionModes, SessionOptions, StatsSnapshot,
};
use uffd::{CreateOptions, Factory, Features, Modes, Userfaultfd};

use super::{DEADLINE, PAGE, elsewhere, finish, told};

pub const HUGE: usize = 2 << 20;

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
    /// what a test unmaps stays unmapped.
    pub fn reserve(page: usize, pages: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0x1000_0000_0000);
        let apart = (pages * page + 1).next_multiple_of(HUGE) as u64;
        let area = Self { address: NEXT.fetch_add(apart, Ordering::Relaxed), pages, page };
        if page == HUGE {
            HUGE_AREAS.lock().unwrap().push(area);
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
        let start = (self.address as usize + page * self.page) as *const u64;
        (0..words).all(|word| {
            let expected = ((of * words + word) as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            // SAFETY: the area's own memory, in reach of it.
            let at = unsafe { start.add(word) };
            // SAFETY: as above; others may write meanwhile, so it is read as volatile.
            unsafe { at.read_volatile() == expected }
        })
    }

    /// For children: whether page `page` is zero. Does not allocate.
    pub fn zero(self, page: usize) -> bool {
        let start = (self.address as usize + page * self.page) as *const u64;
        (0..self.page / 8).all(|word| {
            // SAFETY: the area's own memory, in reach of it.
            let at = unsafe { start.add(word) };
            // SAFETY: as above.
            unsafe { at.read_volatile() == 0 }
        })
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
        regions: vec![region],
        page_size: area.page as u64,
        source,
        policy: FailurePolicy::Poison,
        window: None,
        process: None,
        modes: SessionModes::default(),
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

impl Serving {
    pub fn stats(&self) -> StatsSnapshot {
        self.info.stats.snapshot()
    }

    /// Waits until the counters say so.
    pub fn until(&self, what: &str, is_so: impl Fn(StatsSnapshot) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self.stats()) {
            assert!(Instant::now() < deadline, "never: {what}; {:?}", self.stats());
            std::thread::yield_now();
        }
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

/// Forking tests go one after the other: a fork is an event of every userfaultfd of this process that follows forks.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A forked child. Killed and reaped when dropped.
pub struct Child {
    pid: i32,
    reaped: bool,
}

/// Forks; the child does `act` and exits with what it returns. Comes when the FORK event was read.
///
/// By the bare system call: fork(3) holds the allocator's locks until then, and who reads it allocates.
///
/// # Safety
///
/// `act` makes async-signal-safe calls only: it does not allocate, lock or panic.
pub unsafe fn fork(act: impl FnOnce() -> i32 + Send + 'static) -> Child {
    finish(&elsewhere(move || {
        // SAFETY: a plain fork; the child does what `act` promises, and ends without running anything of the parent's.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            let code = act();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) };
        }
        assert!(pid > 0, "{}", Errno::last());
        Child { pid: pid as i32, reaped: false }
    }))
}

/// For children: forks and waits; whether the grandchild found `right`, and how it is here.
pub fn fork_raw(right: impl Fn() -> bool) -> bool {
    // SAFETY: a plain fork; the child makes no other call than `right` and the next.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as i32;
    let found = right();
    if pid == 0 {
        // SAFETY: ends the grandchild at once.
        unsafe { libc::_exit(i32::from(!found)) };
    }
    let mut status = 0;
    // SAFETY: writes to a variable that lives across the call.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    found && status == 0
}

impl Child {
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How it ended, under the deadline.
    pub fn wait(mut self) -> WaitStatus {
        self.reaped = true;
        let pid = Pid::from_raw(self.pid);
        let waiting = elsewhere(move || waitpid(pid, None).unwrap());
        let status = waiting.recv_timeout(DEADLINE);
        if status.is_err() {
            // SAFETY: takes numbers; it is our child and not reaped, so the number is still its.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
        status.expect("the child still runs")
    }

    /// What it exited with.
    pub fn exit_code(self) -> i32 {
        match self.wait() {
            WaitStatus::Exited(_, code) => code,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // SAFETY: takes numbers; it is our child and not reaped, so the number is still its.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            waitpid(Pid::from_raw(self.pid), None).unwrap();
        }
    }
}

/// A gate that opens for a child and its parent: bytes of a pipe.
pub struct Steps {
    read: std::os::fd::OwnedFd,
    write: std::os::fd::OwnedFd,
}

impl Steps {
    pub fn new() -> Self {
        let (read, write) = nix::unistd::pipe().unwrap();
        Self { read, write }
    }

    /// For the parent: lets the child go on once.
    pub fn step(&self) {
        assert_eq!(nix::unistd::write(&self.write, &[1]), Ok(1));
    }

    /// For the parent: waits for the child.
    pub fn wait(&self) {
        let wait = self.waiter();
        finish(&elsewhere(wait));
    }

    /// What the child needs of it to let its parent go on.
    pub fn stepper(&self) -> impl Fn() + Send + use<> {
        use std::os::fd::AsRawFd;
        let fd = self.write.as_fd().as_raw_fd();
        move || {
            // SAFETY: writes one byte of a constant.
            unsafe { libc::write(fd, c"1".as_ptr().cast(), 1) };
        }
    }

    /// What the child needs of it to wait for its parent.
    pub fn waiter(&self) -> impl Fn() + Send + use<> {
        use std::os::fd::AsRawFd;
        let fd = self.read.as_fd().as_raw_fd();
        move || {
            let mut byte = 0_u8;
            // SAFETY: reads one byte into a variable that lives across the call.
            unsafe { libc::read(fd, (&raw mut byte).cast(), 1) };
        }
    }
}

/// Where huge pages may be mapped.
static HUGE_AREAS: Mutex<Vec<Area>> = Mutex::new(Vec::new());

/// Huge pages of 2 MiB that a test may use, given back when dropped; one test has them at a time.
pub struct HugePages {
    before: Option<String>,
    _turn: MutexGuard<'static, ()>,
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

impl HugePages {
    /// `count` free ones, or a printed reason why not.
    pub fn reserve(count: usize) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |name: &str| -> usize {
            let text = std::fs::read_to_string(format!("{POOL}/{name}")).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        // What is promised to somebody is not free.
        let free = || number("free_hugepages").saturating_sub(number("resv_hugepages"));
        let mut pool = Self { before: None, _turn: turn };
        if free() < count {
            let before = number("nr_hugepages");
            let wanted = before + count - free();
            if let Err(error) = std::fs::write(format!("{POOL}/nr_hugepages"), wanted.to_string()) {
                println!("skipped: no {count} free huge pages of 2 MiB, and no more can be had: {error}");
                return None;
            }
            pool.before = Some(before.to_string());
        }
        let free = free();
        if free < count {
            println!("skipped: {free} huge pages of 2 MiB could be had, {count} are needed");
            return None;
        }
        Some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Nobody uses them any more: the test is over, and its pager was dropped before this.
        for area in HUGE_AREAS.lock().unwrap().drain(..) {
            // SAFETY: the area's own memory, to which no reference exists.
            unsafe { libc::munmap(area.ptr(), area.len()) };
        }
        if let Some(before) = &self.before {
            std::fs::write(format!("{POOL}/nr_hugepages"), before).unwrap();
        }
    }
}
