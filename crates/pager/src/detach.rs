//! Letting a process go on without a pager, once all of its memory is there.

use crate::error::PagerError;
use crate::owed::Owed;
use crate::policy::{EndReason, Rest, SessionEnd};
use crate::session::Session;
use crate::sweep::Phase;

impl Session {
    /// Gives the memory back to its process if nothing of it is missing. Nothing ever becomes missing again: what was
    /// installed stays so, and what was given back reads zero, from the kernel as it did from here.
    pub(crate) fn detach(&mut self, mut answer: Owed<()>) {
        if !self.phase.serves() && !self.phase.holds() {
            return answer.give(Err(PagerError::SessionOver));
        }
        let pages = self.states.missing_count();
        if pages > 0 {
            return answer.give(Err(PagerError::PagesMissing { pages, len: self.map.bytes(pages) }));
        }
        // With nothing missing nobody gets zeros by it.
        self.phase = Phase::sweep(Rest::Zero, SessionEnd { reason: EndReason::Detached, error: None });
        self.keep_ending();
        answer.give(Ok(()));
    }
}
