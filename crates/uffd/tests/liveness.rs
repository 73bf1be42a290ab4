//! Knowing that a process is gone: by its pidfd, by its uffd, and by a page registered with many uffds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod processes;
mod support;

use std::fs;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use uffd::liveness::{DeadUffdChecker, LivenessError, PidFd};
use uffd::{Event, Features, MappingKind, Modes, UffdError};

use processes::{DEADLINE, Forked, child_with_uffd, given, idle, second, until};
use support::{elsewhere, events, finish, pages, register, uffd};

/// A child with a uffd of its own memory, which does nothing until it is killed.
fn idle_child_with_uffd() -> (Forked, uffd::Userfaultfd) {
    // SAFETY: pause(2) is async-signal-safe.
    unsafe { child_with_uffd(idle) }
}

#[test]
fn the_pidfd_of_a_process_that_lives_says_so() {
    let child = Forked::idle();

    let process = PidFd::open(child.pid()).unwrap();

    assert_eq!(process.pid(), child.pid());
    assert!(!process.has_exited().unwrap());
}

#[test]
fn waiting_for_a_process_that_lives_ends_with_the_timeout() {
    const SOON: Duration = Duration::from_millis(50);
    let child = Forked::idle();
    let process = PidFd::open(child.pid()).unwrap();
    let start = Instant::now();

    assert!(!process.wait(SOON).unwrap());

    assert!(start.elapsed() >= SOON);
}

#[test]
fn a_killed_process_is_known_to_have_exited_before_and_after_it_is_reaped() {
    let mut child = Forked::idle();
    let process = PidFd::open(child.pid()).unwrap();

    process.send_signal(libc::SIGKILL).unwrap();

    assert!(process.wait(DEADLINE).unwrap());
    assert!(process.has_exited().unwrap());
    child.reap();
    assert!(process.has_exited().unwrap());
}

#[test]
fn the_pidfd_of_a_process_that_exits_becomes_readable() {
    let mut child = Forked::idle();
    let process = PidFd::open(child.pid()).unwrap();
    let readable = |timeout: PollTimeout| {
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).unwrap() == 1
    };
    assert!(!readable(PollTimeout::ZERO));

    child.kill_and_reap();

    assert!(readable(PollTimeout::from(10_000_u16)));
}

#[test]
fn a_signal_reaches_the_process() {
    let mut child = Forked::idle();
    let process = PidFd::open(child.pid()).unwrap();

    process.send_signal(libc::SIGTERM).unwrap();

    assert!(matches!(child.reap(), WaitStatus::Signaled(_, Signal::SIGTERM, _)));
}

#[test]
fn a_signal_to_a_process_that_was_reaped_reaches_nobody() {
    let mut child = Forked::idle();
    let process = PidFd::open(child.pid()).unwrap();
    child.kill_and_reap();

    let error = process.send_signal(0).unwrap_err();

    assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
}

#[test]
fn a_process_that_was_reaped_cannot_be_opened() {
    let mut child = Forked::idle();
    child.kill_and_reap();

    assert!(matches!(PidFd::open(child.pid()), Err(LivenessError::Gone)));
}

#[test]
fn a_number_that_is_no_process_is_refused_with_the_name_of_the_call() {
    let error = PidFd::open(-1).unwrap_err();

    assert_eq!(error.to_string(), "pidfd_open: Invalid argument (os error 22)");
}

#[test]
fn a_clone_outlives_the_original() {
    let mut child = Forked::idle();
    let process = PidFd::open(child.pid()).unwrap();
    let clone = process.try_clone().unwrap();
    drop(process);

    child.kill_and_reap();

    assert!(clone.has_exited().unwrap());
    assert_eq!(clone.pid(), child.pid());
}

