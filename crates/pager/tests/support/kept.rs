//! Pagers in processes of their own, which a test kills: the test program again, told what to serve on its standard input, a
//! socket. The test is the holder: it has every descriptor.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pager::{
    Keeper, KeptConnection, KeptDescriptors, KeptSession, Notice, Observer, PageSource, Pager, PagerError,
    PagerOptions, ReadNow, SessionEnd, SessionOptions, Successor,
};
use serde::{Deserialize, Serialize};
use uffd::liveness::PidFd;
use uffd::{Userfaultfd, fd_passing};

use super::{Bytes, DEADLINE, image, word};

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

/// Runs as a pager process where this process was started as one for this test.
pub fn run_if_asked(test: &str) {
    if std::env::var_os(PROCESS).is_none_or(|name| name != test) {
        return;
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let holder = Arc::new(Holder(socket));
    let keeper: Arc<dyn Keeper> = Arc::<Holder>::clone(&holder);
    let pager = Pager::start(&PagerOptions { keeper: Some(keeper), ..PagerOptions::default() }).unwrap();
    let mut buffer = vec![0; LONGEST];
    while let Ok(received) = fd_passing::recv(holder.0.as_fd(), &mut buffer, 8) {
        if received.len == 0 {
            break;
        }
        let order = serde_json::from_slice(&buffer[..received.len]).unwrap();
        if let Err(error) = carry_out(&pager, order, received.fds, &holder) {
            holder.tell(&Told::Refused { code: error.code().to_owned(), error: error.to_string() }, &[]);
        }
    }
    // The test has ended.
    std::process::exit(0);
}

fn carry_out(pager: &Pager, order: Order, fds: Vec<OwnedFd>, holder: &Arc<Holder>) -> Result<(), PagerError> {
    let observer: Arc<dyn Observer> = Arc::<Holder>::clone(holder);
    match order {
        Order::Serve { session, source } => {
            let mut fds = fds.into_iter();
            let uffd = Userfaultfd::adopt(fds.next().unwrap()).unwrap();
            let options = SessionOptions {
                label: session.label,
                policy: session.policy,
                window: session.window,
                fill: session.fill,
                source_timeout: session.source_timeout,
                process: fds.next().map(|fd| PidFd::from_fd(fd).unwrap()),
                modes: pager::SessionModes { write_protect: session.write_protect, ..Default::default() },
                ..SessionOptions::new(session.regions, session.page_size, source.open())
            };
            pager.adopt(uffd, options, observer).map(drop)
        }
        Order::Resume { session, source } => {
            let successor = Successor { source: source.open(), observer, server: None };
            let kept = kept_of(session, fds);
            pager.resume_session(&kept.session, kept.descriptors(), successor)
        }
        Order::Listen { path, source } => {
            pager.serve_firecracker(pager::Listener::bind(&path, None)?, server_options(source), observer);
            holder.tell(&Told::Done { dirty: Vec::new() }, &[]);
            Ok(())
        }
        Order::Close { id, populate } => {
            pager.close_session(id, if populate { pager::Rest::Populate } else { pager::Rest::Poison });
            // Answered behind it: then it has begun.
            pager.detach(id, holder.when_done());
            Ok(())
        }
        Order::Hold { id } => {
            pager.hold(id, holder.when_done());
            Ok(())
        }
        Order::TakeDirty { id } => {
            let dirty = pager.take_dirty(id, usize::MAX).wait(DEADLINE)?;
            let pages =
                |range: &pager::DirtyRange| (range.address..range.address + range.len).step_by(super::PAGE);
            holder.tell(&Told::Done { dirty: dirty.ranges.iter().flat_map(pages).collect() }, &[]);
            Ok(())
        }
        Order::Fail { session, why } => {
            let kept = kept_of(session, fds);
            pager.fail_session(&kept.session, kept.descriptors(), PagerError::Internal(why), observer)
        }
    }
}

/// How the servers of these tests serve.
pub fn server_options(source: Option<Source>) -> pager::ServerOptions {
    pager::ServerOptions {
        images: source.map_or(pager::Images::Asked, |source| pager::Images::One(source.open())),
        policy: pager::FailurePolicy::Poison,
        window: Some(super::PAGE as u64),
        fill: pager::FillOptions::default(),
        source_timeout: pager::SOURCE_TIMEOUT,
        peer_uid: None,
        handshake_timeout: DEADLINE,
        max_sessions: 10,
        working_set: pager::WorkingSet::default(),
        label: "of the server".to_owned(),
    }
}

fn kept_of(session: KeptSession, fds: Vec<OwnedFd>) -> Kept {
    let process = fds.len() > 2;
    Kept::of(session, fds, process, false)
}

impl Source {
    pub fn open(self) -> Arc<dyn PageSource> {
        match self {
            Self::AtHand(pages) => Arc::new(Bytes(image(pages))),
            Self::Slow(pages) => Arc::new(Waited(image(pages), Duration::from_millis(1))),
            Self::Made(pages) => Arc::new(Words(pages)),
            Self::Never(pages) => Arc::new(Waited(image(pages), Duration::from_secs(3600))),
        }
    }
}

/// An image of so many pages that takes no memory.
#[derive(Debug)]
struct Words(usize);

impl PageSource for Words {
    fn size(&self) -> u64 {
        (self.0 * super::PAGE) as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let first = offset as usize / 8;
        for (index, bytes) in buffer.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(first + index).to_ne_bytes());
        }
        Ok(())
    }
}

