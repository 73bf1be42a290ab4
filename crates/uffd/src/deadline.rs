//! Waiting for a descriptor until a moment, not for a duration: interrupted and repeated waits do not add up.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// When to give up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    /// `None`: further away than the clock reaches.
    at: Option<Instant>,
}

impl Deadline {
    pub(crate) fn after(time: Duration) -> Self {
        Self { at: Instant::now().checked_add(time) }
    }

    /// Waits until the descriptor is ready for one of `events`, has failed or was hung up; `false` when the time is up
    /// first. A deadline that has passed still asks once, without waiting.
    pub(crate) fn wait_for(self, fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<bool> {
        loop {
            let left = self.left();
            match poll(&mut [PollFd::new(fd, events)], slice(left)) {
                Ok(0) if left == Some(Duration::ZERO) => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn left(self) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

/// poll(2) counts whole milliseconds in a small number: rounded up, so that the last one is not spun away, and cut.
fn slice(left: Option<Duration>) -> PollTimeout {
    let millis = left.map_or(u128::MAX, |left| left.as_nanos().div_ceil(1_000_000));
    PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_rounded_up_and_cut() {
        assert_eq!(slice(Some(Duration::ZERO)), PollTimeout::ZERO);
        assert_eq!(slice(Some(Duration::from_nanos(1))), PollTimeout::from(1_u16));
        assert_eq!(slice(Some(Duration::MAX)), PollTimeout::from(u16::MAX));
        assert_eq!(slice(None), PollTimeout::from(u16::MAX));
    }
}
