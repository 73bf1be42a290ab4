//! A listening socket that turns connections into sessions.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::Uid;
use uffd::Userfaultfd;
use uffd::errno_of;
use uffd::fd_passing::{self, Credentials, FdPassingError};

use crate::error::PagerError;
use crate::fill::FillOptions;
use crate::firecracker::{Handshake, LONGEST_MESSAGE, parse_handshake};
use crate::notice::Observer;
use crate::offer::Offer;
use crate::pager::{Message, Pager, SOURCE_TIMEOUT};
use crate::policy::FailurePolicy;
use crate::socket::Listener;
use crate::source::PageSource;
use crate::supervise::{Peer, Supervised};
use crate::trace::WorkingSet;

/// Descriptors taken from one message. Only the first is used; more than a few are no handshake.
const MOST_FDS: usize = 16;

/// Connections beyond `max_sessions` whose handshake is taken at one time, so that their memory meets the failure
/// policy. Those beyond wait to be accepted.
const MOST_REFUSED: usize = 64;

/// What a process is served from, and how.
#[derive(Debug, Clone)]
pub struct Image {
    /// As in [`SessionOptions::label`](crate::SessionOptions::label).
    pub label: String,
    /// The memory image.
    pub source: Arc<dyn PageSource>,
    /// What happens when it fails.
    pub policy: FailurePolicy,
    /// As in [`ServerOptions::window`].
    pub window: Option<u64>,
    /// As in [`ServerOptions::fill`].
    pub fill: FillOptions,
    /// As in [`SessionOptions::source_timeout`](crate::SessionOptions::source_timeout).
    pub source_timeout: Duration,
    /// Whether its working set is recorded, or an earlier one replayed.
    pub working_set: WorkingSet,
}

/// Which image is whose.
#[derive(Debug, Clone)]
pub enum Images {
    /// The same for every process.
    One(Arc<dyn PageSource>),
    /// The observer is asked for each ([`Notice::Asking`]); [`Pager::answer`] answers. The process waits meanwhile,
    /// until its handshake times out.
    ///
    /// [`Notice::Asking`]: crate::Notice::Asking
    /// [`Pager::answer`]: crate::Pager::answer
    Asked,
}

/// How a server serves.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The memory images.
    pub images: Images,
    /// What happens to a process whose memory cannot be served.
    pub policy: FailurePolicy,
    /// Bytes installed around a fault: a power of two, at most 2 MiB. Where absent: 64 KiB, and 256 KiB where faults
    /// are dense.
    pub window: Option<u64>,
    /// What is brought of a session without a fault.
    pub fill: FillOptions,
    /// As in [`SessionOptions::source_timeout`](crate::SessionOptions::source_timeout), of each session of [`Images::One`].
    pub source_timeout: Duration,
    /// Whose processes may connect; the caller's own where absent.
    pub peer_uid: Option<u32>,
    /// How long a handshake may take from its connection on.
    pub handshake_timeout: Duration,
    /// Sessions and handshakes at one time; connections beyond are rejected.
    pub max_sessions: usize,
    /// What each session of [`Images::One`] does about its working set.
    pub working_set: WorkingSet,
    /// What each session of [`Images::One`] is called: see [`SessionOptions::label`](crate::SessionOptions::label).
    pub label: String,
}

impl ServerOptions {
    /// Processes of the caller's own user are served in windows around faults; what cannot be had is poisoned. A source may take
    /// 30 s for a read, a handshake 5 s; 1024 are served at one time.
    #[must_use]
    pub fn new(images: Images) -> Self {
        Self {
            images,
            policy: FailurePolicy::Poison,
            window: None,
            fill: FillOptions::default(),
            source_timeout: SOURCE_TIMEOUT,
            peer_uid: None,
            handshake_timeout: Duration::from_secs(5),
            max_sessions: 1024,
            working_set: WorkingSet::default(),
            label: String::new(),
        }
    }
}

pub(crate) struct Server {
    pub(crate) id: u64,
    /// Gone once the server is closing, or draining.
    pub(crate) listener: Option<Listener>,
    pub(crate) options: ServerOptions,
    pub(crate) observer: Arc<dyn Observer>,
    /// Sessions, handshakes and questions that are alive.
    pub(crate) alive: usize,
    /// Those of them that are only being turned away.
    pub(crate) refused: usize,
    /// Accepting is put off until then: no descriptor was free.
    pub(crate) paused_until: Option<Instant>,
}

impl Server {
    pub(crate) fn new(
        id: u64,
        listener: Listener,
        options: ServerOptions,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self { id, listener: Some(listener), options, observer, alive: 0, refused: 0, paused_until: None }
    }

    /// As many are being turned away as may be at one time: others are not even accepted.
    pub(crate) fn is_full(&self) -> bool {
        self.refused >= MOST_REFUSED
    }

    /// Checks who connected, and begins to listen to it.
    pub(crate) fn greet(&self, socket: OwnedFd, now: Instant) -> Result<Pending, PagerError> {
        let credentials = fd_passing::peer_credentials(socket.as_fd())
            .map_err(|error| PagerError::Protocol(format!("the peer does not tell who it is: {error}")))?;
        let allowed = self.options.peer_uid.unwrap_or_else(|| Uid::effective().as_raw());
        if credentials.uid != allowed {
            return Err(PagerError::PeerNotAllowed { pid: credentials.pid, uid: credentials.uid, allowed });
        }
        let refusal = if self.alive - self.refused < self.options.max_sessions {
            None
        } else {
            Some(PagerError::Exhausted(format!(
                "all {} sessions of this server are taken (`maxSessions`)",
                self.options.max_sessions
            )))
        };
        Ok(Pending {
            server: self.id,
            socket,
            credentials,
            message: Vec::new(),
            uffd: None,
            deadline: now + self.options.handshake_timeout,
            refusal,
            peeks: false,
            asked: false,
        })
    }

