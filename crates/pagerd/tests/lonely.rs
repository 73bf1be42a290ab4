//! A daemon whose holder is gone, or of another version: a test is its holder.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde_json::{Value, json};
use support::client::Client;
use support::{DEADLINE, until};
use tempfile::TempDir;
use uffd::fd_passing::{self, MOST_FDS};

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
fn start(dir: &TempDir, said_by_others: &Value) -> (Daemon, OwnedFd) {
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
    let mut go = json!({ "go": {
        "epoch": 1, "takeover": true, "holder": std::process::id(), "allow": [], "confine": "all",
        "lonely_for": LONELY.as_millis() as u64,
    } });
    go["go"].as_object_mut().unwrap().extend(said_by_others.as_object().unwrap().clone());
    fd_passing::send_all(ours.as_fd(), go.to_string().as_bytes(), &[], DEADLINE).unwrap();
    (child, ours)
}

#[test]
fn a_daemon_whose_holder_is_gone_ends_once_nobody_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, holder) = start(&dir, &json!({}));
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

/// What the daemon says to its holder of this kind, before anything of that.
fn hears(holder: &OwnedFd, kind: &str, before: &str) -> Value {
    loop {
        let mut packet = vec![0; 32 << 10];
        let mut said = None;
        until(kind, || {
            said = fd_passing::recv(holder.as_fd(), &mut packet, MOST_FDS).ok();
            said.is_some()
        });
        let message: Value = serde_json::from_slice(&packet[..said.unwrap().len]).unwrap();
        if !message[kind].is_null() {
            return message[kind].clone();
        }
        assert!(message[before].is_null(), "{message}");
    }
}

/// A client that asks for an upgrade, and what it is answered.
fn asks_for(dir: &TempDir, executable: &str) -> JoinHandle<Value> {
    let mut client = Client::connect(&dir.path().join("pager.sock"));
    client.hello();
    let executable = json!({ "executable": executable });
    std::thread::spawn(move || client.ask("upgrade", &executable, &[]))
}

#[test]
fn a_holder_of_an_earlier_version_is_told_of_an_upgrade_and_proves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, holder) = start(&dir, &json!({}));

    let asked = asks_for(&dir, "/bin/true");

    assert_eq!(asked.join().unwrap()["result"]["epoch"], 1);
    assert_eq!(hears(&holder, "upgrade", "prove")["executable"], "/bin/true");
}

#[test]
fn a_holder_proves_an_executable_before_it_is_told_of_the_upgrade_and_one_that_dies_meanwhile_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, holder) = start(&dir, &json!({ "upgrades": [] }));
    let relative = asks_for(&dir, "pagerd").join().unwrap();
    assert!(relative["error"]["message"].as_str().unwrap().contains("absolute"), "{relative}");

    let asked = asks_for(&dir, "/bin/true");
    assert_eq!(hears(&holder, "prove", "upgrade")["executable"], "/bin/true");
    let proved = json!({ "proved": { "unfit": null } }).to_string();
    fd_passing::send_all(holder.as_fd(), proved.as_bytes(), &[], DEADLINE).unwrap();
    assert_eq!(asked.join().unwrap()["result"]["epoch"], 1);
    hears(&holder, "upgrade", "prove");

    let asked = asks_for(&dir, "/bin/true");
    hears(&holder, "prove", "upgrade");
    drop(holder);
    assert_eq!(asked.join().unwrap()["error"]["data"]["code"], "ERR_UFFD_PAGER_LOST");
}

#[test]
fn what_a_client_that_is_gone_had_open_is_let_go_of_although_no_other_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, holder) = start(&dir, &json!({}));
    // At once, so that the daemon has just looked.
    for source in 1..=3 {
        let mut client = Client::connect(&dir.path().join("pager.sock"));
        client.hello();
        let zeros = json!({ "source": source, "description": { "kind": "zero", "size": 4096 } });
        assert!(client.ask("source.open", &zeros, &[])["error"].is_null());
    }
    let mut gone: Vec<Value> = (1..=3).map(|_| hears(&holder, "forget", "stopping")["key"].clone()).collect();
    gone.sort_by_key(Value::to_string);
    assert_eq!(gone, ["source:by hand:1", "source:by hand:2", "source:by hand:3"]);
}
