//! Pagers in processes of their own, which a test kills: the test program again, told what to serve on its standard input, a
//! socket. The test is the holder: it has every descriptor.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pager::{KeptConnection, KeptDescriptors, KeptSession};
use serde::{Deserialize, Serialize};
use uffd::liveness::PidFd;
use uffd::{Userfaultfd, fd_passing};

use super::DEADLINE;

pub mod inside;

const PROCESS: &str = "PAGER_TEST_PROCESS";
const LONGEST: usize = 1 << 16;

/// What a pager process is told.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Serve this, whose userfaultfd comes along (and its pidfd).
    Serve {
        session: KeptSession,
        source: Source,
    },
    /// Go on with this.
    Resume {
        session: KeptSession,
        source: Source,
    },
    /// Take Firecracker's handshakes at this path. Without a source: the test is asked.
    Listen {
        path: PathBuf,
        source: Option<Source>,
    },
    Close {
        id: u64,
        populate: bool,
    },
    Hold {
        id: u64,
    },
    TakeDirty {
        id: u64,
    },
    /// Put it through its policy.
    Fail {
        session: KeptSession,
        why: String,
    },
}

/// Where a pager process has the bytes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// [`image`] of so many pages, at hand.
    AtHand(usize),
    /// The same, which a worker reads, each time in a millisecond.
    Slow(usize),
    /// None that answers.
    Never(usize),
    /// The same bytes as [`image`], made when they are wanted.
    Made(usize),
}

/// What it tells.
#[derive(Debug, Serialize, Deserialize)]
pub enum Told {
    /// Keep this; its descriptors come along: userfaultfd, record, and which of the others.
    Keep {
        session: KeptSession,
        process: bool,
        connection: bool,
    },
    Forget {
        id: u64,
        reason: String,
        still_open: bool,
    },
    Started {
        id: u64,
        taken_over: u64,
        lost_children: u64,
        parent: Option<u64>,
    },
    Ended {
        id: u64,
        reason: String,
        error: Option<String>,
    },
    Refused {
        code: String,
        error: String,
    },
    /// Keep this connection, which comes along.
    Connection(KeptConnection),
    ForgetConnection {
        id: u64,
    },
    /// Which image this process gets.
    Asking {
        id: u64,
    },
    /// What was asked for is so; addresses that were written to.
    Done {
        dirty: Vec<u64>,
    },
}

/// What a holder has of a session.
#[derive(Debug)]
pub struct Kept {
    pub session: KeptSession,
    pub uffd: OwnedFd,
    pub record: OwnedFd,
    pub process: Option<OwnedFd>,
    pub connection: Option<OwnedFd>,
}

impl Kept {
    pub fn descriptors(&self) -> KeptDescriptors<'_> {
        KeptDescriptors {
            uffd: self.uffd.as_fd(),
            record: self.record.as_fd(),
            process: self.process.as_ref().map(AsFd::as_fd),
            connection: self.connection.as_ref().map(AsFd::as_fd),
        }
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let KeptDescriptors { uffd, record, process, connection } = self.descriptors();
        [uffd, record].into_iter().chain(process).chain(connection).collect()
    }

    fn of(session: KeptSession, fds: Vec<OwnedFd>, process: bool, connection: bool) -> Self {
        let mut fds = fds.into_iter();
        let mut next = || fds.next().unwrap();
        let (uffd, record) = (next(), next());
        let process = process.then(&mut next);
        let connection = connection.then(&mut next);
        Self { session, uffd, record, process, connection }
    }
}

/// A pager in a process of its own. Killed and reaped when dropped.
pub struct PagerProcess {
    child: Child,
    process: PidFd,
    socket: OwnedFd,
}

