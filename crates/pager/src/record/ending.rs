//! How a session is ending, so that a successor goes on ending it, and in the same way.

use super::Record;
use super::layout::at;
use crate::policy::{EndReason, Rest};

/// An end that has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    /// What becomes of the pages that are missing.
    pub(crate) rest: Rest,
    pub(crate) reason: EndReason,
    /// What went wrong, as text; cut where there is no room for more.
    pub(crate) error: Option<String>,
    /// It was over but for its uffd, which must not be closed.
    pub(crate) stays_open: bool,
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
/// Set in every end.
const ENDS: u64 = 1 << 63;
const STAYS_OPEN: u64 = 1 << 62;

impl Record {
    /// Puts down that the session is ending.
    pub(crate) fn put_ending(&self, ending: &Ending) {
        let rest = RESTS.iter().position(|&rest| rest == ending.rest).unwrap_or(0) as u64;
        let reason = REASONS.iter().position(|&reason| reason == ending.reason).unwrap_or(0) as u64;
        let text = ending.error.as_deref().unwrap_or_default();
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
        let stays_open = if ending.stays_open { STAYS_OPEN } else { 0 };
        self.put(at::ENDING, ENDS | stays_open | reason << 8 | rest);
    }

    /// The end that has begun; `None` while it is served.
    pub(crate) fn ending(&self) -> Option<Ending> {
        let word = self.get(at::ENDING);
        if word == 0 {
            return None;
        }
        // What cannot be is the careful choice.
        let rest = RESTS.get((word & 0xff) as usize).copied().unwrap_or(Rest::Poison);
        let reason = REASONS.get((word >> 8 & 0xff) as usize).copied().unwrap_or(EndReason::PagerLost);
        let len = usize::try_from(self.get(at::TEXT)).unwrap_or(usize::MAX).min((at::TEXT_WORDS - 1) * 8);
        let words = (0..len.div_ceil(8)).map(|index| self.get(at::TEXT + 1 + index));
        let mut bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        bytes.truncate(len);
        let error = (len > 0).then(|| String::from_utf8_lossy(&bytes).into_owned());
        Some(Ending { rest, reason, error, stays_open: word & STAYS_OPEN != 0 })
    }
}
