//! When a session's owner hears of it, and of its end.

use std::sync::Arc;

use super::{EventLoop, NO_SERVER};
use crate::error::PagerError;
use crate::fill;
use crate::notice::Notice;
use crate::policy::SessionEnd;
use crate::supervise::Peer;

/// What its owner knows of a session.
pub(super) enum Standing {
    /// Nothing: not all of its memory is there that is to be first. `asked`: its observer was asked about it.
    Unannounced {
        asked: bool,
    },
    Announced,
    /// It is no session but the end of what was never served.
    Refused(Refusal),
}

pub(super) struct Refusal {
    pub(super) error: PagerError,
    /// Its observer was asked about it, and hears the end of that.
    pub(super) asked: bool,
}

impl Standing {
    pub(super) const fn is_refused(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    /// What there is to tell of its end.
    pub(super) fn ended(self, id: u64, server: u64, peer: Peer, end: SessionEnd) -> Notice {
        let rejected =
            |asked: bool, error| Notice::Rejected { asked: asked.then_some(id), peer: Some(peer), error };
        match self {
            Self::Refused(Refusal { error, asked }) => rejected(asked, error),
            // Whoever has given away memory without a server knows its number.
            Self::Unannounced { asked } if server != NO_SERVER => rejected(asked, fill::error_of(end)),
            Self::Unannounced { .. } | Self::Announced => Notice::SessionEnded { id, end },
        }
    }
}

impl EventLoop {
    /// Tells of a session, once, when all of its memory is there that is to be first.
    pub(super) fn announce(&mut self, id: u64) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        if !matches!(entry.standing, Standing::Unannounced { .. }) || !entry.session.is_ready() {
            return;
        }
        entry.standing = Standing::Announced;
        // Here alone it is set.
        let _ = entry.session.info.filled.set(entry.session.filled());
        entry.observer.notice(Notice::SessionStarted(Arc::clone(&entry.session.info)));
    }
}
