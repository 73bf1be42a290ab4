//! The process that is served: what its policy will need is tried when its session starts, and no policy ever meets another process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use nix::libc;
use pager::{
    FailurePolicy, Images, Listener, Notice, Pager, PagerOptions, Region, ServerOptions, SessionOptions,
};
use uffd::fd_passing::send_all;
use uffd::liveness::PidFd;
use uffd::{Mapping, MappingKind, Modes, Userfaultfd};

use support::{Bytes, DEADLINE, PAGE, image, told};

const PAGES: usize = 8;
const NOBODY: u32 = 65534;

/// What this thread does next is without this capability, which root has.
fn without_capability(capability: u32) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: both live across the call and are as large as this version says.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) }, 0);
    sets[0][0] &= !(1 << capability);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, &raw mut sets) }, 0);
}

const CAP_KILL: u32 = 5;

/// A kernel without `SO_PEERPIDFD`, for all threads of this process.
fn without_peer_pidfd() {
    let nr = libc::SYS_getsockopt as u32;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(0x20, 0, 0, 0),
        step(0x15, 0, 3, nr),
        // The low half of the third argument.
        step(0x20, 0, 0, 32),
        step(0x15, 0, 1, 77),
        step(0x06, 0, 0, 0x0005_0000 | libc::ENOPROTOOPT as u32),
        step(0x06, 0, 0, 0x7fff_0000),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program lives across the call. 1: set a filter; 1: for all threads.
    assert_eq!(unsafe { libc::syscall(libc::SYS_seccomp, 1, 1, &raw const program) }, 0);
}

/// Starts a process with this number, which does nothing until it is killed.
fn with_number(pid: i32) -> std::io::Result<()> {
    let number = pid;
    let mut args = [0_u64; 11];
    args[4] = libc::SIGCHLD as u64;
    args[8] = &raw const number as u64;
    args[9] = 1;
    // SAFETY: a plain fork; the child makes one call, which is async-signal-safe.
    let made = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) };
    if made == 0 {
        loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
    }
    if made < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A process of another user, which is not this one's child to be confused with.
fn of_nobody() -> (std::process::Child, PidFd) {
    let child = Command::new("/bin/sleep")
        .arg("60")
        .uid(NOBODY)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pidfd = PidFd::open(child.id() as i32).unwrap();
    (child, pidfd)
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: only root can start processes of other users");
    }
    root
}

/// A mapping that is registered.
fn registered() -> Option<(Mapping, Userfaultfd)> {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let uffd = support::uffd()?;
    // SAFETY: no reference to the mapping exists.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
    Some((mapping, uffd))
}

fn options(mapping: &Mapping, process: Option<PidFd>, policy: FailurePolicy) -> SessionOptions {
    let region = Region { address: mapping.address(), len: mapping.len() as u64, source_offset: 0 };
    let source = Arc::new(Bytes(image(PAGES)));
    SessionOptions { policy, process, ..SessionOptions::new(vec![region], PAGE as u64, source) }
}