impl PagerProcess {
    /// Starts one; `test` is the name of the test that calls [`run_if_asked`].
    pub fn start(test: &str) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(PROCESS, test);
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let child = command.spawn().unwrap();
        let process = PidFd::open(child.id() as i32).unwrap();
        Self { child, process, socket: ours }
    }

    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    pub fn serve(&self, session: KeptSession, source: Source, uffd: &Userfaultfd, process: Option<&PidFd>) {
        let fds: Vec<_> = [uffd.as_fd()].into_iter().chain(process.map(AsFd::as_fd)).collect();
        self.order(&Order::Serve { session, source }, &fds);
    }

    pub fn resume(&self, kept: &Kept, source: Source) {
        self.order(&Order::Resume { session: kept.session.clone(), source }, &kept.fds());
    }

    pub fn fail(&self, kept: &Kept, why: &str) {
        self.order(&Order::Fail { session: kept.session.clone(), why: why.to_owned() }, &kept.fds());
    }

    pub fn listen(&self, path: PathBuf, source: Option<Source>) {
        self.order(&Order::Listen { path, source }, &[]);
        self.done();
    }

    /// Begins to close a session.
    pub fn close(&self, id: u64, populate: bool) {
        self.order(&Order::Close { id, populate }, &[]);
        self.done();
    }

    /// The same; that it has begun is still to be told.
    pub fn begin_to_close(&self, id: u64) {
        self.order(&Order::Close { id, populate: false }, &[]);
    }

    pub fn hold(&self, id: u64) {
        self.order(&Order::Hold { id }, &[]);
        self.done();
    }

    /// The addresses of what was written to.
    pub fn take_dirty(&self, id: u64) -> Vec<u64> {
        self.order(&Order::TakeDirty { id }, &[]);
        self.done()
    }

    fn done(&self) -> Vec<u64> {
        match self.told().0 {
            Told::Done { dirty } => dirty,
            other => panic!("{other:?}"),
        }
    }

    fn order(&self, order: &Order, fds: &[BorrowedFd<'_>]) {
        fd_passing::send(self.socket.as_fd(), &serde_json::to_vec(order).unwrap(), fds).unwrap();
    }

    /// The next thing it tells, under the deadline.
    pub fn told(&self) -> (Told, Vec<OwnedFd>) {
        told(self.socket.as_fd(), DEADLINE).expect("the pager's process is silent")
    }

    /// What it gives to be kept.
    pub fn kept(&self) -> Kept {
        match self.told() {
            (Told::Keep { session, process, connection }, fds) => Kept::of(session, fds, process, connection),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// The connection that it gives to be kept.
    pub fn kept_connection(&self) -> (KeptConnection, OwnedFd) {
        match self.told() {
            (Told::Connection(connection), mut fds) => (connection, fds.remove(0)),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// The session that it starts; which one, and how often it was taken over.
    pub fn started(&self) -> (u64, u64) {
        match self.told().0 {
            Told::Started { id, taken_over, .. } => (id, taken_over),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until none of its threads runs.
    pub fn until_stopped(&self) {
        let stopped = |thread: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
            stat.contains(") T ")
        };
        let deadline = std::time::Instant::now() + DEADLINE;
        while !std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().all(stopped) {
            assert!(std::time::Instant::now() < deadline, "it does not stop");
            std::thread::yield_now();
        }
    }

    pub fn signal(&self, signal: i32) {
        self.process.send_signal(signal).unwrap();
    }

    /// Kills it; another stands in, which serves nothing.
    pub fn replaced(self) -> Self {
        self.kill();
        Self::start("pager_process")
    }

    /// Kills it, at once, and waits until nothing of it is left.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        assert!(self.process.wait(DEADLINE).unwrap(), "it does not die");
        self.child.wait().unwrap();
    }
}

impl Drop for PagerProcess {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn told(socket: BorrowedFd<'_>, deadline: Duration) -> Option<(Told, Vec<OwnedFd>)> {
    let mut poll = [nix::poll::PollFd::new(socket, nix::poll::PollFlags::POLLIN)];
    let ms = u16::try_from(deadline.as_millis()).unwrap_or(u16::MAX);
    if nix::poll::poll(&mut poll, ms).unwrap() == 0 {
        return None;
    }
    let mut buffer = vec![0; LONGEST];
    let received = fd_passing::recv(socket, &mut buffer, 8).unwrap();
    (received.len > 0).then(|| (serde_json::from_slice(&buffer[..received.len]).unwrap(), received.fds))
}

/// What a test wants served: the area's memory from the first byte of the image on.
pub fn to_serve(area: super::area::Area) -> KeptSession {
    KeptSession {
        id: 0,
        label: "image".to_owned(),
        server: None,
        parent: None,
        peer: pager::Peer { pid: 0, uid: 0, gid: 0 },
        regions: vec![pager::Region { address: area.address, len: area.len() as u64, source_offset: 0 }],
        page_size: area.page as u64,
        policy: pager::FailurePolicy::Poison,
        window: Some(area.page as u64),
        fill: pager::FillOptions::default(),
        source_timeout: DEADLINE,
        write_protect: false,
    }
}
