//! What other threads have for the control loop: notices of the pager, answers to requests, questions of sources.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use pager::{Fetcher, Notice, Observer, PagerError, RecordedBytes, Recording};
use serde_json::Value;

use crate::recordings::RecordingValue;

/// One thing.
pub(crate) enum Event {
    /// Of a session or server of the pager.
    Notice {
        /// The server that it is about, by the daemon's number.
        server: Option<u64>,
        notice: Notice,
    },
    /// What a request came to that was not answered at once.
    Answer { client: u64, request: Value, answer: Result<Value, PagerError> },
    /// A recording has come to its end.
    Recorded { value: RecordingValue, recording: Arc<Recording>, bytes: RecordedBytes },
    /// One that was to be ended: what that has come to.
    Stopped { client: u64, request: Value, session: u64, outcome: Result<(), PagerError> },
    /// A session that was held goes on.
    Resumed { session: u64 },
    /// A source wants bytes that only its client has.
    Ask { source: SourceKey, id: u64, offset: u64, len: usize },
}

/// Whose source it is, and which.
pub(crate) type SourceKey = (String, u64);

/// A queue that other threads fill, and an eventfd that says so.
pub(crate) struct Outbox {
    queue: Mutex<Vec<Event>>,
    bell: EventFd,
}

impl Outbox {
    pub(crate) fn new() -> Result<Self, Errno> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { queue: Mutex::default(), bell })
    }

    pub(crate) fn push(&self, event: Event) {
        // Only whole events are put in and taken out under this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        // A full counter wakes just as well.
        let _ = self.bell.write(1);
    }

    pub(crate) fn take(&self) -> Vec<Event> {
        let _ = self.bell.read();
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Outbox").finish_non_exhaustive()
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// Passes on what the pager tells of a server, or of what was adopted.
pub(crate) struct Told {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) server: Option<u64>,
}

impl Observer for Told {
    fn notice(&self, notice: Notice) {
        self.outbox.push(Event::Notice { server: self.server, notice });
    }
}

/// Passes on what a source asks for.
pub(crate) struct Asks {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) source: SourceKey,
}

impl Fetcher for Asks {
    fn request(&self, id: u64, offset: u64, len: usize) {
        self.outbox.push(Event::Ask { source: self.source.clone(), id, offset, len });
    }
}
