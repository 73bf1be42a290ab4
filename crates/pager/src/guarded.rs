//! A userfaultfd of this process's own memory whose events are read even while the thread that should read them cannot.
//!
//! With events of the address space in use, fork(2), madvise(2) and munmap(2) wait until their message was read. Where the
//! thread that calls them is the one that reads, it would wait for itself; and fork(3) holds the allocator's locks
//! meanwhile, so that every reader that allocates waits too. The guard is a thread that looks at a timer's pace, reads what
//! has stayed unread, and neither allocates nor touches registered memory. What it read is delivered first.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{Event, EventBuffer, Features, UffdError, Userfaultfd};

use crate::announced::Bell;

/// How long a message stays unread before the guard reads it, at least; and twice that at most.
const PACE: Duration = Duration::from_millis(10);
/// Messages of one of the guard's reads, and reads that it keeps. When they are used up, whoever causes the next event
/// waits until messages are taken.
const MESSAGES: usize = 16;
const READS: usize = 64;

/// Looks of the guard that an answer may take. One that takes longer sleeps in a fault itself.
const LONGEST_ANSWER: u32 = 2;

/// Who is told each time that the guard has looked, on its thread: it neither allocates nor waits for anybody who does.
pub(crate) trait Watcher: Send + Sync + Debug {
    /// Does what is due.
    fn look(&self);
}

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
    /// How many reads are kept, for who asks before each answer.
    full: AtomicUsize,
    /// Counts reads by others than the guard: messages that were waiting before one of them are not left alone.
    reads: AtomicU64,
    /// A thread allocates while it starts: a fork(3) before its end would have it wait for the fork.
    started: Barrier,
    /// Held by whoever answers a fault: the guard reads no message meanwhile.
    gate: Mutex<()>,
    /// The guard has read in spite of that, because the answer did not come to an end.
    forced: AtomicBool,
    watcher: Mutex<Option<Arc<dyn Watcher>>>,
    /// Whether there is one, for who asks before each read.
    handled: AtomicBool,
}

/// What the guard has read, and the room it has left. Neither ever grows.
#[derive(Debug)]
struct Kept {
    full: VecDeque<EventBuffer>,
    free: Vec<EventBuffer>,
}

#[derive(Debug)]
struct Guard {
    bell: Arc<Bell>,
    thread: JoinHandle<()>,
}

