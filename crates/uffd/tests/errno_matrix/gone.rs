//! The uffd of a process that has exited (reaped or not) or called exec.

use std::io::pipe;
use std::os::fd::AsRawFd;
use std::ptr::null;

use uffd::liveness::PidFd;
use uffd::{ContinueOptions, CopyOptions, MappingKind, MoveOptions, Userfaultfd};

use crate::processes::{Forked, child_with_uffd, idle, until};
use crate::support::{DEADLINE, PAGE, pages};
use crate::tables::{Done, EINVAL, Expect, GONE, Outcome, Row, row};
use crate::world::M;

type Gone = fn() -> (Forked, Userfaultfd);

const STATES: [(&str, Gone); 3] = [("exited", reaped), ("zombie", zombie), ("exec'ed", execed)];

fn reaped() -> (Forked, Userfaultfd) {
    // SAFETY: pause(2) is async-signal-safe.
    let (mut child, uffd) = unsafe { child_with_uffd(idle) };
    child.kill_and_reap();
    (child, uffd)
}

fn zombie() -> (Forked, Userfaultfd) {
    // SAFETY: it does nothing but exit.
    let (child, uffd) = unsafe { let_go(|| {}) };
    assert!(PidFd::open(child.pid()).unwrap().wait(DEADLINE).unwrap());
    (child, uffd)
}

fn execed() -> (Forked, Userfaultfd) {
    let program = c"/bin/sleep";
    let arguments = [program.as_ptr(), c"60".as_ptr(), null()];
    let exec = || {
        // SAFETY: the arguments were made before the fork and end with a null pointer.
        unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
    };
    // SAFETY: execv(2) is async-signal-safe.
    let (child, uffd) = unsafe { let_go(exec) };
    until("the child's memory is replaced", || uffd.is_dead());
    assert!(!PidFd::open(child.pid()).unwrap().has_exited().unwrap(), "it was to be gone by exec");
    (child, uffd)
}

/// A child that does `then` once its uffd has arrived: that of a process that is gone is not taken.
///
/// # Safety
///
/// As for [`Forked::new`].
unsafe fn let_go(then: impl FnOnce()) -> (Forked, Userfaultfd) {
    let (gate, open) = pipe().unwrap();
    let at_the_gate = || {
        let mut byte = 0_u8;
        // SAFETY: room for the one byte.
        unsafe { libc::read(gate.as_raw_fd(), (&raw mut byte).cast(), 1) };
        then();
    };
    // SAFETY: one system call, and the caller's promise.
    let child = unsafe { child_with_uffd(at_the_gate) };
    nix::unistd::write(&open, &[1]).unwrap();
    child
}

/// An address in a process that is gone.
const THERE: u64 = 0x10_0000;

type Act = fn(&Userfaultfd) -> Outcome;

const ANSWERS: [(&str, Expect, Act); 10] = [
    ("REGISTER: process gone", GONE, |uffd| {
        // SAFETY: no memory of ours is meant.
        unsafe { uffd.register(THERE, PAGE, M) }?;
        Ok(())
    }),
    ("UNREGISTER: process gone", GONE, |uffd| Ok(uffd.unregister(THERE, PAGE)?)),
    ("WAKE: process gone", Done, |uffd| Ok(uffd.wake(THERE, PAGE)?)),
    ("COPY: process gone", GONE, |uffd| {
        let page = vec![0_u8; PAGE as usize];
        // SAFETY: `page` lives across the call.
        Ok(unsafe { uffd.copy(THERE, page.as_ptr(), page.len(), CopyOptions::default()) }?)
    }),
    ("ZEROPAGE: process gone", GONE, |uffd| Ok(uffd.zero(THERE, PAGE, true)?)),
    ("POISON: process gone", GONE, |uffd| Ok(uffd.poison(THERE, PAGE, true)?)),
    ("CONTINUE: process gone", GONE, |uffd| {
        Ok(uffd.continue_pages(THERE, PAGE, ContinueOptions::default())?)
    }),
    ("WRITEPROTECT: process gone", GONE, |uffd| Ok(uffd.write_protect(THERE, PAGE, true, true)?)),
    ("MOVE: process gone", EINVAL, |uffd| {
        let source = pages(1, MappingKind::Private);
        // SAFETY: no memory of ours is at the destination; no reference to the source exists.
        Ok(unsafe { uffd.move_pages(THERE, source.address(), PAGE, MoveOptions::default()) }?)
    }),
    ("ZEROPAGE: process gone, len 0", EINVAL, |uffd| Ok(uffd.zero(THERE, 0, true)?)),
];

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (state, make) in STATES {
        for (case, expect, act) in ANSWERS {
            rows.push(row(format!("{case} ({state})"), expect, move || {
                let (_child, uffd) = make();
                act(&uffd)
            }));
        }
    }
    rows
}
