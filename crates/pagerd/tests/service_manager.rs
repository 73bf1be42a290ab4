//! The daemon under a service manager: it listens, starts the service with the socket as descriptor 3, and believes what the main
//! process tells it on a datagram socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::client::Client;
use support::service::{Service, is_alive};
use support::{DEADLINE, Manager, Notify};

fn environment_of(pid: i64) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/environ")).unwrap()).into_owned()
}

#[test]
fn a_client_that_comes_early_waits_and_ready_is_told_once_by_the_main_process() {
    for notify in [Notify::Path, Notify::Abstract] {
        let manager = Manager::new(notify);
        // Nobody serves yet: it waits in the socket's queue.
        let mut early = Client::connect(&manager.path());

        let service = manager.start();

        assert_eq!(manager.notified.hears(), ("READY=1".to_owned(), service.pid()));
        let welcome = early.hello();
        assert_eq!(welcome["holder"], service.pid());
        let daemon = welcome["pid"].as_i64().unwrap();
        let environment = environment_of(daemon);
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"] {
            assert!(!environment.contains(name), "{name} is not the daemon's: {environment}");
        }
        let flags = fs::read_to_string(format!("/proc/{}/fdinfo/3", service.pid())).unwrap();
        let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        assert_eq!(flags & libc::O_CLOEXEC, libc::O_CLOEXEC, "no other program gets the socket");
        manager.notified.hears_nothing();
    }
}

#[test]
fn a_daemon_that_is_replaced_is_no_matter_of_the_manager() {
    let manager = Manager::new(Notify::Path);
    let service = manager.start();
    assert_eq!(manager.notified.hears().0, "READY=1");
    let first = Client::connect(&manager.path()).hello()["pid"].as_i64().unwrap();

    kill(Pid::from_raw(first as i32), Signal::SIGKILL).unwrap();

    let started = Instant::now();
    let next = loop {
        let mut client = Client::connect(&manager.path());
        let pid = client.hello()["pid"].as_i64();
        // The one that was killed may have taken the connection.
        if pid.is_some_and(|pid| pid != first) {
            break pid;
        }
        assert!(started.elapsed() < DEADLINE);
    };
    assert_ne!(next, Some(first));
    manager.notified.hears_nothing();
    service.signal(Signal::SIGTERM);
    assert_eq!(manager.notified.hears(), ("STOPPING=1".to_owned(), service.pid()));
}

#[test]
fn a_daemon_that_hangs_is_replaced_and_the_manager_hears_of_a_service_that_is_well() {
    let mut manager = Manager::new(Notify::Path);
    const PATIENCE: Duration = Duration::from_secs(2);
    manager.environment.push(("WATCHDOG_USEC".to_owned(), PATIENCE.as_micros().to_string()));
    let service = manager.start();
    let well = ("WATCHDOG=1".to_owned(), service.pid());
    let first = Client::connect(&manager.path()).hello()["pid"].as_i64().unwrap() as i32;
    let mut last = Instant::now();
    let mut longest = Duration::ZERO;
    let mut hears = || loop {
        let told = manager.notified.hears();
        if told == well {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            return;
        }
        assert_eq!(told.0, "READY=1");
    };
    (0..8).for_each(|_| hears());
    assert!(is_alive(first), "one that is idle is well");

    kill(Pid::from_raw(first), Signal::SIGSTOP).unwrap();

    let stopped = Instant::now();
    while is_alive(first) {
        assert!(stopped.elapsed() < DEADLINE, "it is not replaced");
        hears();
    }
    service.says("has not been heard of for");
    (0..4).for_each(|_| hears());
    assert!(longest < PATIENCE, "{longest:?}");
    assert_ne!(Client::connect(&manager.path()).hello()["pid"], first);
}

#[test]
fn an_end_is_told_when_it_begins_and_leaves_the_managers_socket() {
    let manager = Manager::new(Notify::Path);
    let service = manager.start();
    assert_eq!(manager.notified.hears().0, "READY=1");

    service.signal(Signal::SIGTERM);

    assert_eq!(manager.notified.hears(), ("STOPPING=1".to_owned(), service.pid()));
    assert_eq!(service.ends().0, Some(0));
    manager.notified.hears_nothing();
    assert!(manager.path().exists(), "it is the manager's");
    let again = manager.start();
    assert_eq!(manager.notified.hears(), ("READY=1".to_owned(), again.pid()));

    let mut client = Client::connect(&manager.path());
    client.hello();
    assert!(client.ask("shutdown", &Value::Null, &[])["error"].is_null());
    assert_eq!(manager.notified.hears(), ("STOPPING=1".to_owned(), again.pid()));
    assert_eq!(again.ends().0, Some(0));
}

#[test]
fn what_is_not_one_listening_socket_for_this_very_process_is_refused_by_name() {
    let manager = Manager::new(Notify::Path);
    let one = |fd: OwnedFd| vec![("userfaultfd-pagerd.socket".to_owned(), fd)];
    let listener = || one(manager.listener.as_fd().try_clone_to_owned().unwrap());
    let two = || listener().into_iter().chain(listener()).collect();
    let refused = |mut command: Command| {
        let (status, said) = Service::spawn(&mut command).ends();
        assert_eq!(status, Some(1));
        manager.notified.hears_nothing();
        said
    };

    assert!(refused(manager.command(two(), "2")).contains("2 sockets were passed (LISTEN_FDS)"));
    assert!(refused(manager.command(listener(), "0")).contains("no socket"));

    let mut anothers = Command::new(env!("CARGO_BIN_EXE_userfaultfd-pagerd"));
    anothers.env("LISTEN_FDS", "1").env("LISTEN_PID", "1").stdout(Stdio::piped()).stderr(Stdio::null());
    assert!(refused(anothers).contains("no socket"));

    let file = fs::File::open("/dev/null").unwrap().into();
    assert!(refused(manager.command(one(file), "1")).contains("pass a listening Unix stream socket"));
    let (connected, _other) = UnixStream::pair().unwrap();
    assert!(
        refused(manager.command(one(connected.into()), "1")).contains("pass a listening Unix stream socket")
    );
}
