//! Limits that are reached while memory is served, each really set in a process of its own: named, put through the policy, and never
//! waited for in circles. (Huge pages: `own_memory`, `minor`; mappings: `uffd/errno_matrix`; descriptors for connections: `failures`.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use pager::{
    EndReason, FailurePolicy, Images, Listener, Notice, Pager, PagerOptions, ServerOptions, SessionEnd,
};
use uffd::fd_passing::send_all;
use uffd::{Features, Mapping, MappingKind, Modes};

use support::area::{Area, Gated, Made, all_events, ended, new_uffd, register, serve_area, started};
use support::children::fork;
use support::{Bytes, DEADLINE, PAGE, elsewhere, finish, image, told};

const LONG: Duration = Duration::from_secs(60);
const PEER: &str = "PAGER_TEST_PEER";
const PEER_GROUP: &str = "PAGER_TEST_GROUP";
const MIB: usize = 1 << 20;
/// What the peer wants, and what its group may have.
const WANTED: usize = 64 * MIB;
const ALLOWED: usize = 24 * MIB;

/// Processor time of this process.
fn busy() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let of =
        |time: nix::sys::time::TimeVal| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
    of(usage.user_time()) + of(usage.system_time())
}

/// A memory cgroup. Removed when dropped, when nobody is in it any more.
struct Group(PathBuf);

