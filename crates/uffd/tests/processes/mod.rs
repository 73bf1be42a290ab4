//! Processes that tests need: the test program again, running one test alone; and forked children, which do only what a
//! child of a threaded process may (async-signal-safe calls).
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use uffd::Userfaultfd;
use uffd::fd_passing::recv_exact;
use uffd::liveness::PidFd;
use userfaultfd_sys as sys;

/// Long enough for a busy machine; a test that waits this long has failed.
pub const DEADLINE: Duration = Duration::from_secs(10);
pub const PAGE: usize = 4096;

const ALONE: &str = "UFFD_TEST_ALONE";

/// Runs a test in a process of its own, under a deadline: for what changes the whole process, or may hang it.
pub fn alone(test: &str, act: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some_and(|name| name == test) {
        act();
        return;
    }
    let mut child = again(test, test).spawn().unwrap();
    let ended = PidFd::open(child.id() as i32).is_ok_and(|process| process.wait(DEADLINE).unwrap());
    if !ended {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    assert!(
        ended && status.success(),
        "{test}: {status}, {}",
        if ended { "failed" } else { "still running" }
    );
}

/// What the second process of a test was given, if this is it.
pub fn given(test: &str) -> Option<String> {
    std::env::var(ALONE).ok()?.strip_prefix(test)?.strip_prefix('=').map(str::to_owned)
}

/// Starts the test a second time, giving it something ([`given`]).
pub fn second(test: &str, something: &str) -> Child {
    again(test, &format!("{test}={something}")).stdin(Stdio::piped()).spawn().unwrap()
}

fn again(test: &str, value: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ALONE, value);
    // The harness's own lines would be counted as those of this program; what fails is said on stderr.
    command.stdout(Stdio::null());
    command
}

/// A forked child. Killed and reaped when dropped.
pub struct Forked {
    pid: i32,
    reaped: bool,
}

impl Forked {
    /// # Safety
    ///
    /// `act` makes async-signal-safe calls only: it does not allocate, lock or panic.
    pub unsafe fn new(act: impl FnOnce()) -> Self {
        // SAFETY: the child does only what `act` promises, and ends without running anything of the parent's.
        match unsafe { libc::fork() } {
            0 => {
                act();
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(0) }
            }
            pid => {
                assert!(pid > 0, "{}", std::io::Error::last_os_error());
                Self { pid, reaped: false }
            }
        }
    }

    /// A child that does nothing until it is killed.
    pub fn idle() -> Self {
        // SAFETY: pause(2) is async-signal-safe.
        unsafe { Self::new(idle) }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends it, if it has not yet, and takes its status.
    pub fn kill_and_reap(&mut self) -> WaitStatus {
        // SAFETY: it is our child and not reaped, so the number is still its.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        self.reap()
    }

    pub fn reap(&mut self) -> WaitStatus {
        self.reaped = true;
        waitpid(Pid::from_raw(self.pid), None).unwrap()
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill_and_reap();
        }
    }
}

/// For a child: waits to be killed.
pub fn idle() {
    loop {
        // SAFETY: touches nothing.
        unsafe { libc::pause() };
    }
}

/// A child with a uffd of its own memory, which it has sent here as a served process does; afterwards it does `then`.
///
/// # Safety
///
/// As for [`Forked::new`].
pub unsafe fn child_with_uffd(then: impl FnOnce()) -> (Forked, Userfaultfd) {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
    // SAFETY: system calls on memory of the child's stack only, then the caller's promise.
    let child = unsafe {
        Forked::new(|| {
            send_raw(theirs.as_raw_fd(), new_uffd());
            then();
        })
    };
    let mut byte = [0];
    let fd: OwnedFd = recv_exact(ours.as_fd(), &mut byte, 1, DEADLINE).unwrap().pop().unwrap();
    (child, Userfaultfd::adopt(fd).unwrap())
}

/// For a child: a uffd whose handshake is made, without events, for faults of user mode, which everybody may have.
fn new_uffd() -> RawFd {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | sys::UFFD_USER_MODE_ONLY as i32;
    // SAFETY: takes a number.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as RawFd;
    let mut api = sys::uffdio_api { api: sys::UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: `api` lives across the call and has the size that the number encodes.
    unsafe { libc::ioctl(fd, sys::UFFDIO_API as _, &raw mut api) };
    fd
}

/// For a child: one byte and one descriptor, without allocating.
fn send_raw(socket: RawFd, fd: RawFd) {
    #[repr(C, align(8))]
    struct Control {
        header: libc::cmsghdr,
        fd: RawFd,
        padding: i32,
    }
    // SAFETY: all zeros is a valid control message header.
    let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
    header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<RawFd>()) as _;
    header.cmsg_level = libc::SOL_SOCKET;
    header.cmsg_type = libc::SCM_RIGHTS;
    let mut control = Control { header, fd, padding: 0 };
    let mut byte = 0_u8;
    let mut piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: all zeros is a valid message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: everything the message points to lives across the call.
    unsafe { libc::sendmsg(socket, &raw const message, 0) };
}

/// Asks until it is so, and fails when it never is.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

/// The system call that a thread of this process sleeps in.
pub fn sleeps_in(thread: i32, call: libc::c_long) -> bool {
    let text = fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap_or_default();
    text.split(' ').next() == Some(&call.to_string())
}

/// Huge pages of 2 MiB that this test program may use, given back when dropped; one test has them at a time.
pub struct HugePages {
    before: Option<String>,
    _turn: MutexGuard<'static, ()>,
}

pub const HUGE: usize = 2 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

impl HugePages {
    /// `count` free ones, or a printed reason why not.
    pub fn reserve(count: usize) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |name: &str| -> usize {
            let text = fs::read_to_string(format!("{POOL}/{name}")).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        // Those that somebody has reserved are free, but not to be had.
        let free = || number("free_hugepages").saturating_sub(number("resv_hugepages"));
        let mut pool = Self { before: None, _turn: turn };
        if free() < count {
            let before = number("nr_hugepages");
            let wanted = before + count - free();
            if let Err(error) = fs::write(format!("{POOL}/nr_hugepages"), wanted.to_string()) {
                eprintln!("skipped: no {count} free huge pages of 2 MiB, and no more can be had: {error}");
                return None;
            }
            pool.before = Some(before.to_string());
        }
        let free = free();
        if free < count {
            eprintln!("skipped: {free} huge pages of 2 MiB could be had, {count} are needed");
            return None;
        }
        Some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            fs::write(format!("{POOL}/nr_hugepages"), before).unwrap();
        }
    }
}
