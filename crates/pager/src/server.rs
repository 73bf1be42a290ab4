//! A listening socket that turns connections into sessions.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::Uid;
use uffd::Userfaultfd;
use uffd::fd_passing::{self, Credentials, FdPassingError};

use crate::address_map::AddressMap;
use crate::error::PagerError;
use crate::firecracker::{Handshake, LONGEST_MESSAGE, parse_handshake};
use crate::notice::Observer;
use crate::policy::FailurePolicy;
use crate::session::Parts;
use crate::socket::Listener;
use crate::source::PageSource;
use crate::supervise::{Peer, Supervised};

/// Descriptors taken from one message. Only the first is used; more than a few are no handshake.
const MOST_FDS: usize = 16;

/// How a server serves.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where it listens.
    pub socket_path: PathBuf,
    /// The memory image.
    pub source: Arc<dyn PageSource>,
    /// What happens to a process whose memory cannot be served.
    pub policy: FailurePolicy,
    /// Bytes installed around a fault: a power of two, at most 2 MiB. Where absent: 64 KiB, and 256 KiB where faults
    /// are dense.
    pub window: Option<u64>,
    /// Whose processes may connect; the caller's own where absent.
    pub peer_uid: Option<u32>,
    /// How long a handshake may take from its connection on.
    pub handshake_timeout: Duration,
    /// Sessions and handshakes at one time; connections beyond are rejected.
    pub max_sessions: usize,
}

pub(crate) struct Server {
    pub(crate) id: u64,
    /// Gone once the server is closing.
    pub(crate) listener: Option<Listener>,
    pub(crate) options: ServerOptions,
    pub(crate) observer: Arc<dyn Observer>,
    /// Sessions and handshakes that are alive.
    pub(crate) alive: usize,
    /// Accepting is put off until then: no descriptor was free.
    pub(crate) paused_until: Option<Instant>,
}

impl Server {
    pub(crate) fn new(
        id: u64,
        options: ServerOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, PagerError> {
        let uid = options.peer_uid.map_or_else(Uid::effective, Uid::from_raw);
        let listener = Some(Listener::bind(&options.socket_path, uid)?);
        Ok(Self { id, listener, options, observer, alive: 0, paused_until: None })
    }

    /// Checks who connected, and begins to listen to it.
    pub(crate) fn greet(&self, socket: OwnedFd, now: Instant) -> Result<Pending, PagerError> {
        let credentials = fd_passing::peer_credentials(socket.as_fd())
            .map_err(|error| PagerError::Protocol(format!("the peer does not tell who it is: {error}")))?;
        let allowed = self.options.peer_uid.unwrap_or_else(|| Uid::effective().as_raw());
        if credentials.uid != allowed {
            return Err(PagerError::PeerNotAllowed { pid: credentials.pid, uid: credentials.uid, allowed });
        }
        if self.alive >= self.options.max_sessions {
            return Err(PagerError::Exhausted(format!(
                "all {} sessions of this server are taken (`maxSessions`)",
                self.options.max_sessions
            )));
        }
        Ok(Pending {
            server: self.id,
            socket,
            credentials,
            message: Vec::new(),
            uffd: None,
            deadline: now + self.options.handshake_timeout,
        })
    }
}

/// A connection whose handshake is not complete.
pub(crate) struct Pending {
    pub(crate) server: u64,
    pub(crate) credentials: Credentials,
    pub(crate) deadline: Instant,
    socket: OwnedFd,
    message: Vec<u8>,
    uffd: Option<OwnedFd>,
}

impl Pending {
    /// Takes what has arrived; `Some` when that completes the handshake.
    ///
    /// # Errors
    ///
    /// Whatever makes this connection no Firecracker's.
    pub(crate) fn receive(&mut self, base_page_size: u64) -> Result<Option<Handshake>, PagerError> {
        let mut piece = [0; 4096];
        while self.message.len() < LONGEST_MESSAGE {
            match fd_passing::recv(self.socket.as_fd(), &mut piece, MOST_FDS) {
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
            return Err(PagerError::Protocol(
                "the handshake came without a userfaultfd: it must ride with the array (SCM_RIGHTS)"
                    .to_owned(),
            ));
        }
        Ok(handshake)
    }

    fn hung_up(&self) -> Result<Option<Handshake>, PagerError> {
        Err(PagerError::Protocol(format!(
            "the connection was closed after {} bytes, before the handshake was complete",
            self.message.len()
        )))
    }

    /// Checks everything the peer claims, and makes it what a session is made of.
    ///
    /// # Errors
    ///
    /// What is wrong with it. Everything it sent is closed then.
    pub(crate) fn into_parts(
        self,
        id: u64,
        handshake: &Handshake,
        server: &Server,
    ) -> Result<Option<Parts>, PagerError> {
        let source = Arc::clone(&server.options.source);
        let map = AddressMap::new(&handshake.regions, handshake.page_size, source.size())?;
        let Some(uffd) = self.uffd else {
            return Err(PagerError::Protocol("the handshake came without a userfaultfd".to_owned()));
        };
        let process = Supervised::of_peer(self.socket.as_fd()).map_err(|error| {
            PagerError::Protocol(format!("the peer's process cannot be watched: {error}"))
        })?;
        let Some(process) = process else { return Ok(None) };
        let uffd = Userfaultfd::adopt(uffd)?;
        for region in &handshake.regions {
            // WAKE is the kernel's own check of a range: it touches nothing and fails only on impossible ones.
            uffd.wake(region.address, region.len).map_err(|cause| PagerError::Kernel {
                address: region.address,
                len: region.len,
                cause,
            })?;
        }
        Ok(Some(Parts {
            id,
            uffd,
            map,
            source,
            policy: server.options.policy,
            window: server.options.window,
            peer: Peer::from(self.credentials),
            process: Some(process),
            parent: None,
            minor: None,
            tracking: None,
            all_there: false,
            own: false,
            connection: Some(self.socket),
        }))
    }
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
