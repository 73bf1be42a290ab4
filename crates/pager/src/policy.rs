//! The words for what happens to memory that cannot be, or will not be, served any more.

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