impl Guarded {
    /// Wraps it; nothing runs yet.
    #[must_use]
    pub fn new(uffd: Userfaultfd) -> Self {
        let kept = Mutex::new(Kept { full: VecDeque::new(), free: Vec::new() });
        Self {
            shared: Arc::new(Shared {
                uffd,
                kept,
                full: AtomicUsize::new(0),
                reads: AtomicU64::new(0),
                started: Barrier::new(2),
                gate: Mutex::default(),
                forced: AtomicBool::new(false),
                watcher: Mutex::default(),
                handled: AtomicBool::new(false),
            }),
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
        if in_use.intersects(waited_for) { self.start() } else { Ok(()) }
    }

    fn start(&self) -> io::Result<()> {
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.is_some() {
            return Ok(());
        }
        {
            let mut kept = self.shared.lock();
            kept.full.reserve_exact(READS);
            kept.free.extend((0..READS).map(|_| EventBuffer::new(MESSAGES)));
        }
        let bell = Bell::new()?;
        let (shared, called) = (Arc::clone(&self.shared), Arc::clone(&bell));
        let thread =
            std::thread::Builder::new().name("uffd-guard".into()).spawn(move || shared.watch(&called))?;
        self.shared.started.wait();
        *guard = Some(Guard { bell, thread });
        Ok(())
    }

    /// Has a watcher look after each look of the guard, which is started if need be. From then on only the watcher's side
    /// takes messages.
    ///
    /// # Errors
    ///
    /// EBUSY when there is one already; else when no thread or descriptor is to be had.
    pub(crate) fn attach(&self, watcher: Arc<dyn Watcher>) -> io::Result<()> {
        self.start()?;
        let mut place = self.shared.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        *place = Some(watcher);
        self.shared.handled.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Ends that. When this returns, the watcher is not looking any more.
    pub(crate) fn detach(&self) {
        let mut place = self.shared.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        drop(place.take());
        self.shared.handled.store(false, Ordering::SeqCst);
    }

    /// Whether its messages are a handler's.
    #[must_use]
    pub fn is_handled(&self) -> bool {
        self.shared.handled.load(Ordering::SeqCst)
    }

    /// While this is held, the guard reads no message; so what was known of a fault before it is answered stays true.
    pub(crate) fn gate(&self) -> MutexGuard<'_, ()> {
        self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Guarded::gate`], for the guard itself, which waits for nobody.
    pub(crate) fn try_gate(&self) -> Result<MutexGuard<'_, ()>, ()> {
        match self.shared.gate.try_lock() {
            Ok(gate) => Ok(gate),
            Err(TryLockError::Poisoned(gate)) => Ok(gate.into_inner()),
            Err(TryLockError::WouldBlock) => Err(()),
        }
    }

    /// Reads what is there, for who takes it later.
    pub(crate) fn read_unread(&self) {
        self.shared.read_kept();
    }

    /// Whether the guard read messages in spite of [`Guarded::gate`] since the last time this was asked.
    pub(crate) fn was_forced(&self) -> bool {
        self.shared.forced.load(Ordering::Relaxed) && self.shared.forced.swap(false, Ordering::Relaxed)
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
        let Some(mut oldest) = self.shared.oldest(&mut kept) else {
            let read = self.shared.uffd.read_events(buffer);
            if read.is_err() && !buffer.is_empty() {
                // Whole messages in front of the error: they come with the next call.
                let capacity = buffer.capacity();
                self.shared.keep_behind(&mut kept, std::mem::replace(buffer, EventBuffer::new(capacity)));
            }
            drop(kept);
            read?;
            return Ok(buffer.drain().take(most).map(take).count());
        };
        drop(kept);
        let count = oldest.drain().take(most).map(&mut take).count();
        self.shared.put_back(&mut self.shared.lock(), oldest);
        Ok(count)
    }

    /// Takes at most `most` messages of those that the guard has read.
    pub(crate) fn take_kept(&self, most: usize, take: impl FnMut(Event)) -> usize {
        let mut kept = self.shared.lock();
        let Some(mut oldest) = self.shared.oldest(&mut kept) else { return 0 };
        let count = oldest.drain().take(most).map(take).count();
        self.shared.put_back(&mut kept, oldest);
        count
    }

    /// Whether the guard has messages that were not taken.
    #[must_use]
    pub fn has_kept(&self) -> bool {
        self.shared.full.load(Ordering::Acquire) > 0
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
        if let Some(Guard { bell, thread }) = guard {
            bell.stop();
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

    fn oldest(&self, kept: &mut Kept) -> Option<EventBuffer> {
        let oldest = kept.full.pop_front()?;
        self.full.store(kept.full.len(), Ordering::Release);
        Some(oldest)
    }

    /// What was the oldest, with what is left in it.
    fn put_back(&self, kept: &mut Kept, oldest: EventBuffer) {
        if oldest.is_empty() {
            kept.free.push(oldest);
        } else {
            kept.full.push_front(oldest);
        }
        self.full.store(kept.full.len(), Ordering::Release);
    }

    fn keep_behind(&self, kept: &mut Kept, newest: EventBuffer) {
        kept.full.push_back(newest);
        self.full.store(kept.full.len(), Ordering::Release);
    }

    fn watch(&self, bell: &Bell) {
        self.started.wait();
        // Readable at the last look, and nobody has read since.
        let mut unread_since = None;
        let mut locked_out = 0;
        // Somebody is about to cause a message, and it is not in vain to wait for it.
        let mut expecting = bell.is_expecting();
        while bell.wait(expecting.then(|| self.uffd.as_fd()), PACE) {
            expecting = bell.is_expecting();
            let reads = self.reads.load(Ordering::Relaxed);
            if !is_ready(self.uffd.as_fd(), Duration::ZERO) {
                unread_since = None;
                locked_out = 0;
            } else if expecting || unread_since == Some(reads) {
                let read = self.keep(&mut locked_out);
                expecting &= read;
            } else {
                unread_since = Some(reads);
            }
            if let Some(watcher) = &*self.watcher.lock().unwrap_or_else(PoisonError::into_inner) {
                watcher.look();
            }
        }
    }

    /// Reads, unless a fault is being answered at the moment; whether anything was read.
    fn keep(&self, locked_out: &mut u32) -> bool {
        let gate = self.gate.try_lock();
        if matches!(gate, Err(TryLockError::WouldBlock)) {
            *locked_out += 1;
            if *locked_out <= LONGEST_ANSWER {
                return false;
            }
            self.forced.store(true, Ordering::Relaxed);
        }
        *locked_out = 0;
        self.read_kept()
    }

    /// Reads what is there, as far as there is room; whether anything was.
    fn read_kept(&self) -> bool {
        let mut kept = self.lock();
        let mut any = false;
        while let Some(mut buffer) = kept.free.pop() {
            match self.uffd.read_events(&mut buffer) {
                Ok(1..) => self.keep_behind(&mut kept, buffer),
                // Nothing left; or an error, which stays for the reader to find.
                Ok(0) | Err(_) => {
                    kept.free.push(buffer);
                    break;
                }
            }
            any = true;
        }
        any
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
