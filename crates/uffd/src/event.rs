//! Messages of a userfaultfd, many per read(2), typed.
//!
//! A descriptor that came with a FORK message is owned from the moment it was read: dropping the buffer, or not
//! finishing its iterator, closes it. Upstream loses it then.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use userfaultfd_sys as sys;

use crate::error::UffdError;
use crate::features::Features;
use crate::userfaultfd::Userfaultfd;

const MESSAGE: usize = size_of::<sys::uffd_msg>();

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
    bytes: Vec<u8>,
    filled: usize,
    /// Messages taken out so far.
    taken: usize,
    features: Option<Features>,
    thread_ids: bool,
}

impl EventBuffer {
    /// Room for `capacity` messages, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            bytes: vec![0; capacity.max(1) * MESSAGE],
            filled: 0,
            taken: 0,
            features: None,
            thread_ids: false,
        }
    }

    /// Messages it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.len() / MESSAGE
    }

    /// Takes the messages out, in the order the kernel gave them. Those not taken stay for the next call.
    pub fn drain(&mut self) -> impl Iterator<Item = Event> + '_ {
        std::iter::from_fn(|| self.take())
    }

    fn take(&mut self) -> Option<Event> {
        let start = self.taken * MESSAGE;
        let bytes = self.bytes.get(start..start + MESSAGE).filter(|_| start + MESSAGE <= self.filled)?;
        let message = Message(bytes);
        self.taken += 1;
        // By itself: the table of jumps of a long match costs more than all else here.
        if message.kind() == sys::UFFD_EVENT_PAGEFAULT {
            return Some(Event::Fault(message.fault(self.thread_ids)));
        }
        Some(match message.kind() {
            sys::UFFD_EVENT_FORK => {
                // SAFETY: the kernel put this descriptor into our table for this message, which is taken out once.
                let fd = unsafe { OwnedFd::from_raw_fd(message.word(0) as u32 as i32) };
                Event::Fork { child: Userfaultfd::of_fork(fd, self.features) }
            }
            sys::UFFD_EVENT_REMAP => {
                Event::Remap { from: message.word(0), to: message.word(1), len: message.word(2) }
            }
            sys::UFFD_EVENT_REMOVE => Event::Remove { start: message.word(0), end: message.word(1) },
            sys::UFFD_EVENT_UNMAP => Event::Unmap { start: message.word(0), end: message.word(1) },
            event => Event::Unknown { event },
        })
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

/// One `struct uffd_msg`: the kind in its first byte, up to three words from byte 8 on.
struct Message<'a>(&'a [u8]);

impl Message<'_> {
    fn kind(&self) -> u8 {
        self.0.first().copied().unwrap_or(0)
    }

    fn word(&self, index: usize) -> u64 {
        let start = 8 + index * 8;
        let bytes = self.0.get(start..start + 8).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        bytes.map_or(0, u64::from_ne_bytes)
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
            let read = match read_nowait(self.as_upstream().as_raw_fd(), &mut buffer.bytes) {
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => nix::unistd::read(self.as_fd(), &mut buffer.bytes),
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

/// `preadv2(2)` with `RWF_NOWAIT` and no position.
fn read_nowait(fd: i32, bytes: &mut [u8]) -> Result<usize, Errno> {
    let mut pieces = [IoSliceMut::new(bytes)];
    // SAFETY: an IoSliceMut has the layout of an iovec; it borrows `bytes` exclusively for the call and the kernel
    // writes at most its length. Called by number: the libc wrapper needs a newer libc than the package's floor.
    let read = unsafe {
        libc::syscall(
            libc::SYS_preadv2,
            fd,
            pieces.as_mut_ptr(),
            pieces.len(),
            -1_i64,
            -1_i64,
            libc::RWF_NOWAIT,
        )
    };
    Errno::result(read).map(|read| read as usize)
}
