//! A service manager that does to the byte what sd_listen_fds(3) and sd_notify(3) say, the service that it starts, and who uses that.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

pub mod client;
pub mod guest;
pub mod notified;
pub mod service;
pub mod stage;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::dup2_raw;
use notified::{Notified, Store};
use service::Service;
use tempfile::TempDir;

/// Long enough for a busy machine; a test that waits this long has failed.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Waits until something is so that nothing tells of.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "in vain was waited until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where the manager hears of its service.
pub enum Notify {
    Path,
    Abstract,
}

pub struct Manager {
    pub dir: TempDir,
    pub listener: UnixListener,
    pub notified: Notified,
    notify_name: String,
    /// FileDescriptorStoreMax=
    most: usize,
    /// Options of the service.
    pub options: Vec<String>,
    /// Of its environment.
    pub environment: Vec<(String, String)>,
}

impl Manager {
    pub fn new(notify: Notify) -> Self {
        Self::with_store(notify, 0)
    }

    /// With a store for so many descriptors.
    pub fn with_store(notify: Notify, most: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("pager.sock")).unwrap();
        let (socket, notify_name) = match notify {
            Notify::Path => {
                let path = dir.path().join("notify");
                (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned())
            }
            Notify::Abstract => {
                let name = format!("userfaultfd-test-{}-{:p}", std::process::id(), &raw const dir);
                let address = SocketAddr::from_abstract_name(&name).unwrap();
                (UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"))
            }
        };
        setsockopt(&socket, sockopt::PassCred, &true).unwrap();
        let notified = Notified::new(socket, most);
        Self { dir, listener, notified, notify_name, most, options: Vec::new(), environment: Vec::new() }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("pager.sock")
    }

    pub fn store(&self) -> &Store {
        &self.notified.store
    }

    /// The command of the service, with these from descriptor 3 on, each with its name. Its number is known only to itself before exec(3): a
    /// shell becomes it.
    pub fn command(&self, passed: Vec<(String, OwnedFd)>, count: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        let (names, fds): (Vec<String>, Vec<OwnedFd>) = passed.into_iter().unzip();
        command
            .args(["-c", "export LISTEN_PID=$$ WATCHDOG_PID=$$; exec \"$0\" \"$@\""])
            .arg(env!("CARGO_BIN_EXE_userfaultfd-pagerd"))
            .args(&self.options)
            .env("LISTEN_FDS", count)
            .env("LISTEN_FDNAMES", names.join(":"))
            .env("NOTIFY_SOCKET", &self.notify_name)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if self.most > 0 {
            command.env("FDSTORE", self.most.to_string());
        }
        // Out of the way of those numbers.
        let high = |fd: OwnedFd| {
            let raw = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(500)).unwrap();
            // SAFETY: fcntl has just made it.
            unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) }
        };
        let fds: Vec<OwnedFd> = fds.into_iter().map(high).collect();
        // SAFETY: between fork and exec it calls dup2 and fcntl, which may be called there, and nothing else.
        unsafe { command.pre_exec(move || (3..).zip(&fds).try_for_each(|(at, fd)| pass(fd, at))) };
        command
    }

    /// What is passed at each start: the socket, then what was stored, in the order in which systemd has it.
    pub fn passed(&self) -> Vec<(String, OwnedFd)> {
        let socket = self.listener.as_fd().try_clone_to_owned().unwrap();
        [("userfaultfd-pagerd.socket".to_owned(), socket)].into_iter().chain(self.store().all()).collect()
    }

    pub fn start(&self) -> Service {
        let passed = self.passed();
        let count = passed.len().to_string();
        Service::spawn(&mut self.command(passed, &count))
    }

    /// Starts it, and waits until it is ready.
    pub fn started(&self) -> Service {
        let service = self.start();
        assert_eq!(self.notified.hears(), ("READY=1".to_owned(), service.pid()));
        service
    }
}

/// Descriptor `at` of the program that is about to be run.
fn pass(fd: &OwnedFd, at: i32) -> std::io::Result<()> {
    debug_assert!(fd.as_raw_fd() != at);
    // SAFETY: whatever this child had under that number is not used any more: exec follows.
    let passed = unsafe { dup2_raw(fd, at) }?;
    fcntl(&passed, FcntlArg::F_SETFD(FdFlag::empty()))?;
    std::mem::forget(passed);
    Ok(())
}
