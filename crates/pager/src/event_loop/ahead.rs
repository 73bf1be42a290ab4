//! Pages that nobody waits for: one window a turn, of one session after the other, when no fault waits.

use std::time::Instant;

use super::{EventLoop, earlier};
use crate::ahead::Ahead;

impl EventLoop {
    /// Brings a window for the next session that has some to bring. Whether there is more.
    pub(super) fn bring_ahead(&mut self, now: Instant, soonest: &mut Option<Instant>) -> bool {
        let after = self.ahead.range(self.last_ahead + 1..).next();
        let Some(&id) = after.or_else(|| self.ahead.first()) else { return false };
        self.last_ahead = id;
        let mut outcome = Ahead::Nothing;
        self.with_session(id, |session, cx| {
            outcome = session.bring_ahead(cx);
        });
        match outcome {
            Ahead::More => return true,
            Ahead::At(moment) => *soonest = earlier(*soonest, moment.max(now)),
            Ahead::Nothing => {}
        }
        // It comes back by itself, when something happens to it.
        self.ahead.remove(&id);
        !self.ahead.is_empty()
    }
}
