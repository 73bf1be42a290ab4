//! Keeping sessions beyond the life of the process that serves them: what is handed to a keeper, and what a successor is given.
//!
//! A keeper (usually a parent process that does nothing else) holds a duplicate of each session's descriptors. When the pager's process
//! is gone, whoever starts the next gives it those, and [`Pager::resume_session`] goes on where the first was killed. If
//! nobody can, [`Pager::fail_session`] puts the session through its failure policy.
//!
//! What is taken over: which pages are missing, present and removed; where memory was moved; what was written to; the counters; an
//! end that had begun. A replay goes on with what is missing still, where its plan is known ([`Successor::replay`]). What is not: recordings (whoever has
//! their memory, [`RecordingKeeper`](crate::RecordingKeeper), has what was written), requests to populate and answers about writes that were under way (what they would have told is told again), the sizes of windows. A child that is forked is a
//! session of its own, and kept before its parent goes on; if the pager is killed in that very moment, its descriptor is in that process's table alone. Whoever
//! shares that hands it on ([`Pager::inherit`]); else its memory is the kernel's, which gives it zeros: [`SessionInfo::lost_children`] counts that. Not kept at all: memory of the pager's own process, which ends with it; and sessions
//! of minor faults, which are refused where there is a keeper.
//!
//! A connection is kept before anything is read from it, and what it says is only peeked at: bytes and descriptors stay in its queue until its
//! session is kept. So whoever has the connection has all of a handshake ([`Pager::resume_connection`]), wherever its pager was killed.
//!
//! [`SessionInfo::lost_children`]: crate::SessionInfo::lost_children

use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uffd::Userfaultfd;
use uffd::liveness::PidFd;

use crate::address_map::{AddressMap, Region};
use crate::error::PagerError;
use crate::fill::FillOptions;
use crate::left::LeftBehind;
use crate::notice::Observer;
use crate::pager::{Message, Pager, next_id, skip_ids};
use crate::policy::{FailurePolicy, SessionEnd};
use crate::record::Record;
use crate::replay::Replay;
use crate::server::Server;
use crate::session::Parts;
use crate::source::{LostSource, PageSource};
use crate::supervise::{Peer, Supervised};
use crate::taking_over::TakingOver;
use crate::trace::WorkingSet;
use crate::tracking::Tracking;
use uffd::errno_of;

/// What never changes about a session, as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSession {
    /// Unique among the sessions of a pager and of all that take it over.
    pub id: u64,
    /// What its maker calls it: usually where its memory comes from. Nothing here looks at it.
    pub label: String,
    /// Which server it came to, by the number that [`Pager::serve_firecracker`] has given.
    pub server: Option<u64>,
    /// The session of the process that this one was forked from.
    pub parent: Option<u64>,
    /// Who is served.
    pub peer: Peer,
    /// The memory as it lay when the session began.
    pub regions: Vec<Region>,
    /// Bytes of a page.
    pub page_size: u64,
    /// What happens when it cannot be served.
    pub policy: FailurePolicy,
    /// As in [`ServerOptions::window`](crate::ServerOptions::window).
    pub window: Option<u64>,
    /// What is brought without a fault.
    pub fill: FillOptions,
    /// How long the source may take for a read.
    pub source_timeout: Duration,
    /// Whether writes are tracked.
    pub write_protect: bool,
}

/// A connection whose process is not served yet, as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptConnection {
    /// Its session will have the same, and whoever was asked for its image knows it by that.
    pub id: u64,
    /// What its server calls its sessions ([`ServerOptions::label`](crate::ServerOptions::label)).
    pub label: String,
}

/// The descriptors of a session, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct KeptDescriptors<'a> {
    /// Its userfaultfd. As long as one duplicate is open, who waits for its memory waits, and nobody reads zeros.
    pub uffd: BorrowedFd<'a>,
    /// A memfd with everything that changes about it.
    pub record: BorrowedFd<'a>,
    /// The pidfd of its process, where there is one: forked children have none.
    pub process: Option<BorrowedFd<'a>>,
    /// The connection on which it was handed over, where there was one.
    pub connection: Option<BorrowedFd<'a>>,
}

/// What becomes of a connection that is taken over.
pub(crate) enum To {
    Server(u64),
    /// It comes as if it had just been accepted.
    New(u64),
    /// It is turned away.
    Nobody {
        server: Box<Server>,
        why: PagerError,
    },
}

