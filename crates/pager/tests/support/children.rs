//! Forked children, which do only what a child of a threaded process may (async-signal-safe calls).

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{DEADLINE, elsewhere, finish};

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
