//! What such a process does: it carries out what it is told, and hands what it has to keep to the test.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use pager::{
    Keeper, KeptConnection, KeptDescriptors, KeptSession, Notice, Observer, PageSource, Pager, PagerError,
    PagerOptions, ReadNow, SessionEnd, SessionOptions, Successor,
};
use uffd::liveness::PidFd;
use uffd::{Userfaultfd, fd_passing};

use super::{Kept, LONGEST, Order, PROCESS, Source, Told};
use crate::support::{Bytes, DEADLINE, PAGE, image, word};

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
            let successor = Successor { source: source.open(), observer, server: None, replay: None };
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
            let pages = |range: &pager::DirtyRange| (range.address..range.address + range.len).step_by(PAGE);
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
        window: Some(PAGE as u64),
        handshake_timeout: DEADLINE,
        max_sessions: 10,
        label: "of the server".to_owned(),
        ..pager::ServerOptions::new(
            source.map_or(pager::Images::Asked, |source| pager::Images::One(source.open())),
        )
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
        (self.0 * PAGE) as u64
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
