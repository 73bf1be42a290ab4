//! What the pager tells its owner. Nothing of it is on the path of a fault.

use std::sync::Arc;

use crate::error::PagerError;
use crate::policy::SessionEnd;
use crate::session::SessionInfo;
use crate::supervise::Peer;

/// Something that happened.
#[derive(Debug)]
pub enum Notice {
    /// A handshake was completed; faults are being answered.
    SessionStarted(Arc<SessionInfo>),
    /// A session is over, its uffd closed.
    SessionEnded {
        /// Which.
        id: u64,
        /// How.
        end: SessionEnd,
    },
    /// A connection was turned away; the server goes on.
    Rejected {
        /// Who it was, where that is known.
        peer: Option<Peer>,
        /// Why.
        error: PagerError,
    },
    /// The server's last session is over, its socket closed and removed.
    ServerClosed,
}

/// Who is told. Called on the event loop's thread: it must return at once.
pub trait Observer: Send + Sync {
    /// Takes one notice.
    fn notice(&self, notice: Notice);
}
