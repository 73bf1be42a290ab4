//! Reads of the source that take too long.

use std::time::Instant;

use crate::error::PagerError;
use crate::policy::EndReason;
use crate::session::{Context, Session};

impl Session {
    /// Gives up reads that have taken too long; when the next one will have, if none has.
    pub(crate) fn check_reads(&mut self, now: Instant, cx: &mut Context<'_>) -> Option<Instant> {
        let soonest = self.in_flight.iter().map(|reading| reading.deadline).min()?;
        if soonest > now {
            return Some(soonest);
        }
        let ms = self.source_timeout.as_millis() as u64;
        self.fail(EndReason::Stalled, PagerError::Timeout { what: "the source did not answer", ms });
        // Whoever waits for these pages gets what the policy says; an answer that still comes finds nothing to fill.
        let given_up = std::mem::take(&mut self.in_flight);
        for page in given_up.into_iter().flat_map(|reading| reading.waiting) {
            self.answer(page, cx);
        }
        None
    }
}
