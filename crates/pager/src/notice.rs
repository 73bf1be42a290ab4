//! What the pager tells its owner. Nothing of it is on the path of a fault.

use std::sync::Arc;

use crate::address_map::Region;
use crate::error::PagerError;
use crate::policy::{Hold, SessionEnd};
use crate::session_info::SessionInfo;
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
    /// A session is held: its faults wait until [`Pager::resume`], [`Pager::close_session`], or `hold.until`. Where `hold.asks`,
    /// what is to be done is said by [`Pager::decide`]; the session may be one that was never announced then, and if the answer
    /// is to hold it, that is told again.
    ///
    /// [`Pager::resume`]: crate::Pager::resume
    /// [`Pager::close_session`]: crate::Pager::close_session
    /// [`Pager::decide`]: crate::Pager::decide
    Held {
        /// Which.
        id: u64,
        /// Who is served.
        peer: Peer,
        /// Why.
        hold: Hold,
    },
    /// A handshake was completed, and which image the process gets is to be said by [`Pager::answer`]. It waits until
    /// then; if that takes too long, or it goes away, it is rejected under the same id.
    ///
    /// [`Pager::answer`]: crate::Pager::answer
    Asking {
        /// Names the question, and the session that comes of it.
        id: u64,
        /// Who it is.
        peer: Peer,
        /// What it hands over, in address order.
        regions: Vec<Region>,
        /// Bytes of a page.
        page_size: u64,
    },
    /// A connection was turned away, whatever memory it handed over put through the failure policy; the server goes on.
    Rejected {
        /// The question it was, if one was asked.
        asked: Option<u64>,
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
