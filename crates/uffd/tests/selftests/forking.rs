//! Forked children of a process that reads its own FORK events.

use std::sync::mpsc::Receiver;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use uffd::liveness::PidFd;
use uffd::pagemap::Pagemap;
use uffd::{Event, Userfaultfd};

use crate::support::{elsewhere, events, finish};

/// A forked child. Killed and reaped when dropped.
pub struct Child {
    pid: i32,
    reaped: bool,
}

impl Child {
    /// What it exited with.
    pub fn exit_code(mut self) -> i32 {
        self.reaped = true;
        match waitpid(Pid::from_raw(self.pid), None).unwrap() {
            WaitStatus::Exited(_, code) => code,
            other => panic!("{other:?}"),
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn pagemap(&self) -> Pagemap {
        Pagemap::of_process(&PidFd::open(self.pid).unwrap()).unwrap()
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

/// Forks on another thread; the child does `act` and exits with what it returns. It comes when the FORK event, if there
/// is one, has been read.
///
/// By the bare system call: fork(3) holds the allocator's locks until then, and the reader may allocate.
///
/// # Safety
///
/// `act` makes async-signal-safe calls only: it does not allocate, lock or panic.
pub unsafe fn fork(act: impl FnOnce() -> i32 + Send + 'static) -> Receiver<Child> {
    elsewhere(move || {
        // SAFETY: a plain fork; the child does what `act` promises, and ends without running anything of the parent's.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            let code = act();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) };
        }
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        Child { pid: i32::try_from(pid).unwrap(), reaped: false }
    })
}

/// A child that waits to be killed. With `uffd`, its FORK event is read: the second is the child's.
pub fn idle_child(uffd: Option<&Userfaultfd>) -> (Child, Option<Userfaultfd>) {
    // SAFETY: pause(2) is async-signal-safe.
    let child = unsafe {
        fork(|| {
            crate::processes::idle();
            0
        })
    };
    let of_child = uffd.map(forked);
    (finish(&child), of_child)
}

/// The child's userfaultfd, from the FORK event that comes next.
pub fn forked(uffd: &Userfaultfd) -> Userfaultfd {
    match events(uffd, 1).remove(0) {
        Event::Fork { child } => child,
        other => panic!("{other:?}"),
    }
}
