//! Events of held sessions that cannot be read: the loop looks for them at a pace, instead of being told about them without end.

use std::time::Instant;

use super::{EventLoop, Token, earlier, unwatch, watch};
use crate::holding::UNREADABLE_PAUSE;

impl EventLoop {
    /// Stops being told about the events of a session that could not be read, while it is held.
    pub(super) fn pause_reading(&mut self, id: u64) {
        let Some(entry) = self.sessions.get(&id) else { return };
        if entry.session.holding.unreadable && entry.session.phase.holds() {
            unwatch(&self.epoll, std::os::fd::AsFd::as_fd(&entry.session));
            self.unreadable.insert(id, Instant::now() + UNREADABLE_PAUSE);
        }
    }

    /// Looks again.
    pub(super) fn resume_reading(&mut self, now: Instant, soonest: &mut Option<Instant>) {
        let due: Vec<u64> =
            self.unreadable.iter().filter(|&(_, &moment)| moment <= now).map(|(&id, _)| id).collect();
        for id in due {
            self.unreadable.remove(&id);
            let Some(entry) = self.sessions.get(&id) else { continue };
            // It is read when the loop is told of it, in the next turn.
            if watch(&self.epoll, std::os::fd::AsFd::as_fd(&entry.session), Token::Uffd(id)).is_err() {
                self.unreadable.insert(id, now + UNREADABLE_PAUSE);
            }
        }
        for &moment in self.unreadable.values() {
            *soonest = earlier(*soonest, moment);
        }
    }
}