    /// One that only turns away what has come to another, for which it stands in.
    pub(crate) fn standing_in(id: u64, policy: FailurePolicy, observer: Arc<dyn Observer>) -> Self {
        let options = ServerOptions {
            policy,
            handshake_timeout: Duration::ZERO,
            max_sessions: usize::MAX,
            ..ServerOptions::new(Images::Asked)
        };
        Self { id, listener: None, options, observer, alive: 0, refused: 0, paused_until: None }
    }
}

impl Pager {
    /// Serves whoever connects to a server from now on in this way. Its sessions go on as they are.
    pub fn configure_server(&self, id: u64, options: ServerOptions) {
        self.mailbox.send(Message::ConfigureServer { id, options: Box::new(options) });
    }
}

/// A connection whose handshake is not complete.
pub(crate) struct Pending {
    pub(crate) server: u64,
    pub(crate) credentials: Credentials,
    pub(crate) deadline: Instant,
    /// Why it will be turned away whatever it says: it is heard only for its memory's sake.
    pub(crate) refusal: Option<PagerError>,
    /// An observer may have been asked about it, by an earlier process.
    pub(crate) asked: bool,
    /// What comes stays in the connection's queue, for a successor.
    pub(crate) peeks: bool,
    socket: OwnedFd,
    message: Vec<u8>,
    uffd: Option<OwnedFd>,
}

impl Pending {
    /// Leaves in the connection's queue what comes from now on, and begins with all that is there.
    ///
    /// # Errors
    ///
    /// [`PagerError::System`] where the kernel, or a filter of system calls, does not have that.
    pub(crate) fn peek(&mut self) -> Result<(), PagerError> {
        fd_passing::peek_from_start(self.socket.as_fd())
            .map_err(|error| PagerError::System { syscall: "setsockopt", errno: errno_of(&error) })?;
        self.peeks = true;
        Ok(())
    }

    /// Takes what has arrived; `Some` when that completes the handshake.
    ///
    /// # Errors
    ///
    /// Whatever makes this connection no Firecracker's.
    pub(crate) fn receive(&mut self, base_page_size: u64) -> Result<Option<Handshake>, PagerError> {
        let mut piece = [0; 4096];
        while self.message.len() < LONGEST_MESSAGE {
            let take = if self.peeks { fd_passing::peek } else { fd_passing::recv };
            match take(self.socket.as_fd(), &mut piece, MOST_FDS) {
                Ok(received) => {
                    // The first descriptor is the uffd. Any other is closed right here.
                    for fd in received.fds {
                        self.uffd.get_or_insert(fd);
                    }
                    if received.len == 0 {
                        return self.hung_up();
                    }
                    self.message.extend_from_slice(piece.get(..received.len).unwrap_or_default());
                }
                Err(FdPassingError::WouldBlock) => break,
                Err(error) => {
                    return Err(PagerError::Protocol(format!("receiving the handshake failed: {error}")));
                }
            }
            if let Some(handshake) = parse_handshake(&self.message, base_page_size)? {
                return self.complete(handshake).map(Some);
            }
        }
        parse_handshake(&self.message, base_page_size)?.map(|handshake| self.complete(handshake)).transpose()
    }

    fn complete(&self, handshake: Handshake) -> Result<Handshake, PagerError> {
        if self.uffd.is_none() {
            return Err(without_uffd());
        }
        Ok(handshake)
    }

    fn hung_up(&self) -> Result<Option<Handshake>, PagerError> {
        Err(PagerError::Protocol(format!(
            "the connection was closed after {} bytes, before the handshake was complete",
            self.message.len()
        )))
    }

    /// What the peer has handed over.
    ///
    /// # Errors
    ///
    /// Why there is nothing that anybody could wait for: no uffd came, or what came is none, or its process is gone.
    /// Everything it sent is closed then.
    pub(crate) fn into_offer(self, handshake: Option<Handshake>) -> Result<Offer, PagerError> {
        let Some(uffd) = self.uffd else { return Err(without_uffd()) };
        let uffd = Userfaultfd::adopt(uffd)?;
        let mut refusal = self.refusal;
        let process = match Supervised::of_peer(self.socket.as_fd(), &uffd) {
            Ok(None) => {
                return Err(PagerError::Protocol(
                    "the process was gone when its handshake was complete".to_owned(),
                ));
            }
            Ok(process) => process,
            Err(error) => {
                refusal.get_or_insert(PagerError::Protocol(format!(
                    "the peer's process cannot be watched: {error}"
                )));
                None
            }
        };
        Ok(Offer {
            server: self.server,
            peer: Peer::from(self.credentials),
            process,
            handshake,
            deadline: self.deadline,
            asked: self.asked,
            refusal,
            uffd,
            unread: if self.peeks { self.message.len() } else { 0 },
            connection: self.socket,
        })
    }
}

fn without_uffd() -> PagerError {
    PagerError::Protocol(
        "the handshake came without a userfaultfd: it must ride with the array (SCM_RIGHTS)".to_owned(),
    )
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