/// Holds what a successor needs. Called on the event loop's thread: it sends the descriptors away, or duplicates them, and returns.
pub trait Keeper: Debug + Send + Sync {
    /// A session begins. None of its faults is answered before this returns.
    ///
    /// # Errors
    ///
    /// Why it cannot be kept. The session is not served then: it meets its failure policy, for this reason.
    fn keep(&self, session: &KeptSession, descriptors: KeptDescriptors<'_>) -> Result<(), PagerError>;

    /// A session is over, and its userfaultfd closed here. `still_open`: it must not be closed anywhere before its process has ended,
    /// because pages of it are missing that can neither be brought nor poisoned.
    fn forget(&self, id: u64, end: &SessionEnd, still_open: bool);

    /// A connection has come, of which nothing was read.
    ///
    /// # Errors
    ///
    /// Why it cannot be kept. Its process is turned away then, for this reason.
    fn keep_connection(&self, connection: &KeptConnection, socket: BorrowedFd<'_>) -> Result<(), PagerError>;

    /// It is a session that is kept as such, or closed here.
    fn forget_connection(&self, id: u64);
}

/// Who takes a session over.
#[derive(Clone)]
pub struct Successor {
    /// The source of its missing pages: the same bytes as before.
    pub source: Arc<dyn PageSource>,
    /// Who is told that it started (again), and ended.
    pub observer: Arc<dyn Observer>,
    /// The server of this pager that it belongs to from now on.
    pub server: Option<u64>,
    /// What the session replays, where it does.
    pub replay: Option<Arc<Replay>>,
}

impl Pager {
    /// Takes over a session whose process has ended: it applies what that one had read and not finished with, has every thread
    /// that waits fault again, and goes on. The observer hears of a session that starts, under the same id.
    ///
    /// The process that served it must be gone, with all of its threads (its pidfd is readable): one that still runs could install
    /// pages. The descriptors stay the caller's, who may close them after this.
    ///
    /// # Errors
    ///
    /// [`PagerError::Record`] for a record that is damaged, of another version, of another session or still in use; [`PagerError::PeerExited`]
    /// when the served process is gone; [`PagerError::Adopt`] for what is no userfaultfd; [`PagerError::System`] when descriptors have
    /// run out. Nothing has been done then, and everybody waits as before: [`Pager::fail_session`] is what is left.
    pub fn resume_session(
        &self,
        session: &KeptSession,
        descriptors: KeptDescriptors<'_>,
        successor: Successor,
    ) -> Result<(), PagerError> {
        let (mut parts, taking_over) = self.prepare(session, descriptors, Arc::clone(&successor.source))?;
        let of_this_image = |replay: &Arc<Replay>| replay.fits(successor.source.size()).is_ok();
        parts.working_set.replay = successor.replay.clone().filter(of_this_image);
        self.take_over(parts, taking_over, successor);
        Ok(())
    }

    /// Puts a session whose process has ended, and that nobody can take over, through its failure policy: it ends as
    /// [`EndReason::PagerLost`](crate::EndReason::PagerLost) for this reason. Where it was ending already, that goes on instead.
    ///
    /// Of a session whose record is damaged nobody knows which pages were removed: everything that is not there is poisoned. If
    /// memory of it can have been moved, nobody knows where all of it is: its process is killed, or else its userfaultfd stays open.
    ///
    /// # Errors
    ///
    /// [`PagerError::PeerExited`] when the served process is gone, [`PagerError::Adopt`] for what is no userfaultfd,
    /// [`PagerError::System`] when descriptors have run out, [`PagerError::Record`] while the process that served it runs.
    pub fn fail_session(
        &self,
        session: &KeptSession,
        descriptors: KeptDescriptors<'_>,
        why: PagerError,
        observer: Arc<dyn Observer>,
    ) -> Result<(), PagerError> {
        let no_image = PagerError::Internal("a session that nobody could take over has no image".to_owned());
        let source: Arc<dyn PageSource> = Arc::new(LostSource::new(no_image));
        let (parts, mut taking_over) = match self.prepare(session, descriptors, Arc::clone(&source)) {
            Err(PagerError::Record(reason)) if !in_use(descriptors) => {
                let uffd = adopt(descriptors)?;
                let map = AddressMap::new(&session.regions, session.page_size, u64::MAX)?;
                let taking_over = TakingOver::without_record(&uffd, PagerError::Record(reason));
                (parts_of(session, descriptors, uffd, map, None, Arc::clone(&source))?, taking_over)
            }
            prepared => prepared?,
        };
        taking_over.failing = Some(why);
        self.take_over(parts, taking_over, Successor { source, observer, server: None, replay: None });
        Ok(())
    }

    /// Goes on with a connection whose process was not served yet, as one of `server`: what it has said is read from the beginning, and time
    /// counts anew. Whoever was asked for its image is asked again, with the same id. Where that server is gone, as
    /// [`Pager::fail_connection`] without anybody who hears of it.
    pub fn resume_connection(&self, id: u64, socket: OwnedFd, server: u64) {
        skip_ids(id);
        self.send(Message::Connection(id, socket, To::Server(server)));
    }

    /// Turns a connection away whose process nobody can serve any more, by this policy. The observer hears of a rejection, last of all
    /// that its server is closed.
    pub fn fail_connection(
        &self,
        id: u64,
        socket: OwnedFd,
        policy: FailurePolicy,
        why: PagerError,
        observer: Arc<dyn Observer>,
    ) {
        skip_ids(id);
        let server = Box::new(Server::standing_in(next_id(), policy, observer));
        self.send(Message::Connection(id, socket, To::Nobody { server, why }));
    }

    /// Sessions get ids above this one from now on. Whoever takes over from another pager calls it with the highest id that one has given,
    /// so that a stale id reaches nothing. (Taking over a session does so for its own.)
    pub fn skip_ids(&self, up_to: u64) {
        skip_ids(up_to);
    }

    /// Sessions that are taken over from now on find there what their process had read of and not handed to its keeper.
    pub fn inherit(&self, left: LeftBehind) {
        *lock(&self.left) = left;
    }

    /// Has the event loop's thread do something, after everything that was asked for before.
    pub fn after_that(&self, act: Box<dyn FnOnce() + Send>) {
        self.send(Message::Then(act));
    }

    /// Takes a connection to `server` that an earlier process had accepted, and not handed to its keeper. Where that server is gone, as
    /// [`Pager::resume_connection`].
    pub fn add_connection(&self, socket: OwnedFd, server: u64) {
        self.send(Message::Connection(next_id(), socket, To::New(server)));
    }

    /// Checks everything, and changes nothing but who owns the record.
    fn prepare(
        &self,
        session: &KeptSession,
        descriptors: KeptDescriptors<'_>,
        source: Arc<dyn PageSource>,
    ) -> Result<(Parts, TakingOver), PagerError> {
        let uffd = adopt(descriptors)?;
        let record = Record::open(duplicate(descriptors.record)?)?;
        if (record.session(), record.page_size()) != (session.id, session.page_size) {
            return Err(PagerError::Record(format!(
                "it is of session {} with pages of {} bytes, not of session {} with {}",
                record.session(),
                record.page_size(),
                session.id,
                session.page_size
            )));
        }
        let (map, applied) = record.map(source.size())?;
        record.check_ring()?;
        let tracking = if record.tracks_writes() {
            Some(Tracking::in_record(record.written()?, record.page_size()))
        } else {
            None
        };
        let parts = parts_of(session, descriptors, uffd, map, tracking, source)?;
        record.take_ownership()?;
        let table = lock(&self.left).table(record.ring_of(), &record.forks()?);
        Ok((parts, TakingOver::new(record, applied, table)))
    }

    fn take_over(&self, parts: Parts, taking_over: TakingOver, successor: Successor) {
        skip_ids(parts.id);
        self.send(Message::TakeOver(Box::new((parts, taking_over, successor))));
    }
}

fn parts_of(
    session: &KeptSession,
    descriptors: KeptDescriptors<'_>,
    uffd: Userfaultfd,
    map: AddressMap,
    tracking: Option<Tracking>,
    source: Arc<dyn PageSource>,
) -> Result<Parts, PagerError> {
    let process = match descriptors.process {
        Some(process) => {
            let of_io =
                |error: uffd::liveness::LivenessError| PagerError::Adopt(format!("its pidfd: {error}"));
            Some(Supervised::new(PidFd::from_fd(duplicate(process)?).map_err(of_io)?))
        }
        None => None,
    };
    Ok(Parts {
        owner: None,
        backing: None,
        id: session.id,
        label: session.label.clone(),
        uffd,
        map,
        source,
        policy: session.policy,
        window: session.window,
        fill: session.fill,
        source_timeout: session.source_timeout,
        peer: session.peer,
        process,
        parent: session.parent,
        minor: None,
        tracking,
        all_there: false,
        own: false,
        connection: descriptors.connection.map(duplicate).transpose()?,
        working_set: WorkingSet::default(),
    })
}

fn lock(left: &Mutex<LeftBehind>) -> MutexGuard<'_, LeftBehind> {
    // Nothing that is done under it can panic half way.
    left.lock().unwrap_or_else(PoisonError::into_inner)
}

fn in_use(descriptors: KeptDescriptors<'_>) -> bool {
    duplicate(descriptors.record).and_then(Record::open).is_ok_and(|record| record.is_in_use())
}

fn adopt(descriptors: KeptDescriptors<'_>) -> Result<Userfaultfd, PagerError> {
    Userfaultfd::adopt(duplicate(descriptors.uffd)?).map_err(|error| match error {
        uffd::AdoptError::ProcessGone => PagerError::PeerExited,
        error => error.into(),
    })
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, PagerError> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|error| PagerError::System { syscall: "fcntl", errno: errno_of(&error) })
}
