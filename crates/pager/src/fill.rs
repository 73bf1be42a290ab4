//! What comes before a session is announced: nothing, or all of its memory.

use std::time::{Duration, Instant};

use crate::error::PagerError;
use crate::policy::{EndReason, SessionEnd};
use crate::session::Session;

/// How the memory of a session is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FillMode {
    /// What is touched, with a window around it.
    #[default]
    Windows,
    /// Everything, before the session is announced ([`Notice::SessionStarted`]). Faults are answered meanwhile.
    ///
    /// [`Notice::SessionStarted`]: crate::Notice::SessionStarted
    Fill,
}

impl FillMode {
    /// The public name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Windows => "windows",
            Self::Fill => "fill",
        }
    }
}

/// What is brought without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FillOptions {
    /// Before the session is announced.
    pub mode: FillMode,
}

/// What had come of a session when it was announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// How.
    pub mode: FillMode,
    /// From its beginning on.
    pub took: Duration,
}

/// A session that is to be full before it is announced.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filling {
    mode: FillMode,
    since: Instant,
}

impl Filling {
    pub(crate) fn new(options: FillOptions) -> Self {
        Self { mode: options.mode, since: Instant::now() }
    }

    /// Whether there is anything to do before the session is announced.
    pub(crate) fn is_wanted(self) -> bool {
        self.mode != FillMode::Windows
    }
}

impl Session {
    /// Whether it may be announced: all of its memory is there that was to be.
    pub(crate) fn is_ready(&self) -> bool {
        !self.ahead.fills()
    }

    /// It is being announced.
    pub(crate) fn filled(&self) -> Filled {
        Filled { mode: self.filling.mode, took: self.filling.since.elapsed() }
    }
}

/// Why a session has ended that was never announced.
pub(crate) fn error_of(end: SessionEnd) -> PagerError {
    end.error.unwrap_or(match end.reason {
        EndReason::PeerExited => PagerError::PeerExited,
        _ => PagerError::Closed,
    })
}
