//! That a session is held, or how it is ending, so that a successor goes on in the same way.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::Record;
use super::layout::at;
use crate::error::PagerError;
use crate::policy::{EndReason, Hold, Rest, SessionEnd};
use crate::sweep::Phase;

/// What becomes of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    /// It ends, and this is what becomes of the pages that are missing.
    Ends(Rest),
    /// It is over but for its uffd, which must not be closed.
    StaysOpen,
    /// Its faults are kept.
    Held {
        asks: bool,
        /// Something had failed.
        failed: bool,
        /// What its process does cannot be followed any more.
        lost_track: bool,
        until: Option<Instant>,
    },
}

/// A session that is not served as ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) course: Course,
    pub(crate) reason: EndReason,
    /// What went wrong, as text; cut where there is no room for more.
    pub(crate) error: Option<String>,
}

const RESTS: [Rest; 3] = [Rest::Poison, Rest::Populate, Rest::Zero];
const REASONS: [EndReason; 8] = [
    EndReason::Closed,
    EndReason::Detached,
    EndReason::PeerExited,
    EndReason::SourceFailed,
    EndReason::Stalled,
    EndReason::Protocol,
    EndReason::Exhausted,
    EndReason::PagerLost,
];
/// Set whenever it is not served.
const ENDS: u64 = 1 << 63;
const STAYS_OPEN: u64 = 1 << 62;
const HELD: u64 = 1 << 61;
const ASKS: u64 = 1 << 60;
const FAILED: u64 = 1 << 59;
const LOST_TRACK: u64 = 1 << 58;

impl Ending {
    /// The phase that it is, for who takes over.
    pub(crate) fn into_phase(self) -> Phase {
        let Self { course, reason, error } = self;
        let error = error.map(|message| PagerError::Inherited { message, code: reason.code() });
        let end = SessionEnd { reason, error };
        match course {
            Course::Ends(rest) => Phase::sweep(rest, end),
            Course::StaysOpen => Phase::Over { end, leave_open: true },
            Course::Held { asks, failed, until, .. } => {
                Phase::Held(Hold { failure: failed.then_some(end), until, asks })
            }
        }
    }

    /// What a phase comes to; `None` while it is served.
    pub(crate) fn of(phase: &Phase, lost_track: bool) -> Option<Self> {
        let (course, end) = match phase {
            Phase::Serving => return None,
            Phase::Held(Hold { failure, until, asks }) => {
                let (asks, until, failed) = (*asks, *until, failure.is_some());
                (Course::Held { asks, failed, lost_track, until }, failure.as_ref())
            }
            Phase::Sweeping { rest, end, .. } => (Course::Ends(*rest), Some(end)),
            Phase::Dying { end, .. } => (Course::Ends(Rest::Poison), Some(end)),
            Phase::Over { end, leave_open: true } => (Course::StaysOpen, Some(end)),
            Phase::Over { end, .. } => (Course::Ends(Rest::Poison), Some(end)),
        };
        let reason = end.map_or(EndReason::Closed, |end| end.reason);
        let error = end.and_then(|end| end.error.as_ref()).map(ToString::to_string);
        Some(Self { course, reason, error })
    }
}

impl Record {
    /// Puts down what becomes of the session.
    pub(crate) fn put_ending(&self, ending: Option<&Ending>) {
        let Some(Ending { course, reason, error }) = ending else {
            return self.put(at::ENDING, 0);
        };
        let reason = REASONS.iter().position(|known| known == reason).unwrap_or(0) as u64;
        let text = error.as_deref().unwrap_or_default();
        let mut len = text.len().min((at::TEXT_WORDS - 1) * 8);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        for (index, chunk) in text.as_bytes().get(..len).unwrap_or_default().chunks(8).enumerate() {
            let mut word = [0; 8];
            word.iter_mut().zip(chunk).for_each(|(byte, from)| *byte = *from);
            self.put(at::TEXT + 1 + index, u64::from_ne_bytes(word));
        }
        self.put(at::TEXT, len as u64);
        let flag = |is: bool, flag: u64| if is { flag } else { 0 };
        let course = match *course {
            Course::Ends(rest) => RESTS.iter().position(|&known| known == rest).unwrap_or(0) as u64,
            Course::StaysOpen => STAYS_OPEN,
            Course::Held { asks, failed, lost_track, until } => {
                self.put(at::HELD_UNTIL, until.map_or(0, |until| clock().saturating_add(in_ns(until))));
                HELD | flag(asks, ASKS) | flag(failed, FAILED) | flag(lost_track, LOST_TRACK)
            }
        };
        self.put(at::ENDING, ENDS | course | reason << 8);
    }

    /// What becomes of the session; `None` while it is served.
    pub(crate) fn ending(&self) -> Option<Ending> {
        let word = self.get(at::ENDING);
        if word == 0 {
            return None;
        }
        let course = if word & STAYS_OPEN != 0 {
            Course::StaysOpen
        } else if word & HELD != 0 {
            let until = match self.get(at::HELD_UNTIL) {
                0 => None,
                // One that cannot be is over.
                moment => Instant::now().checked_add(Duration::from_nanos(moment.saturating_sub(clock()))),
            };
            let (asks, failed) = (word & ASKS != 0, word & FAILED != 0);
            Course::Held { asks, failed, lost_track: word & LOST_TRACK != 0, until }
        } else {
            // What cannot be is the careful choice.
            Course::Ends(RESTS.get((word & 0xff) as usize).copied().unwrap_or(Rest::Poison))
        };
        let reason = REASONS.get((word >> 8 & 0xff) as usize).copied().unwrap_or(EndReason::PagerLost);
        let len = usize::try_from(self.get(at::TEXT)).unwrap_or(usize::MAX).min((at::TEXT_WORDS - 1) * 8);
        let words = (0..len.div_ceil(8)).map(|index| self.get(at::TEXT + 1 + index));
        let mut bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        bytes.truncate(len);
        let error = (len > 0).then(|| String::from_utf8_lossy(&bytes).into_owned());
        Some(Ending { course, reason, error })
    }
}

/// Nanoseconds from now on.
fn in_ns(moment: Instant) -> u64 {
    u64::try_from(moment.saturating_duration_since(Instant::now()).as_nanos()).unwrap_or(u64::MAX >> 1)
}

/// CLOCK_MONOTONIC, in nanoseconds; never 0.
fn clock() -> u64 {
    // It fails for no clock that there is.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX >> 1).max(1)
}
