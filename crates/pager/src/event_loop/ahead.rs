//! Pages that nobody waits for: piece after piece, of one session after the other, while no fault waits.

use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::{EventLoop, earlier};
use crate::ahead::Ahead;
use crate::in_two::HALF;

/// How long pieces are brought before everything else has its turn, as long as nothing asks for one.
const SLICE: Duration = Duration::from_millis(1);
/// Bytes brought at a time: 15 us.
const PIECE: u64 = 64 << 10;
/// The same where no fault but those of streams has come for the last [`CALM`] pieces: less is lost between them, and a
/// stream that waits at the end of what is there is woken less often.
const LARGE_PIECE: u64 = HALF;
const CALM: u32 = 64;

impl EventLoop {
    /// Brings pages for sessions that have some to bring. Whether those want another turn: for more, or because they end.
    pub(super) fn bring_ahead(&mut self, now: Instant, soonest: &mut Option<Instant>) -> bool {
        let mut brought = false;
        while self.bring_piece(now, soonest) {
            brought = true;
            if now.elapsed() >= SLICE || self.is_asked() {
                break;
            }
        }
        brought
    }

    /// Brings a piece for the next session. Whether there is more to bring.
    fn bring_piece(&mut self, now: Instant, soonest: &mut Option<Instant>) -> bool {
        let after = self.ahead.range(self.last_ahead + 1..).next();
        let Some(&id) = after.or_else(|| self.ahead.first()) else { return false };
        self.last_ahead = id;
        self.calm = self.calm.saturating_add(1);
        let piece = match self.calm > CALM {
            false => PIECE,
            true if self.lent.in_two.is_due() => 2 * HALF,
            true => LARGE_PIECE,
        };
        let mut outcome = Ahead::Nothing;
        self.with_session(id, |session, cx| {
            outcome = session.bring_ahead(piece, cx);
        });
        self.announce(id);
        match outcome {
            Ahead::More => return true,
            Ahead::At(moment) => *soonest = earlier(*soonest, moment.max(now)),
            Ahead::Nothing => {}
        }
        // It comes back by itself, when something happens to it.
        self.ahead.remove(&id);
        !self.ahead.is_empty()
    }

    /// Whether anything has happened that the loop would be told of: a fault, of whatever session, goes first.
    fn is_asked(&self) -> bool {
        let mut ready = [EpollEvent::empty()];
        // Only looked at: it is told again in the next turn. An error is told there as well.
        self.epoll.wait(&mut ready, EpollTimeout::ZERO).is_ok_and(|count| count > 0)
    }
}