impl Group {
    /// With this limit; without the kernel's killer where that can be. Or a printed reason why not.
    fn new(name: &str, kills: bool) -> Option<Self> {
        let (root, limit) = if Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            ("/sys/fs/cgroup", "memory.max")
        };
        let group = Self(Path::new(root).join(format!("uffd-{name}-{}", std::process::id())));
        let made = fs::create_dir(&group.0)
            .and_then(|()| fs::write(group.0.join(limit), ALLOWED.to_string()))
            .and_then(|()| match kills {
                true => Ok(()),
                false => fs::write(group.0.join("memory.oom_control"), "1"),
            });
        if let Err(error) = made {
            println!("skipped: no memory cgroup of this kind can be made here: {error}");
            return None;
        }
        Some(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

/// For a second process: joins its group, waits until it may begin, hands its memory over, and touches all of it.
fn be_a_peer(path: &Path) {
    let Some(uffd) = support::uffd() else { return };
    let _ = std::io::stdin().read(&mut [0]).unwrap();
    if let Some(group) = std::env::var_os(PEER_GROUP) {
        let procs = Path::new(&group).join("cgroup.procs");
        fs::write(procs, std::process::id().to_string()).unwrap();
    }
    let mapping = Mapping::new(WANTED, MappingKind::Private).unwrap();
    let (address, len) = (mapping.address(), mapping.len());
    // SAFETY: no reference to the mapping exists.
    unsafe { uffd.register(address, len as u64, Modes::MISSING) }.unwrap();
    let text = format!(r#"[{{"base_host_virt_addr":{address},"size":{len},"offset":0,"page_size":4096}}]"#);
    let socket = UnixStream::connect(path).unwrap();
    send_all(socket.as_fd(), text.as_bytes(), &[uffd.as_fd()], DEADLINE).unwrap();
    for page in (0..len).step_by(PAGE) {
        let _ = mapping.read_checked(page, &mut [0]);
    }
}

/// It connects when something is written to it.
fn start_peer(test: &str, path: &Path, group: Option<&Group>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(PEER, path);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    if let Some(group) = group {
        command.env(PEER_GROUP, &group.0);
    }
    command.spawn().unwrap()
}

/// Lets it connect. Its pipe stays open, so that this frees no descriptor.
fn begin(peer: &mut Child) {
    peer.stdin.as_mut().unwrap().write_all(&[1]).unwrap();
}

fn server(pager: &Pager, path: &Path) -> Receiver<Notice> {
    let (observer, notices) = told();
    let options = ServerOptions {
        policy: FailurePolicy::Kill,
        handshake_timeout: DEADLINE,
        max_sessions: 10,
        ..ServerOptions::new(Images::One(Arc::new(Bytes(image(WANTED / PAGE)))))
    };
    pager.serve_firecracker(Listener::bind(path, None).unwrap(), options, observer);
    notices
}

/// How the session of a peer ends whose group is full, and the peer. Another one, which is in no group, gets everything.
fn with_a_full_group(test: &str, kills: bool, look: impl FnOnce(SessionEnd)) {
    if let Some(path) = std::env::var_os(PEER) {
        return be_a_peer(Path::new(&path));
    }
    if support::uffd().is_none() {
        return;
    }
    let Some(group) = Group::new(if kills { "kills" } else { "refuses" }, kills) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let notices = server(&pager, &path);
    let mut peer = start_peer(test, &path, Some(&group));
    begin(&mut peer);
    let info = started(&notices);

    let end = ended(&notices, info.id);

    look(end);
    assert_eq!(peer.wait().unwrap().signal(), Some(libc::SIGKILL));
    let mut other = start_peer(test, &path, None);
    begin(&mut other);
    let info = started(&notices);
    assert_eq!(ended(&notices, info.id).reason, EndReason::PeerExited);
    assert!(other.wait().unwrap().success());
}

#[test]
fn memory_cgroup_full_is_named_and_the_process_meets_its_policy() {
    let test = "memory_cgroup_full_is_named_and_the_process_meets_its_policy";
    with_a_full_group(test, false, |end| {
        assert_eq!(end.reason, EndReason::Exhausted);
        let error = end.error.expect("why");
        assert_eq!((error.code(), error.errno()), ("ERR_UFFD_EXHAUSTED", Some(libc::ENOMEM)), "{error}");
        assert!(error.hint().unwrap().contains("memory.max"), "{:?}", error.hint());
    });
}

#[test]
fn memory_cgroup_full_where_the_kernel_kills_ends_the_session_and_no_other() {
    let test = "memory_cgroup_full_where_the_kernel_kills_ends_the_session_and_no_other";
    with_a_full_group(test, true, |end| match end.reason {
        EndReason::PeerExited => assert!(end.error.is_none(), "{:?}", end.error),
        // The kernel asks again only so often whether whom it has killed is gone.
        EndReason::Exhausted => assert_eq!(end.error.and_then(|error| error.errno()), Some(libc::ENOMEM)),
        other => panic!("{other:?}"),
    });
}

#[test]
fn out_of_threads_is_named_and_goes_through_the_policy() {
    let test = "out_of_threads_is_named_and_goes_through_the_policy";
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become a user of its own");
        return;
    }
    alone::alone(test, LONG, || {
        let Some(uffd) = new_uffd(all_events()) else { return };
        let area = Area::new(Made::Private, 16);
        register(&uffd, area, Modes::MISSING);
        let serving = serve_area(uffd, area, Gated::new(image(16)), |options| {
            options.policy = FailurePolicy::Hold { timeout: None };
        });
        let (ready, go) = std::sync::mpsc::channel::<()>();
        // Started while it may be.
        let reader = elsewhere(move || {
            let _ = go.recv();
            area.word(0)
        });
        // A user that has no other process: what it may have is what it has.
        nix::unistd::setuid(nix::unistd::Uid::from_raw(61_234)).unwrap();
        setrlimit(Resource::RLIMIT_NPROC, 1, 1).unwrap();

        ready.send(()).unwrap();

        let Notice::Held { hold, .. } = serving.notices.recv_timeout(DEADLINE).unwrap() else {
            panic!("not held")
        };
        let failure = hold.failure.unwrap();
        let error = failure.error.unwrap();
        assert_eq!((failure.reason, error.code()), (EndReason::Exhausted, "ERR_UFFD_EXHAUSTED"), "{error}");
        assert!(error.to_string().contains("RLIMIT_NPROC"), "{error}");
        // Nobody lies about it, and nothing is lost: with a source that needs no thread it goes on.
        let (sender, resumed) = std::sync::mpsc::channel();
        let source = Arc::new(Bytes(image(16)));
        serving.pager.resume(serving.id, Some(source), Box::new(move |answer| drop(sender.send(answer))));
        resumed.recv_timeout(DEADLINE).unwrap().unwrap();
        assert_eq!(finish(&reader), u64::from_ne_bytes(image(1)[..8].try_into().unwrap()));
    });
}

#[test]
fn out_of_threads_a_pager_does_not_start_and_says_which_limit() {
    let test = "out_of_threads_a_pager_does_not_start_and_says_which_limit";
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become a user of its own");
        return;
    }
    alone::alone(test, LONG, || {
        nix::unistd::setuid(nix::unistd::Uid::from_raw(61_235)).unwrap();
        setrlimit(Resource::RLIMIT_NPROC, 1, 1).unwrap();

        let error = Pager::start(&PagerOptions::default()).err().expect("no thread is to be had");

        assert_eq!((error.code(), error.errno()), ("ERR_UFFD_SYSTEM", Some(libc::EAGAIN)), "{error}");
        assert!(error.hint().unwrap().contains("RLIMIT_NPROC"), "{:?}", error.hint());
    });
}

/// Takes every descriptor that this process may still have.
fn take_all_descriptors() -> Vec<OwnedFd> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 256.min(hard), hard).unwrap();
    let mut taken = Vec::new();
    while let Ok(fd) = std::io::stdin().as_fd().try_clone_to_owned() {
        taken.push(fd);
    }
    taken
}

