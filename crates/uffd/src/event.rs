//! Messages of a userfaultfd, many per read(2), typed.
//!
//! A descriptor that came with a FORK message is owned from the moment it was read: dropping the buffer, or not
//! finishing its iterator, closes it. Upstream loses it then.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use userfaultfd_sys as sys;

use crate::error::UffdError;
use crate::features::Features;
use crate::userfaultfd::Userfaultfd;
use crate::words::Words;

const MESSAGE: usize = size_of::<sys::uffd_msg>();
/// Words of a message.
const WORDS: usize = MESSAGE / size_of::<u64>();

/// What kind of access is waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The page is not there.
    Missing,
    /// The page is write-protected.
    WriteProtect,
    /// The page is in the page cache, but not mapped.
    Minor,
}

/// A thread waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// What it touched: the start of the page, or the exact address where EXACT_ADDRESS is in use.
    pub address: u64,
    /// What is wanted.
    pub kind: FaultKind,
    /// Whether it writes.
    pub write: bool,
    /// The thread, in its own pid namespace, where THREAD_ID is in use.
    pub thread_id: Option<u32>,
}

/// One message.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Fault(Fault),
    /// The process has forked.
    Fork {
        /// The child's memory, registered like its parent's.
        child: Userfaultfd,
    },
    /// Memory was moved; its registration went with it.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes at the old address.
        len: u64,
    },
    /// Memory is about to be discarded: `start..end` reads zero from now on.
    Remove {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// `start..end` is not mapped any more.
    Unmap {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A kind that this version does not know.
    Unknown {
        /// Its number.
        event: u8,
    },
}

/// Room for the messages of one read, used again and again.
#[derive(Debug)]
pub struct EventBuffer {
    words: Words,
    /// Bytes that the last read has brought.
    filled: usize,
    /// Messages taken out so far.
    taken: usize,
    /// Messages of one read at most.
    most: usize,
    features: Option<Features>,
    thread_ids: bool,
}

impl EventBuffer {
    /// Room for `capacity` messages, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self::in_words(Words::zeroed(capacity.max(1) * WORDS))
    }

    /// Room for as many messages as fit into these words, where another process can find those that were not finished with
    /// ([`EventBuffer::finish`]) if this one is killed. At least one has to fit, and the words have to be resident: a process that
    /// is being killed is given no memory any more, and the message would be lost.
    #[must_use]
    pub fn in_words(words: Words) -> Self {
        let most = words.len() / WORDS;
        Self { words, filled: 0, taken: 0, most, features: None, thread_ids: false }
    }

    /// Messages it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.words.len() / WORDS
    }

    /// Has the next reads bring no more than `most` messages.
    pub fn limit(&mut self, most: usize) {
        self.most = most.clamp(1, self.capacity());
    }

    /// Messages that one read brings at most.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// Takes the messages out, in the order the kernel gave them. Those not taken stay for the next call.
    pub fn drain(&mut self) -> impl Iterator<Item = Event> + '_ {
        std::iter::from_fn(|| self.take())
    }

    /// Takes the next message out.
    pub fn take(&mut self) -> Option<Event> {
        let start = self.taken * WORDS;
        let words = self.words.get(start..start + WORDS).filter(|_| (start + WORDS) * 8 <= self.filled)?;
        let message = Message::of(words);
        self.taken += 1;
        // By itself: the table of jumps of a long match costs more than all else here.
        if message.kind() == sys::UFFD_EVENT_PAGEFAULT {
            return Some(Event::Fault(message.fault(self.thread_ids)));
        }
        if message.kind() == sys::UFFD_EVENT_FORK {
            // SAFETY: the kernel put this descriptor into our table for this message, which is taken out once.
            let fd = unsafe { OwnedFd::from_raw_fd(message.word(0) as u32 as i32) };
            return Some(Event::Fork { child: Userfaultfd::of_fork(fd, self.features) });
        }
        Some(match message.without_fork() {
            Left::Event(event) => event,
            Left::Fork { .. } => Event::Unknown { event: sys::UFFD_EVENT_FORK },
        })
    }

    /// What was taken out last has been dealt with for good: nobody will find it here any more.
    pub fn finish(&mut self) {
        if let Some(kind) = self.taken.checked_sub(1).and_then(|last| self.words.get(last * WORDS)) {
            // After everything that was done about it, wherever that was written to: the same thread's stores stay in order.
            kind.store(0, Ordering::Release);
        }
    }

    /// The position of the message that was taken out last.
    #[must_use]
    pub fn last_taken(&self) -> Option<usize> {
        self.taken.checked_sub(1)
    }

    /// Whether every message was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        (self.taken + 1) * MESSAGE > self.filled
    }

    fn clear(&mut self) {
        // Closes the descriptors of FORK messages that nobody took.
        while self.take().is_some() {}
        self.filled = 0;
        self.taken = 0;
    }
}

impl Drop for EventBuffer {
    fn drop(&mut self) {
        self.clear();
    }
}

impl EventBuffer {
    /// A message that another process has left ([`left_in`]) has been dealt with for good.
    pub fn finish_left(words: &Words, position: usize) {
        if let Some(kind) = words.get(position * WORDS) {
            // As in `finish`.
            kind.store(0, Ordering::Release);
        }
    }
}