#[test]
fn a_process_that_could_not_be_killed_is_refused_when_its_session_starts() {
    let test = "a_process_that_could_not_be_killed_is_refused_when_its_session_starts";
    if !is_root() {
        return;
    }
    alone::alone(test, Duration::from_secs(30), || {
        let Some((mapping, uffd)) = registered() else { return };
        let (mut child, pidfd) = of_nobody();
        let killing = options(&mapping, Some(pidfd.try_clone().unwrap()), FailurePolicy::Kill);

        let refused = std::thread::scope(|scope| {
            let prepare = scope.spawn(|| {
                without_capability(CAP_KILL);
                killing.prepare(&uffd).err()
            });
            prepare.join().unwrap()
        });

        let error = refused.expect("refused");
        assert_eq!((error.code(), error.errno()), ("ERR_UFFD_NOT_PERMITTED", Some(libc::EPERM)), "{error}");
        assert!(error.to_string().contains("CAP_KILL"), "{error}");
        // With what it needs no right for, it is served.
        assert!(options(&mapping, Some(pidfd), FailurePolicy::Poison).prepare(&uffd).is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn a_policy_that_kills_needs_a_process_that_is_known() {
    let Some((mapping, uffd)) = registered() else { return };
    let foreign = Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert!(foreign.can_poison() == uffd.can_poison());

    let error = options(&mapping, None, FailurePolicy::Kill).prepare(&foreign).err().expect("refused");

    assert_eq!(error.code(), "ERR_UFFD_NOT_PERMITTED");
    assert!(error.to_string().contains("pidfd"), "{error}");
    // This very process needs none.
    assert!(options(&mapping, None, FailurePolicy::Kill).prepare(&uffd).is_ok());
}

const PEER: &str = "PAGER_TEST_PEER";
const PEER_UID: &str = "PAGER_TEST_PEER_UID";

/// For a second process: hands memory over, as somebody else where that is wanted, and waits; or exits at once.
fn be_a_peer(path: &Path) {
    let Some((mapping, uffd)) = registered() else { return };
    if let Some(uid) = std::env::var(PEER_UID).ok().and_then(|uid| uid.parse::<u32>().ok()) {
        nix::unistd::setuid(uid.into()).unwrap();
    }
    let (address, len) = (mapping.address(), mapping.len());
    let text = format!(r#"[{{"base_host_virt_addr":{address},"size":{len},"offset":0,"page_size":4096}}]"#);
    let socket = UnixStream::connect(path).unwrap();
    send_all(socket.as_fd(), text.as_bytes(), &[uffd.as_fd()], DEADLINE).unwrap();
    if std::env::var_os(PEER_UID).is_none() {
        // Whoever serves it is too late.
        std::process::exit(0);
    }
    // Killed, or SIGBUS: the memory was poisoned.
    let poisoned = mapping.read_checked(0, &mut [0]).is_err();
    std::process::exit(if poisoned { 42 } else { 0 });
}

fn start_peer(test: &str, path: &Path, uid: Option<u32>) -> std::process::Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(PEER, path).stdout(Stdio::null());
    if let Some(uid) = uid {
        command.env(PEER_UID, uid.to_string());
    }
    command.spawn().unwrap()
}

fn serve(pager: &Pager, listener: Listener, peer_uid: Option<u32>) -> Receiver<Notice> {
    let (observer, notices) = told();
    let options = ServerOptions {
        policy: FailurePolicy::Kill,
        peer_uid,
        handshake_timeout: DEADLINE,
        max_sessions: 10,
        ..ServerOptions::new(Images::One(Arc::new(Bytes(image(PAGES)))))
    };
    pager.serve_firecracker(listener, options, observer);
    notices
}

#[test]
fn a_peer_that_could_not_be_killed_is_turned_away_and_its_memory_poisoned() {
    let test = "a_peer_that_could_not_be_killed_is_turned_away_and_its_memory_poisoned";
    if let Some(path) = std::env::var_os(PEER) {
        return be_a_peer(Path::new(&path));
    }
    if !is_root() || support::uffd().is_none() {
        return;
    }
    alone::alone(test, Duration::from_secs(30), || {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::os::unix::fs::chown(dir.path(), Some(0), Some(0)).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let listener = Listener::bind(&path, Some(NOBODY)).unwrap();
        without_capability(CAP_KILL);
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let notices = serve(&pager, listener, Some(NOBODY));
        let mut peer = start_peer(test, &path, Some(NOBODY));

        let notice = notices.recv_timeout(DEADLINE).unwrap();

        let Notice::Rejected { error, peer: Some(who), .. } = notice else { panic!("{notice:?}") };
        assert_eq!((error.code(), who.uid), ("ERR_UFFD_NOT_PERMITTED", NOBODY), "{error}");
        assert_eq!(peer.wait().unwrap().code(), Some(42), "poisoned");
    });
}

/// A peer that has handed its memory over and is gone, while its number is another process's.
fn recycled(test: &str, listener: &Path) -> Option<i32> {
    let mut peer = start_peer(test, listener, None);
    let pid = peer.id() as i32;
    assert!(peer.wait().unwrap().success());
    match with_number(pid) {
        Ok(()) => Some(pid),
        Err(error) => {
            println!("skipped: a process cannot be given a number here: {error}");
            None
        }
    }
}

fn end(pid: i32) {
    // SAFETY: takes numbers; it is our child and not reaped.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
}

fn lives(pid: i32) -> bool {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    waitpid(nix::unistd::Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive)
}

fn no_policy_meets_who_has_its_number(test: &str, prepare: fn()) {
    if let Some(path) = std::env::var_os(PEER) {
        return be_a_peer(Path::new(&path));
    }
    if !is_root() || support::uffd().is_none() {
        return;
    }
    alone::alone(test, Duration::from_secs(30), || {
        prepare();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // It waits in the socket's queue: it is accepted only when its number is another's.
        let listener = Listener::bind(&path, None).unwrap();
        let Some(pid) = recycled(test, &path) else { return };
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let notices = serve(&pager, listener, None);

        let notice = notices.recv_timeout(DEADLINE).unwrap();

        let Notice::Rejected { error, .. } = notice else { panic!("{notice:?}") };
        assert_eq!(error.code(), "ERR_UFFD_PROTOCOL", "{error}");
        drop(pager);
        assert!(lives(pid));
        end(pid);
    });
}

#[test]
fn no_policy_meets_the_process_that_has_a_dead_peers_number() {
    let test = "no_policy_meets_the_process_that_has_a_dead_peers_number";
    no_policy_meets_who_has_its_number(test, || {});
}

#[test]
fn no_policy_meets_the_process_that_has_a_dead_peers_number_before_linux_6_5() {
    let test = "no_policy_meets_the_process_that_has_a_dead_peers_number_before_linux_6_5";
    no_policy_meets_who_has_its_number(test, without_peer_pidfd);
}

#[test]
fn a_session_of_a_dead_process_never_kills_who_has_its_number() {
    let test = "a_session_of_a_dead_process_never_kills_who_has_its_number";
    if !is_root() {
        return;
    }
    alone::alone(test, Duration::from_secs(30), || {
        let Some((mapping, uffd)) = registered() else { return };
        let mut child = Command::new("/bin/sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let (pid, pidfd) = (child.id() as i32, PidFd::open(child.id() as i32).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        if let Err(error) = with_number(pid) {
            println!("skipped: a process cannot be given a number here: {error}");
            return;
        }
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let (observer, notices) = told();
        let options = options(&mapping, Some(pidfd), FailurePolicy::Kill);

        pager.adopt(uffd, options, observer).unwrap();

        while !matches!(notices.recv_timeout(DEADLINE).unwrap(), Notice::SessionEnded { .. }) {}
        assert!(lives(pid));
        end(pid);
    });
}