#[test]
fn out_of_descriptors_who_forks_goes_on_and_its_child_is_poisoned_by_name() {
    let test = "out_of_descriptors_who_forks_goes_on_and_its_child_is_poisoned_by_name";
    alone::alone(test, LONG, || {
        let Some(uffd) = new_uffd(all_events() | Features::EVENT_FORK) else { return };
        let area = Area::new(Made::Private, 16);
        register(&uffd, area, Modes::MISSING);
        let serving = serve_area(uffd, area, Arc::new(Bytes(image(16))), |options| {
            options.window = Some(PAGE as u64);
        });
        let taken = take_all_descriptors();
        let before = busy();
        for _ in 0..3 {
            // SAFETY: touches memory and makes bare system calls.
            let child = unsafe { fork(move || i32::from(area.zero(9))) };

            let info = started(&serving.notices);
            let end = ended(&serving.notices, info.id);
            assert_eq!(end.reason, EndReason::Exhausted);
            assert!(end.error.unwrap().to_string().contains("RLIMIT_NOFILE"));
            let status = child.wait();
            let sigbus = nix::sys::signal::Signal::SIGBUS;
            assert!(
                matches!(status, nix::sys::wait::WaitStatus::Signaled(_, signal, _) if signal == sigbus),
                "{status:?}"
            );
        }
        assert!(busy().saturating_sub(before) < Duration::from_secs(1));
        drop(taken);
        assert!(area.part(9, 1).read() == image(16)[9 * PAGE..10 * PAGE]);
        serving.close(pager::Rest::Zero);
    });
}

#[test]
fn out_of_descriptors_a_handshake_waits_and_none_of_its_own_is_lost() {
    let test = "out_of_descriptors_a_handshake_waits_and_none_of_its_own_is_lost";
    if let Some(path) = std::env::var_os(PEER) {
        return be_a_peer(Path::new(&path));
    }
    if support::uffd().is_none() {
        return;
    }
    alone::alone(test, LONG, || {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let notices = server(&pager, &path);
        let mut peer = start_peer(test, &path, None);
        let mut taken = take_all_descriptors();
        // Enough for its connection, and not for what comes with it.
        taken.truncate(taken.len() - 2);
        begin(&mut peer);
        let before = busy();

        let notice = notices.recv_timeout(DEADLINE).unwrap();

        let Notice::Rejected { error, peer: None, .. } = &notice else { panic!("{notice:?}") };
        assert_eq!(error.code(), "ERR_UFFD_EXHAUSTED", "{error}");
        assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
        // Told again and again, at a pace.
        for _ in 0..3 {
            notices.recv_timeout(DEADLINE).unwrap();
        }
        assert!(busy().saturating_sub(before) < Duration::from_millis(200));
        drop(taken);
        let info = started(&notices);
        assert_eq!(ended(&notices, info.id).reason, EndReason::PeerExited);
        assert!(peer.wait().unwrap().success());
    });
}