/// What a process that is gone has read and not finished with.
#[derive(Debug)]
pub enum Left {
    /// A message; its descriptors, if it had any, are none of this process's.
    Event(Event),
    /// A child was forked. Its descriptor has this number in the table of the process that had read of it, for as long as that table is there.
    Fork {
        /// The number.
        fd: i32,
    },
}

/// The messages that were left in words which [`EventBuffer::in_words`] was made of, by another process, with their positions. Whatever
/// is in the words, this does no more than read them.
pub fn left_in(words: &Words) -> impl Iterator<Item = (usize, Left)> + '_ {
    words.chunks_exact(WORDS).enumerate().filter_map(|(position, words)| {
        let message = Message::of(words);
        (message.kind() != 0).then(|| (position, message.without_fork()))
    })
}

/// One `struct uffd_msg`: the kind in its first byte, up to three words from byte 8 on.
struct Message([u64; WORDS]);

impl Message {
    /// As it is now: the kernel writes to it only while it is read into, which its owner alone does.
    fn of(words: &[std::sync::atomic::AtomicU64]) -> Self {
        let mut message = [0; WORDS];
        for (word, from) in message.iter_mut().zip(words) {
            *word = from.load(Ordering::Relaxed);
        }
        Self(message)
    }

    fn kind(&self) -> u8 {
        let [kind, ..] = self.0[0].to_ne_bytes();
        kind
    }

    fn word(&self, index: usize) -> u64 {
        self.0.get(1 + index).copied().unwrap_or(0)
    }

    /// What it says, apart from the descriptor of a child.
    fn without_fork(&self) -> Left {
        Left::Event(match self.kind() {
            sys::UFFD_EVENT_PAGEFAULT => Event::Fault(self.fault(true)),
            sys::UFFD_EVENT_FORK => return Left::Fork { fd: self.word(0) as u32 as i32 },
            sys::UFFD_EVENT_REMAP => Event::Remap { from: self.word(0), to: self.word(1), len: self.word(2) },
            sys::UFFD_EVENT_REMOVE => Event::Remove { start: self.word(0), end: self.word(1) },
            sys::UFFD_EVENT_UNMAP => Event::Unmap { start: self.word(0), end: self.word(1) },
            event => Event::Unknown { event },
        })
    }

    fn fault(&self, thread_ids: bool) -> Fault {
        let flags = self.word(0);
        let kind = if flags & sys::UFFD_PAGEFAULT_FLAG_WP != 0 {
            FaultKind::WriteProtect
        } else if flags & sys::UFFD_PAGEFAULT_FLAG_MINOR != 0 {
            FaultKind::Minor
        } else {
            FaultKind::Missing
        };
        Fault {
            address: self.word(1),
            kind,
            write: flags & sys::UFFD_PAGEFAULT_FLAG_WRITE != 0,
            thread_id: Some(self.word(2) as u32).filter(|&id| thread_ids && id != 0),
        }
    }
}

impl Userfaultfd {
    /// `read(2)`: fills the buffer with as many messages as are waiting and fit; faults come before events that are
    /// older. 0 when nothing is waiting. Never waits, even if the other holder of the descriptor has made it blocking.
    ///
    /// # Errors
    ///
    /// EMFILE when a FORK message needs a descriptor and none is free (it stays queued). [`UffdError::EndOfFile`] and
    /// [`UffdError::ShortRead`] when the descriptor has become something else; reading can go on after any of them.
    pub fn read_events(&self, buffer: &mut EventBuffer) -> Result<usize, UffdError> {
        buffer.clear();
        buffer.features = self.enabled_features();
        buffer.thread_ids = self.has_thread_ids();
        buffer.filled = loop {
            let fd = self.as_upstream().as_raw_fd();
            let len = buffer.most * MESSAGE;
            let read = match read_nowait(fd, &buffer.words, len) {
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => read_plainly(fd, &buffer.words, len),
                read => read,
            };
            match read {
                Ok(0) => return Err(UffdError::EndOfFile),
                Ok(bytes) => break bytes,
                Err(Errno::EAGAIN) => return Ok(0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(UffdError::of_read(errno)),
            }
        };
        match buffer.filled % MESSAGE {
            0 => Ok(buffer.filled / MESSAGE),
            _ => Err(UffdError::ShortRead { bytes: buffer.filled }),
        }
    }
}

/// `preadv2(2)` with `RWF_NOWAIT` and no position, of `len` bytes at most.
fn read_nowait(fd: i32, words: &Words, len: usize) -> Result<usize, Errno> {
    let mut piece = libc::iovec { iov_base: words.as_ptr().cast(), iov_len: len.min(words.len() * 8) };
    // SAFETY: the kernel writes at most the length of the words, which live across the call and are atomics, so that
    // nobody takes them for unchanging. Called by number: the libc wrapper needs a newer libc than the package's floor.
    let read =
        unsafe { libc::syscall(libc::SYS_preadv2, fd, &raw mut piece, 1, -1_i64, -1_i64, libc::RWF_NOWAIT) };
    Errno::result(read).map(|read| read as usize)
}

/// `read(2)`, where the kernel does not have the other.
fn read_plainly(fd: i32, words: &Words, len: usize) -> Result<usize, Errno> {
    // SAFETY: as above.
    let read = unsafe { libc::read(fd, words.as_ptr().cast(), len.min(words.len() * 8)) };
    Errno::result(read).map(|read| read as usize)
}
