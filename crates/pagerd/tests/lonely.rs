//! A daemon whose holder is gone, told by a test that is its holder.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde_json::json;
use support::client::Client;
use support::{DEADLINE, until};
use tempfile::TempDir;
use uffd::fd_passing;

const LONELY: Duration = Duration::from_millis(700);

/// Ended with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a daemon with a holder's words.
fn start(dir: &TempDir) -> (Daemon, OwnedFd) {
    let listener = UnixListener::bind(dir.path().join("pager.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )
    .unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_userfaultfd-pagerd"));
    command.args(["--daemon", &theirs.as_raw_fd().to_string()]).stdin(Stdio::null()).stderr(Stdio::null());
    let child = Daemon(command.spawn().unwrap());
    let keep = json!({ "keep": { "key": "listener", "value": null } }).to_string();
    fd_passing::send_all(ours.as_fd(), keep.as_bytes(), &[listener.as_fd()], DEADLINE).unwrap();
    let go = json!({ "go": {
        "epoch": 1, "takeover": true, "holder": std::process::id(), "allow": [], "confine": "all",
        "lonely_for": LONELY.as_millis() as u64,
    } });
    fd_passing::send_all(ours.as_fd(), go.to_string().as_bytes(), &[], DEADLINE).unwrap();
    (child, ours)
}

#[test]
fn a_daemon_whose_holder_is_gone_ends_once_nobody_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, holder) = start(&dir);
    let mut client = Client::connect(&dir.path().join("pager.sock"));
    client.hello();
    std::thread::sleep(2 * LONELY);
    assert!(daemon.0.try_wait().unwrap().is_none(), "it has a holder");

    drop(holder);
    std::thread::sleep(2 * LONELY);
    assert!(daemon.0.try_wait().unwrap().is_none(), "it has a client");

    let gone = Instant::now();
    drop(client);
    let mut status = None;
    until("it has ended", || {
        status = daemon.0.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
    assert!(gone.elapsed() >= LONELY, "{:?}", gone.elapsed());
}
