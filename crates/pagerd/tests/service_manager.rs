//! The daemon under a service manager that does to the byte what sd_listen_fds(3) and sd_notify(3) say: it listens, starts the service with
//! the socket as descriptor 3, and believes what the main process tells it on a datagram socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, setsockopt, sockopt};
use nix::unistd::{Pid, dup2_raw};
use serde_json::Value;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(10);

/// Where the manager hears of its service.
enum Notify {
    Path,
    Abstract,
}

struct Manager {
    dir: TempDir,
    listener: UnixListener,
    notify: UnixDatagram,
    notify_name: String,
}

impl Manager {
    fn new(notify: Notify) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("pager.sock")).unwrap();
        let (notify, notify_name) = match notify {
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
        setsockopt(&notify, sockopt::PassCred, &true).unwrap();
        notify.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { dir, listener, notify, notify_name }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("pager.sock")
    }

    /// The command of the service, with `third` as descriptor 3. Its number is known only to itself before exec(3): a shell becomes it.
    fn command(&self, third: OwnedFd, count: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_userfaultfd-pagerd")])
            .env("LISTEN_FDS", count)
            .env("LISTEN_FDNAMES", "userfaultfd-pagerd.socket")
            .env("NOTIFY_SOCKET", &self.notify_name)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        // SAFETY: between fork and exec it calls dup2 and fcntl, which may be called there, and nothing else.
        unsafe { command.pre_exec(move || as_third(&third)) };
        command
    }

    fn start(&self) -> Service {
        let third = self.listener.as_fd().try_clone_to_owned().unwrap();
        Service(self.command(third, "1").spawn().unwrap())
    }

    /// What the service tells next, and who it is.
    fn hears(&self) -> (String, i32) {
        let mut text = [0; 256];
        let mut space = nix::cmsg_space!(libc::ucred);
        let mut iov = [IoSliceMut::new(&mut text)];
        let told =
            recvmsg::<UnixAddr>(self.notify.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty())
                .unwrap();
        let sender = told.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
            _ => None,
        });
        let bytes = told.bytes;
        (String::from_utf8(text[..bytes].to_vec()).unwrap(), sender.unwrap())
    }

    fn hears_nothing(&self) {
        self.notify.set_nonblocking(true).unwrap();
        let heard = self.notify.recv(&mut [0; 256]).map_err(|error| error.kind());
        assert_eq!(heard, Err(std::io::ErrorKind::WouldBlock));
        self.notify.set_nonblocking(false).unwrap();
    }
}

/// Descriptor 3 of the program that is about to be run.
fn as_third(fd: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: whatever this child had as its descriptor 3 is not used any more: exec follows.
    let third = unsafe { dup2_raw(fd, 3) }?;
    // It may have been the third all the time.
    fcntl(&third, FcntlArg::F_SETFD(FdFlag::empty()))?;
    std::mem::forget(third);
    Ok(())
}

/// The main process; ended with the test.
struct Service(Child);

impl Service {
    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Its status; what it has said on standard output.
    fn ends(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        (self.0.wait().unwrap().code(), said)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // In order: a daemon whose holder is killed goes on.
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
        }
        let until = Instant::now() + DEADLINE;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::yield_now();
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client that connects, and then says hello.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(BufReader::new(socket))
    }

    fn ask(&mut self, request: &str) -> Value {
        writeln!(self.0.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn hello(&mut self) -> Value {
        let hello = r#"{"jsonrpc":"2.0","id":1,"method":"hello","params":{"protocol":1,"client":"by hand"}}"#;
        self.ask(hello)["result"].clone()
    }
}

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

        assert_eq!(manager.hears(), ("READY=1".to_owned(), service.pid()));
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
        manager.hears_nothing();
    }
}

#[test]
fn a_daemon_that_is_replaced_is_no_matter_of_the_manager() {
    let manager = Manager::new(Notify::Path);
    let service = manager.start();
    assert_eq!(manager.hears().0, "READY=1");
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
    manager.hears_nothing();
    service.signal(Signal::SIGTERM);
    assert_eq!(manager.hears(), ("STOPPING=1".to_owned(), service.pid()));
}

#[test]
fn an_end_is_told_when_it_begins_and_leaves_the_managers_socket() {
    let manager = Manager::new(Notify::Path);
    let service = manager.start();
    assert_eq!(manager.hears().0, "READY=1");

    service.signal(Signal::SIGTERM);

    assert_eq!(manager.hears(), ("STOPPING=1".to_owned(), service.pid()));
    assert_eq!(service.ends().0, Some(0));
    manager.hears_nothing();
    assert!(manager.path().exists(), "it is the manager's");
    let again = manager.start();
    assert_eq!(manager.hears(), ("READY=1".to_owned(), again.pid()));

    let mut client = Client::connect(&manager.path());
    client.hello();
    assert!(client.ask(r#"{"jsonrpc":"2.0","id":2,"method":"shutdown"}"#)["error"].is_null());
    assert_eq!(manager.hears(), ("STOPPING=1".to_owned(), again.pid()));
    assert_eq!(again.ends().0, Some(0));
}

#[test]
fn what_is_not_one_listening_socket_for_this_very_process_is_refused_by_name() {
    let manager = Manager::new(Notify::Path);
    let listener = || manager.listener.as_fd().try_clone_to_owned().unwrap();
    let refused = |mut command: Command| {
        let (status, said) = Service(command.spawn().unwrap()).ends();
        assert_eq!(status, Some(1));
        manager.hears_nothing();
        said
    };

    assert!(refused(manager.command(listener(), "2")).contains("2 sockets were passed (LISTEN_FDS)"));
    assert!(refused(manager.command(listener(), "0")).contains("no socket"));

    let mut anothers = Command::new(env!("CARGO_BIN_EXE_userfaultfd-pagerd"));
    anothers.env("LISTEN_FDS", "1").env("LISTEN_PID", "1").stdout(Stdio::piped()).stderr(Stdio::null());
    assert!(refused(anothers).contains("no socket"));

    let file = fs::File::open("/dev/null").unwrap().into();
    assert!(refused(manager.command(file, "1")).contains("pass a listening Unix stream socket"));
    let (connected, _other) = UnixStream::pair().unwrap();
    assert!(refused(manager.command(connected.into(), "1")).contains("pass a listening Unix stream socket"));
}
