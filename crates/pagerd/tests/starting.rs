//! A holder that cannot start a daemon at this moment: it has no descriptor free.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::guest::{self, Guest};
use support::service::Service;
use support::stage::{Stage, daemon_of};

/// Of the holder: standard input, output and error.
const NO_OTHER: libc::rlim_t = 3;

/// Not a test: the process that the others have served.
#[test]
fn a_guest() {
    guest::run_if_asked();
}

/// Has a process open no more than so many descriptors; how many it might before.
fn limit(pid: i32, most: libc::rlim_t) -> libc::rlim_t {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the limit that it finds to `before`.
    let read = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut before) };
    assert_eq!(read, 0);
    let limit = libc::rlimit { rlim_cur: most, ..before };
    // SAFETY: the kernel reads `limit`.
    let written = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(written, 0);
    before.rlim_cur
}

/// A guest whose daemon has died, and whose holder cannot start another; how many descriptors that may have otherwise.
fn without_a_daemon(stage: &Stage, service: &Service) -> (Guest, libc::rlim_t) {
    let mut guest = stage.unstored_guest(json!({}));
    guest.reads(1);
    guest.has_read(1);
    let daemon = daemon_of(service);
    let heir = |pid| support::service::comm(pid) == "uffd-heir";
    let spare = service.others().into_iter().find(|&pid| pid != daemon && !heir(pid)).unwrap();
    let before = limit(service.pid(), NO_OTHER);
    kill(Pid::from_raw(spare), Signal::SIGKILL).unwrap();
    service.says("the spare daemon has died");
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    service.says("it is tried again");
    guest.reads(2);
    (guest, before)
}

#[test]
fn a_daemon_that_cannot_be_started_for_a_moment_is_started_when_it_can_and_nothing_has_ended() {
    let stage = Stage::new(0);
    let service = stage.manager.started();
    let (mut guest, before) = without_a_daemon(&stage, &service);
    // Many attempts.
    std::thread::sleep(Duration::from_secs(1));

    limit(service.pid(), before);

    guest.has_read(2);
    assert_eq!(guest.hash(), stage.hash);
    stage.serves(&[guest.session]);
}

#[test]
fn a_holder_without_a_daemon_that_is_told_to_end_does_and_what_it_had_meets_its_policy() {
    let stage = Stage::new(0);
    let service = stage.manager.started();
    let (mut guest, before) = without_a_daemon(&stage, &service);

    // A policy takes descriptors, too.
    service.signal(Signal::SIGSTOP);
    service.signal(Signal::SIGTERM);
    limit(service.pid(), before);
    service.signal(Signal::SIGCONT);

    assert_eq!(guest.ends().signal(), Some(Signal::SIGBUS as i32));
    service.ends();
}
