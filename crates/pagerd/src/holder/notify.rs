//! What a service manager is told, as sd_notify(3) says, and never waited for: what it has no room for is sent when it has.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::fd_passing::{self, FdPassingError};

/// How long until it is tried again where the kernel does not say when.
const AGAIN: Duration = Duration::from_millis(100);

/// The way to the service manager, if there is one.
pub(crate) struct Notify {
    address: Option<SocketAddr>,
    socket: Option<UnixDatagram>,
    /// In the order in which it is to come.
    waiting: VecDeque<Datagram>,
    /// The kernel takes no more descriptors at this moment, and tells nobody when it does.
    stalled: bool,
}

struct Datagram {
    text: String,
    fd: Option<OwnedFd>,
}

/// What became of a datagram.
enum Outcome {
    Taken,
    Later,
    Never(io::Error),
}

impl Notify {
    /// As `NOTIFY_SOCKET` says.
    pub(crate) fn from_environment() -> Self {
        let name = std::env::var_os("NOTIFY_SOCKET").map(std::ffi::OsString::into_encoded_bytes);
        let address = name.and_then(|name| match name.split_first() {
            Some((b'@', rest)) => SocketAddr::from_abstract_name(rest).ok(),
            _ => SocketAddr::from_pathname(String::from_utf8_lossy(&name).as_ref()).ok(),
        });
        Self { address, socket: None, waiting: VecDeque::new(), stalled: false }
    }

    /// Whether there is somebody to be told.
    pub(crate) fn is_heard(&self) -> bool {
        self.address.is_some()
    }

    /// Tells something, with a descriptor that goes along.
    pub(crate) fn tell(&mut self, text: String, fd: Option<BorrowedFd<'_>>) {
        if self.address.is_none() {
            return;
        }
        let outcome = if self.flush() { self.deliver(&text, fd) } else { Outcome::Later };
        match outcome {
            Outcome::Taken => {}
            Outcome::Later => match fd.map(|fd| fd.try_clone_to_owned()).transpose() {
                Ok(fd) => self.waiting.push_back(Datagram { text, fd }),
                Err(error) => never_heard(&text, &error),
            },
            Outcome::Never(error) => never_heard(&text, &error),
        }
    }

    /// The same at once, or not at all; whether it was taken.
    pub(crate) fn tell_now(&mut self, text: &str, fd: BorrowedFd<'_>) -> bool {
        self.flush() && matches!(self.deliver(text, Some(fd)), Outcome::Taken)
    }

    /// Sends what has waited; whether nothing waits any more.
    pub(crate) fn flush(&mut self) -> bool {
        while let Some(Datagram { text, fd }) = self.waiting.pop_front() {
            match self.deliver(&text, fd.as_ref().map(AsFd::as_fd)) {
                Outcome::Taken => {}
                Outcome::Later => {
                    self.waiting.push_front(Datagram { text, fd });
                    return false;
                }
                Outcome::Never(error) => never_heard(&text, &error),
            }
        }
        true
    }

    /// Whether something waits to be sent.
    pub(crate) fn is_behind(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// What has room (POLLOUT) when something that waits can be sent.
    pub(crate) fn room(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().filter(|_| self.is_behind() && !self.stalled).map(AsFd::as_fd)
    }

    /// After which time it is to be tried again, whether there was room or not.
    pub(crate) fn again(&self) -> Option<Duration> {
        self.is_behind().then_some(AGAIN)
    }

    /// Waits until everything has been sent, but not for ever: nobody comes after this process who could.
    pub(crate) fn finish(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.flush() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                crate::log(format_args!("the service manager did not take everything that it was told"));
                return;
            }
            let timeout = PollTimeout::try_from(left.min(AGAIN)).unwrap_or(PollTimeout::ZERO);
            let mut room: Vec<PollFd<'_>> =
                self.room().map(|room| PollFd::new(room, PollFlags::POLLOUT)).into_iter().collect();
            // It is tried again either way.
            let _ = poll(&mut room, timeout);
        }
    }

    fn deliver(&mut self, text: &str, fd: Option<BorrowedFd<'_>>) -> Outcome {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        self.stalled = false;
        let Err(error) = self.try_send(text, &fds) else { return Outcome::Taken };
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Outcome::Later,
            // So many are under way already, or there is no memory: both pass.
            Some(libc::ETOOMANYREFS | libc::ENOBUFS | libc::ENOMEM) => {
                self.stalled = true;
                Outcome::Later
            }
            // It may listen anew.
            Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::ENOTCONN | libc::EPIPE) => {
                self.socket = None;
                match self.try_send(text, &fds) {
                    Ok(()) => Outcome::Taken,
                    Err(error) => Outcome::Never(error),
                }
            }
            _ => Outcome::Never(error),
        }
    }

    fn try_send(&mut self, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = match (self.socket.take(), &self.address) {
            (Some(socket), _) => socket,
            (None, Some(address)) => {
                let socket = UnixDatagram::unbound()?;
                socket.set_nonblocking(true)?;
                // So that poll(2) says when its queue has room.
                socket.connect_addr(address)?;
                socket
            }
            (None, None) => return Ok(()),
        };
        let sent = fd_passing::send(socket.as_fd(), text.as_bytes(), fds);
        self.socket = Some(socket);
        sent.map(drop).map_err(|error| match error {
            FdPassingError::WouldBlock => io::Error::from_raw_os_error(libc::EAGAIN),
            FdPassingError::Closed { .. } => io::Error::from_raw_os_error(libc::EPIPE),
            FdPassingError::System(error) => error,
            other => io::Error::other(other),
        })
    }
}

fn never_heard(text: &str, error: &io::Error) {
    crate::log(format_args!("the service manager was not told {:?}: {error}", text.replace('\n', " ")));
}