/// A process at the other end of a socket that lives until its stdin ends.
fn peer(test: &str) -> Option<(std::process::Child, UnixStream)> {
    if let Some(path) = given(test) {
        let _stream = UnixStream::connect(path).unwrap();
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return None;
    }
    let path = std::env::temp_dir().join(format!("uffd-{test}-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let child = second(test, path.to_str().unwrap());
    let mut accepted = None;
    until("the second process connects", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    fs::remove_file(path).unwrap();
    Some((child, accepted.unwrap().0))
}

#[test]
fn the_pidfd_of_a_peer_is_that_of_the_process_that_connected() {
    let name = "the_pidfd_of_a_peer_is_that_of_the_process_that_connected";
    let Some((mut child, socket)) = peer(name) else { return };

    let process = PidFd::of_peer(socket.as_fd()).unwrap();

    assert_eq!(process.pid(), child.id() as i32);
    assert!(!process.has_exited().unwrap());
    drop(child.stdin.take());
    assert!(process.wait(DEADLINE).unwrap());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_peer_that_was_reaped_is_gone() {
    let Some((mut child, socket)) = peer("a_peer_that_was_reaped_is_gone") else { return };
    child.kill().unwrap();
    child.wait().unwrap();

    let peer = PidFd::of_peer(socket.as_fd());

    assert!(matches!(peer, Err(LivenessError::Gone)), "{peer:?}");
}

#[test]
fn a_peer_that_has_exited_and_was_not_reaped_is_known_to_have_exited() {
    let name = "a_peer_that_has_exited_and_was_not_reaped_is_known_to_have_exited";
    let Some((mut child, socket)) = peer(name) else { return };
    let before = PidFd::of_peer(socket.as_fd()).unwrap();
    child.kill().unwrap();
    assert!(before.wait(DEADLINE).unwrap());

    let process = PidFd::of_peer(socket.as_fd()).unwrap();

    assert!(process.has_exited().unwrap());
    child.wait().unwrap();
}

#[test]
fn a_socket_without_a_peer_is_refused_and_not_called_gone() {
    let path = std::env::temp_dir().join(format!("uffd-no-peer-{}", std::process::id()));
    let file = fs::File::create(&path).unwrap();
    fs::remove_file(path).unwrap();

    assert!(matches!(
        PidFd::of_peer(file.as_fd()),
        Err(LivenessError::System { syscall: "SO_PEERCRED", .. })
    ));
}

#[test]
fn a_uffd_is_dead_once_its_process_is_killed() {
    let (mut child, uffd) = idle_child_with_uffd();
    assert!(!uffd.is_dead());

    child.kill_and_reap();

    assert!(uffd.is_dead());
}

#[test]
fn a_uffd_is_dead_once_its_process_calls_exec() {
    let program = c"/bin/sleep";
    let arguments = [program.as_ptr(), c"60".as_ptr(), std::ptr::null()];
    let (gate, mut open) = pipe().unwrap();
    let at_the_gate = || {
        let mut byte = 0_u8;
        // SAFETY: room for the one byte.
        unsafe { libc::read(gate.as_raw_fd(), (&raw mut byte).cast(), 1) };
        // SAFETY: the arguments were made before the fork and end with a null pointer.
        unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
    };
    // SAFETY: read(2) and execv(2) are async-signal-safe.
    let (child, uffd) = unsafe { child_with_uffd(at_the_gate) };
    assert!(!uffd.is_dead());

    open.write_all(b"x").unwrap();

    until("the child's memory is replaced", || uffd.is_dead());

    let process = PidFd::open(child.pid()).unwrap();
    assert!(!process.has_exited().unwrap(), "it was to be dead by exec, not by exit");
}

#[test]
fn the_checker_tells_the_dead_from_the_living() {
    let checker = DeadUffdChecker::new().unwrap();
    let (mut killed, of_killed) = idle_child_with_uffd();
    let (_lives, of_living) = idle_child_with_uffd();
    checker.register(&of_killed).unwrap();
    checker.register(&of_living).unwrap();
    let dead = || [checker.is_dead(&of_killed), checker.is_dead(&of_living)];
    assert_eq!(dead(), [false, false]);

    killed.kill_and_reap();

    assert_eq!(dead(), [true, false]);
    checker.reset().unwrap();
    assert_eq!(dead(), [true, false]);
}

#[test]
fn the_checker_cannot_be_registered_with_the_dead() {
    let checker = DeadUffdChecker::new().unwrap();
    let (mut child, uffd) = idle_child_with_uffd();
    child.kill_and_reap();

    assert_eq!(checker.register(&uffd), Err(UffdError::UffdClosed));
    assert!(checker.is_dead(&uffd));
}

#[test]
fn a_uffd_that_the_page_was_not_registered_with_is_alive() {
    let checker = DeadUffdChecker::new().unwrap();
    let (_child, uffd) = idle_child_with_uffd();

    assert!(!checker.is_dead(&uffd));
}

#[test]
fn a_reset_empties_the_page_that_a_check_filled() {
    let checker = DeadUffdChecker::new().unwrap();
    let Some(uffd) = uffd(Features::empty()) else { return };
    checker.register(&uffd).unwrap();
    let fill = || uffd.zero(checker.range().start, checker.range().end - checker.range().start, true);

    assert!(!checker.is_dead(&uffd));
    assert_eq!(fill(), Err(UffdError::PageExist));
    checker.reset().unwrap();

    assert_eq!(fill(), Ok(()));
}

#[test]
fn a_reset_empties_the_page_in_a_child_too() {
    let checker = DeadUffdChecker::new().unwrap();
    let (_child, uffd) = idle_child_with_uffd();
    checker.register(&uffd).unwrap();
    let fill = || uffd.zero(checker.range().start, checker.range().end - checker.range().start, true);

    assert!(!checker.is_dead(&uffd));
    checker.reset().unwrap();

    assert_eq!(fill(), Ok(()));
}

#[test]
fn where_remove_events_are_on_a_reset_waits_until_its_event_was_read() {
    let Some(uffd) = uffd(Features::EVENT_REMOVE) else { return };
    let checker = Arc::new(DeadUffdChecker::new().unwrap());
    checker.register(&uffd).unwrap();
    assert!(!checker.is_dead(&uffd));
    let resetting = Arc::clone(&checker);
    let reset = elsewhere(move || resetting.reset());

    // Alive also while the event is unread, when the kernel refuses to fill anything.
    until("the event is there", || uffd.zero(checker.range().start, 4096, true) == Err(UffdError::Changing));
    assert!(!checker.is_dead(&uffd));
    assert!(reset.try_recv().is_err(), "it did not wait");
    let removed = events(&uffd, 1).remove(0);

    let range = checker.range();
    assert!(
        matches!(removed, Event::Remove { start, end } if (start..end) == range),
        "{removed:?} instead of {range:x?}"
    );
    assert_eq!(finish(&reset), Ok(()));
}

#[test]
fn a_check_wakes_and_fills_nothing_but_its_own_page() {
    let checker = DeadUffdChecker::new().unwrap();
    let Some(uffd) = uffd(Features::empty()) else { return };
    let mapping = pages(1, MappingKind::Private);
    register(&uffd, &mapping, Modes::MISSING);
    checker.register(&uffd).unwrap();

    assert!(!checker.is_dead(&uffd));

    assert_eq!(uffd.zero(mapping.address(), mapping.len() as u64, true), Ok(()));
}

#[test]
fn a_userfaultfd_of_this_process_is_told_from_one_of_another() {
    let Some(own) = uffd(Features::empty()) else { return };
    let sent = uffd::Userfaultfd::adopt(own.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let child = idle_child_with_uffd();

    assert!(own.is_of_this_process());
    assert!(sent.origin().is_none() && sent.is_of_this_process());
    assert!(!child.1.is_of_this_process());
    let mut child = child;
    child.0.kill_and_reap();
    assert!(!child.1.is_of_this_process(), "nobody's");
}
