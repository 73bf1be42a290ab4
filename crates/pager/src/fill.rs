//! What comes before a session is announced: nothing, or all of its memory.

use std::time::{Duration, Instant};

use crate::error::PagerError;
use crate::huge_fill::HugeFill;
use crate::policy::{EndReason, SessionEnd};
use crate::session::Session;

/// How the memory of a session is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FillMode {
    /// What is touched, with a window around it.
    #[default]
    Windows,
    /// Everything, before the session is announced ([`Notice::SessionStarted`]). Faults are answered meanwhile.
    ///
    /// [`Notice::SessionStarted`]: crate::Notice::SessionStarted
    Fill,
    /// The same into transparent huge pages, where the memory allows it; else as [`FillMode::Fill`], and [`Filled::fallback`] says why.
    /// Another process is stopped meanwhile (SIGSTOP, SIGCONT), and must not be let go on by anybody else, nor may a device of its own
    /// that runs in the kernel touch its memory. Into memory of this process huge pages are moved, which disturbs nobody.
    HugeFill,
    /// What an earlier run wanted ([`WorkingSet::replay`]), while no fault waits; apart from that, what is touched.
    ///
    /// [`WorkingSet::replay`]: crate::WorkingSet::replay
    Replay,
}

impl FillMode {
    /// The public name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Windows => "windows",
            Self::Fill => "fill",
            Self::HugeFill => "huge-fill",
            Self::Replay => "replay",
        }
    }
}

/// What is brought without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct FillOptions {
    /// Before the session is announced.
    pub mode: FillMode,
    /// Join what is there to transparent huge pages when no fault has come for a while. Zeros that were read from the image are
    /// copied then. Where that cannot be, [`Filled::fallback`] says why.
    pub collapse: bool,
}

/// What had come of a session when it was announced.
#[derive(Debug, Clone)]
pub struct Filled {
    /// How.
    pub mode: FillMode,
    /// Why it is not the mode that was wanted, or why nothing is joined, where that is so.
    pub fallback: Option<PagerError>,
    /// From its beginning on.
    pub took: Duration,
}

/// A session that is to be full before it is announced.
pub(crate) struct Filling {
    mode: FillMode,
    since: Instant,
    huge: Huge,
    fallback: Option<PagerError>,
}

/// What becomes of huge pages.
enum Huge {
    No,
    /// They are wanted.
    Wanted,
    Going(Box<HugeFill>),
    /// It is being worked on.
    Lent,
}

impl Filling {
    pub(crate) fn new(options: FillOptions) -> Self {
        let huge = if options.mode == FillMode::HugeFill { Huge::Wanted } else { Huge::No };
        Self { mode: options.mode, since: Instant::now(), huge, fallback: None }
    }

    /// Whether there is anything to do before the session is announced.
    pub(crate) fn is_wanted(&self) -> bool {
        !matches!(self.mode, FillMode::Windows | FillMode::Replay)
    }

    /// Whether huge pages are to be begun with.
    pub(crate) fn wants_huge(&self) -> bool {
        matches!(self.huge, Huge::Wanted)
    }

    /// Whether pages may become huge ones before it is announced.
    pub(crate) fn is_huge(&self) -> bool {
        !matches!(self.huge, Huge::No)
    }

    /// Filling with huge pages, while that goes on; until it is put back there is none.
    pub(crate) fn take_huge(&mut self) -> Option<Box<HugeFill>> {
        match std::mem::replace(&mut self.huge, Huge::Lent) {
            Huge::Going(huge) => Some(huge),
            other => {
                self.huge = other;
                None
            }
        }
    }

    pub(crate) fn put_huge(&mut self, huge: Box<HugeFill>) {
        self.huge = Huge::Going(huge);
    }

    /// No more huge pages: all that could be are there.
    pub(crate) fn end_huge(&mut self) {
        self.huge = Huge::No;
    }

    /// No huge pages, for this reason; the rest comes the ordinary way.
    pub(crate) fn fall_back(&mut self, error: PagerError) {
        self.huge = Huge::No;
        self.mode = FillMode::Fill;
        self.fallback = Some(error);
    }
}

impl Session {
    /// Begins to join what is there, if that is wanted.
    pub(crate) fn wants_collapsing(&mut self, wanted: bool) {
        if !wanted {
            return;
        }
        match self.begin_collapsing() {
            Ok(collapsing) => self.collapsing = collapsing,
            Err(error) => self.filling.fallback = Some(error),
        }
    }

    /// Whether it may be announced: all of its memory is there that was to be.
    pub(crate) fn is_ready(&self) -> bool {
        !self.ahead.fills()
    }

    /// It is being announced.
    pub(crate) fn filled(&self) -> Filled {
        let Filling { mode, since, fallback, .. } = &self.filling;
        Filled { mode: *mode, fallback: fallback.clone(), took: since.elapsed() }
    }
}

/// Why a session has ended that was never announced.
pub(crate) fn error_of(end: SessionEnd) -> PagerError {
    end.error.unwrap_or(match end.reason {
        EndReason::PeerExited => PagerError::PeerExited,
        _ => PagerError::Closed,
    })
}