/// Memory that takes its time.
#[derive(Debug)]
struct Waited(Vec<u8>, Duration);

impl PageSource for Waited {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        // How long it takes is what this source is for; nobody waits for it to be over.
        std::thread::sleep(self.1);
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

/// The other end, for the pager's process.
#[derive(Debug)]
struct Holder(OwnedFd);

impl Holder {
    /// Tells when something is so, whatever came of it.
    fn when_done(self: &Arc<Self>) -> Box<dyn FnOnce(Result<(), PagerError>) + Send> {
        let holder = Arc::clone(self);
        Box::new(move |_| holder.tell(&Told::Done { dirty: Vec::new() }, &[]))
    }

    fn tell(&self, told: &Told, fds: &[BorrowedFd<'_>]) {
        // The test may have ended.
        let _ = fd_passing::send(self.0.as_fd(), &serde_json::to_vec(told).unwrap(), fds);
    }
}

impl Keeper for Holder {
    fn keep(&self, session: &KeptSession, descriptors: KeptDescriptors<'_>) -> Result<(), PagerError> {
        let KeptDescriptors { uffd, record, process, connection } = descriptors;
        let fds: Vec<_> = [uffd, record].into_iter().chain(process).chain(connection).collect();
        let (process, connection) = (process.is_some(), connection.is_some());
        self.tell(&Told::Keep { session: session.clone(), process, connection }, &fds);
        Ok(())
    }

    fn forget(&self, id: u64, end: &SessionEnd, still_open: bool) {
        self.tell(&Told::Forget { id, reason: end.reason.as_str().to_owned(), still_open }, &[]);
    }

    fn keep_connection(&self, connection: &KeptConnection, socket: BorrowedFd<'_>) -> Result<(), PagerError> {
        self.tell(&Told::Connection(connection.clone()), &[socket]);
        Ok(())
    }

    fn forget_connection(&self, id: u64) {
        self.tell(&Told::ForgetConnection { id }, &[]);
    }
}

impl Observer for Holder {
    fn notice(&self, notice: Notice) {
        match notice {
            Notice::SessionStarted(info) => {
                let (taken_over, lost_children) = (info.taken_over, info.lost_children);
                let told = Told::Started { id: info.id, taken_over, lost_children, parent: info.parent };
                self.tell(&told, &[]);
            }
            Notice::SessionEnded { id, end } => {
                let (reason, error) =
                    (end.reason.as_str().to_owned(), end.error.map(|error| error.to_string()));
                self.tell(&Told::Ended { id, reason, error }, &[]);
            }
            Notice::Rejected { error, .. } => {
                self.tell(&Told::Refused { code: error.code().to_owned(), error: error.to_string() }, &[]);
            }
            Notice::Asking { id, .. } => self.tell(&Told::Asking { id }, &[]),
            Notice::Held { .. } | Notice::ServerClosed => {}
        }
    }
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
