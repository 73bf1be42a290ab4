//! Waiting for what becomes ready: by looking again and again for a moment, where that hits, and then asleep.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::EventLoop;
use super::token::Token;
use crate::spin::Look;

/// For how long it is looked.
const BUDGET: Duration = Duration::from_micros(100);

impl EventLoop {
    /// What is ready, at the latest after `timeout`.
    pub(super) fn wait(&mut self, ready: &mut [EpollEvent], timeout: EpollTimeout) -> Result<usize, Errno> {
        if timeout != EpollTimeout::ZERO && !self.sessions.is_empty() && self.spin.is_due() {
            let count = self.look(ready)?;
            if count > 0 {
                return Ok(count);
            }
        }
        self.epoll.wait(ready, timeout)
    }

    /// What becomes ready while it is looked for a moment.
    fn look(&mut self, ready: &mut [EpollEvent]) -> Result<usize, Errno> {
        let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
        if count > 0 {
            self.spin.looked(Look::AtOnce);
            return Ok(count);
        }
        let until = Instant::now() + BUDGET;
        let count = loop {
            std::hint::spin_loop();
            let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
            if count > 0 || Instant::now() >= until {
                break count;
            }
        };
        let is_fault = |event: &EpollEvent| matches!(Token::decode(event.data()), Token::Uffd(_));
        let hit = ready.iter().take(count).any(is_fault);
        self.spin.looked(if hit { Look::Hit } else { Look::Miss });
        Ok(count)
    }
}
