//! A userfaultfd of this process's own memory whose events are read even while the thread that should read them cannot.
//!
//! With events of the address space in use, fork(2), madvise(2) and munmap(2) wait until their message was read. Where the
//! thread that calls them is the one that reads, it would wait for itself; and fork(3) holds the allocator's locks
//! meanwhile, so that every reader that allocates waits too. The guard is a thread that looks at a timer's pace, reads what
//! has stayed unread, and neither allocates nor touches registered memory. What it read is delivered first.

use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uffd::{Event, EventBuffer, Features, UffdError, Userfaultfd};

/// How long a message stays unread before the guard reads it, at least; and twice that at most.
const PACE: Duration = Duration::from_millis(10);
/// Messages of one of the guard's reads, and reads that it keeps. When they are used up, whoever causes the next event
/// waits until messages are taken.
const MESSAGES: usize = 16;
const READS: usize = 64;

/// A userfaultfd, and its guard once it needs one.
#[derive(Debug)]
pub struct Guarded {
    shared: Arc<Shared>,
    guard: Mutex<Option<Guard>>,
}

#[derive(Debug)]
struct Shared {
    uffd: Userfaultfd,
    kept: Mutex<Kept>,
    /// Counts reads by others than the guard: messages that were waiting before one of them are not left alone.
    reads: AtomicU64,
    /// A thread allocates while it starts: a fork(3) before its end would have it wait for the fork.
    started: Barrier,
}

/// What the guard has read, and the room it has left. Neither ever grows.
#[derive(Debug)]
struct Kept {
    full: VecDeque<EventBuffer>,
    free: Vec<EventBuffer>,
}

#[derive(Debug)]
struct Guard {
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Guarded {
    /// Wraps it; nothing runs yet.
    #[must_use]
    pub fn new(uffd: Userfaultfd) -> Self {
        let kept = Mutex::new(Kept { full: VecDeque::new(), free: Vec::new() });
        Self {
            shared: Arc::new(Shared { uffd, kept, reads: AtomicU64::new(0), started: Barrier::new(2) }),
            guard: Mutex::default(),
        }
    }

    /// Starts the guard, where events that somebody waits for are in use. To be called when memory of this process is
    /// registered; again is fine.
    ///
    /// # Errors
    ///
    /// When no thread or descriptor is to be had.
    pub fn guard(&self) -> io::Result<()> {
        let waited_for =
            Features::EVENT_FORK | Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
        let in_use = self.shared.uffd.enabled_features().unwrap_or(waited_for);
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.is_some() || !in_use.intersects(waited_for) {
            return Ok(());
        }
        {
            let mut kept = self.shared.lock();
            kept.full.reserve_exact(READS);
            kept.free.extend((0..READS).map(|_| EventBuffer::new(MESSAGES)));
        }
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (shared, stopped) = (Arc::clone(&self.shared), Arc::clone(&stop));
        let thread =
            std::thread::Builder::new().name("uffd-guard".into()).spawn(move || shared.watch(&stopped))?;
        self.shared.started.wait();
        *guard = Some(Guard { stop, thread });
        Ok(())
    }

    /// Takes at most `most` messages, those the guard has read first; else reads into `buffer`. Never waits.
    ///
    /// # Errors
    ///
    /// As [`Userfaultfd::read_events`].
    pub fn take_events(
        &self,
        most: usize,
        buffer: &mut EventBuffer,
        mut take: impl FnMut(Event),
    ) -> Result<usize, UffdError> {
        self.shared.reads.fetch_add(1, Ordering::Relaxed);
        // Nothing is allocated under the lock: in the middle of a fork(3) that would wait for the guard, which waits here.
        let mut kept = self.shared.lock();
        let Some(mut oldest) = kept.full.pop_front() else {
            let read = self.shared.uffd.read_events(buffer);
            if read.is_err() && !buffer.is_empty() {
                // Whole messages in front of the error: they come with the next call.
                let capacity = buffer.capacity();
                kept.full.push_back(std::mem::replace(buffer, EventBuffer::new(capacity)));
            }
            drop(kept);
            read?;
            return Ok(buffer.drain().take(most).map(take).count());
        };
        drop(kept);
        let count = oldest.drain().take(most).map(&mut take).count();
        let mut kept = self.shared.lock();
        if oldest.is_empty() {
            kept.free.push(oldest);
        } else {
            kept.full.push_front(oldest);
        }
        Ok(count)
    }

    /// Whether the guard has messages that were not taken.
    #[must_use]
    pub fn has_kept(&self) -> bool {
        !self.shared.lock().full.is_empty()
    }

    /// Ends the guard and gives the userfaultfd up. Messages that were not taken are lost, and the userfaultfds of forked
    /// children in them closed.
    ///
    /// # Errors
    ///
    /// When another thread is using it just now; it is as before, without a guard.
    pub fn into_userfaultfd(self) -> Result<Userfaultfd, Self> {
        self.end_guard();
        let shared = Arc::clone(&self.shared);
        drop(self);
        Arc::try_unwrap(shared)
            .map(|shared| shared.uffd)
            .map_err(|shared| Self { shared, guard: Mutex::default() })
    }

    /// Ends the guard's thread; what it has read stays to be taken.
    pub fn end_guard(&self) {
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Guard { stop, thread }) = guard {
            let _ = stop.write(1);
            let _ = thread.join();
        }
    }
}

impl Deref for Guarded {
    type Target = Userfaultfd;

    fn deref(&self) -> &Userfaultfd {
        &self.shared.uffd
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.end_guard();
    }
}

impl Shared {
    /// Only whole buffers are put in and taken out under this lock.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, stop: &EventFd) {
        self.started.wait();
        // Readable at the last look, and nobody has read since.
        let mut unread_since = None;
        while !is_ready(stop.as_fd(), PACE) {
            let reads = self.reads.load(Ordering::Relaxed);
            if !is_ready(self.uffd.as_fd(), Duration::ZERO) {
                unread_since = None;
            } else if unread_since == Some(reads) {
                self.keep();
            } else {
                unread_since = Some(reads);
            }
        }
    }

    /// Reads what is there, as far as there is room.
    fn keep(&self) {
        let mut kept = self.lock();
        while let Some(mut buffer) = kept.free.pop() {
            match self.uffd.read_events(&mut buffer) {
                Ok(1..) => kept.full.push_back(buffer),
                // Nothing left; or an error, which stays for the reader to find.
                Ok(0) | Err(_) => {
                    kept.free.push(buffer);
                    return;
                }
            }
        }
    }
}

/// Whether there is something to read within a time. (A blocking userfaultfd always says so; reading it does not wait.)
fn is_ready(fd: BorrowedFd<'_>, time: Duration) -> bool {
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
        Ok(ready) => ready > 0,
        // Interrupted: looked at again at the next tick.
        Err(_) => false,
    }
}
