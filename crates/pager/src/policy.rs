//! The words for what happens to memory that cannot be, or will not be, served any more.

use std::time::{Duration, Instant};

use crate::error::PagerError;

/// What a session does to the other process when its memory cannot be served.
///
/// Zero pages are not among them: nothing that failed is ever answered with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailurePolicy {
    /// Every page still missing is poisoned: touching one is SIGBUS. Where the kernel cannot poison
    /// (before 6.6), the process is killed.
    #[default]
    Poison,
    /// The process is killed through its pidfd.
    Kill,
    /// Its faults are kept, without an answer, until [`Pager::resume`] or [`Pager::close_session`]; it is told by
    /// [`Notice::Held`]. Where nobody could go on (the session was never announced, or its owner is gone), it is
    /// [`FailurePolicy::Poison`].
    ///
    /// [`Pager::resume`]: crate::Pager::resume
    /// [`Pager::close_session`]: crate::Pager::close_session
    /// [`Notice::Held`]: crate::Notice::Held
    Hold {
        /// How long, at most; then it is [`FailurePolicy::Poison`]. `None`: for as long as it takes.
        timeout: Option<Duration>,
    },
    /// The observer is asked by [`Notice::Held`], and answers by [`Pager::decide`]. Faults are kept meanwhile.
    ///
    /// [`Notice::Held`]: crate::Notice::Held
    /// [`Pager::decide`]: crate::Pager::decide
    Ask {
        /// How long the answer may take; then it is [`FailurePolicy::Poison`].
        timeout: Duration,
    },
}

impl FailurePolicy {
    /// What it comes to where nobody is there to answer, or to go on later.
    #[must_use]
    pub const fn at_once(self) -> Self {
        match self {
            Self::Kill => Self::Kill,
            Self::Poison | Self::Hold { .. } | Self::Ask { .. } => Self::Poison,
        }
    }
}

/// Why a session is held, and how that goes on.
#[derive(Debug, Clone)]
pub struct Hold {
    /// What failed; `None` where its owner wanted it held.
    pub failure: Option<SessionEnd>,
    /// When what waits is poisoned, if nothing happens until then.
    pub until: Option<Instant>,
    /// It is asked what is to be done.
    pub asks: bool,
}

/// What a session that is closed on purpose does with the pages that are still missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rest {
    /// Poisons them: touching one is SIGBUS.
    #[default]
    Poison,
    /// Installs all of them from the source first. What the source cannot give is poisoned.
    Populate,
    /// Leaves them to the kernel, which gives zero pages. Never the default.
    Zero,
}

/// Why a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// It was closed by its owner.
    Closed,
    /// All of its memory was there, and its process goes on without a pager: its owner wanted it so.
    Detached,
    /// The served process is gone.
    PeerExited,
    /// The source failed; the failure policy was applied.
    SourceFailed,
    /// The source did not answer in time; the failure policy was applied.
    Stalled,
    /// The served process did something that cannot be followed; the failure policy was applied.
    Protocol,
    /// A limit of the machine was reached; the failure policy was applied.
    Exhausted,
    /// The pager itself failed; the failure policy was applied.
    PagerLost,
}

impl EndReason {
    /// The public name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Detached => "detached",
            Self::PeerExited => "peer-exited",
            Self::SourceFailed => "source-failed",
            Self::Stalled => "stalled",
            Self::Protocol => "protocol",
            Self::Exhausted => "exhausted",
            Self::PagerLost => "pager-lost",
        }
    }
}

impl EndReason {
    /// The code of an error of which no more is known than that it has led to this.
    pub(crate) const fn code(self) -> &'static str {
        match self {
            Self::SourceFailed => "ERR_UFFD_SOURCE",
            Self::Stalled => "ERR_UFFD_TIMEOUT",
            Self::Protocol => "ERR_UFFD_PROTOCOL",
            Self::Exhausted => "ERR_UFFD_EXHAUSTED",
            Self::PeerExited => "ERR_UFFD_CLOSED",
            Self::Closed | Self::Detached | Self::PagerLost => "ERR_UFFD_PAGER_LOST",
        }
    }
}

/// How a session ended.
#[derive(Debug, Clone)]
pub struct SessionEnd {
    /// Why.
    pub reason: EndReason,
    /// What went wrong; absent when nothing did.
    pub error: Option<PagerError>,
}
