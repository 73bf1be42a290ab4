//! Descriptors over Unix sockets (SCM_RIGHTS), and who is at the other end.
//!
//! Whatever the kernel has put into this process's table is owned before anything else is looked at, so that a refused
//! message leaks nothing. A stream has no messages: bytes come in any pieces, and descriptors come with the piece that
//! carries the byte they were sent with.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, recvmsg, sendmsg};

use crate::deadline::Deadline;

/// The most descriptors that the kernel lets ride with one message (`SCM_MAX_FD`).
pub const MOST_FDS: usize = 253;

/// Room for the control messages of [`MOST_FDS`] descriptors, and for credentials and labels that may come with them.
const CONTROL: usize = 2048;

/// One piece of a stream, and what rode with it.
#[derive(Debug)]
pub struct Received {
    /// Bytes; 0 at the end of the stream.
    pub len: usize,
    /// Descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Why nothing, or not everything, was sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FdPassingError {
    /// A nonblocking socket has nothing yet, or no room yet.
    #[error("nothing has arrived yet, or there is no room to send")]
    WouldBlock,
    /// More descriptors came than are accepted (or than this process has room for), or a datagram longer than the
    /// buffer. All descriptors that came are closed.
    #[error("more came with a message than is accepted")]
    Truncated,
    /// The buffer has no byte: descriptors ride with bytes, and 0 bytes received means the end.
    #[error("a message needs at least one byte")]
    Empty,
    /// More descriptors than one message can carry.
    #[error("{count} descriptors do not fit into one message (at most {MOST_FDS})")]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// The deadline came first.
    #[error("the deadline passed after {done} bytes")]
    TimedOut {
        /// Bytes sent or received by then.
        done: usize,
    },
    /// The other end was closed.
    #[error("the other end was closed after {done} bytes")]
    Closed {
        /// Bytes sent or received by then.
        done: usize,
    },
    /// A system call failed.
    #[error("{0}")]
    System(#[source] io::Error),
}

impl From<io::Error> for FdPassingError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// `recvmsg(2)`: one piece and the descriptors that ride with it, at most `max_fds`. Interrupted calls are repeated.
/// Waits on a blocking socket; [`recv_exact`] is the one with a deadline.
///
/// # Errors
///
/// See [`FdPassingError`]. No descriptor stays open then.
pub fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8], max_fds: usize) -> Result<Received, FdPassingError> {
    receive(socket, buffer, max_fds, MsgFlags::empty())
}

/// The same as [`recv`], of a nonblocking stream that keeps everything (`MSG_PEEK`): bytes stay in its queue, and so do their
/// descriptors, of which duplicates come. Each call goes on behind the last, once [`peek_from_start`] was called.
///
/// # Errors
///
/// See [`FdPassingError`]. No descriptor stays open then.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8], max_fds: usize) -> Result<Received, FdPassingError> {
    receive(socket, buffer, max_fds, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
}

/// `SO_PEEK_OFF`: [`peek`] begins with the first byte that is in the queue, also where another process has peeked before.
///
/// # Errors
///
/// For other sockets.
pub fn peek_from_start(socket: BorrowedFd<'_>) -> io::Result<()> {
    let start: i32 = 0;
    // SAFETY: the kernel reads one `int` of this frame.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const start).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    Errno::result(outcome).map(drop).map_err(io::Error::from)
}

/// Takes `len` bytes that were peeked at out of a stream's queue, and with them the descriptors there.
///
/// # Errors
///
/// See [`FdPassingError`]; [`FdPassingError::Closed`] when there are fewer.
pub fn take_out(socket: BorrowedFd<'_>, len: usize) -> Result<(), FdPassingError> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while let Some(rest @ [_, ..]) = bytes.get_mut(done..) {
        match receive(socket, rest, MOST_FDS, MsgFlags::MSG_DONTWAIT)? {
            Received { len: 0, .. } => return Err(FdPassingError::Closed { done }),
            received => done += received.len,
        }
    }
    Ok(())
}

/// `recvmsg(2)` until `buffer` is full; the descriptors that rode with any of it, at most `max_fds` together. The socket
/// may be blocking or not.
///
/// # Errors
///
/// [`FdPassingError::TimedOut`] when `deadline` (counted from the call) passes first, [`FdPassingError::Closed`] when the
/// stream ends first; the bytes that came are in `buffer`. No descriptor stays open then.
pub fn recv_exact(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    max_fds: usize,
    deadline: Duration,
) -> Result<Vec<OwnedFd>, FdPassingError> {
    let deadline = Deadline::after(deadline);
    let mut fds = Vec::new();
    let mut done = 0;
    while let Some(rest @ [_, ..]) = buffer.get_mut(done..) {
        match receive(socket, rest, max_fds - fds.len(), MsgFlags::MSG_DONTWAIT) {
            Ok(Received { len: 0, .. }) => return Err(FdPassingError::Closed { done }),
            Ok(received) => {
                done += received.len;
                fds.extend(received.fds);
            }
            Err(FdPassingError::WouldBlock) => {
                if !deadline.wait_for(socket, PollFlags::POLLIN)? {
                    return Err(FdPassingError::TimedOut { done });
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(fds)
}

/// `sendmsg(2)`: as much of `payload` as fits, the descriptors riding with its first byte. Returns the bytes taken; if
/// they are fewer than `payload`, the rest goes without descriptors. Interrupted calls are repeated; SIGPIPE is never
/// raised.
///
/// # Errors
///
/// See [`FdPassingError`]. Nothing was sent then.
pub fn send(socket: BorrowedFd<'_>, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, FdPassingError> {
    transmit(socket, payload, fds, MsgFlags::empty())
}

/// `sendmsg(2)` until all of `payload` is sent, the descriptors riding with its first byte. The socket may be blocking or
/// not.
///
/// # Errors
///
/// [`FdPassingError::TimedOut`] when `deadline` (counted from the call) passes first, [`FdPassingError::Closed`] when the
/// other end is gone. With `done` above 0 the descriptors were sent.
pub fn send_all(
    socket: BorrowedFd<'_>,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Duration,
) -> Result<(), FdPassingError> {
    let deadline = Deadline::after(deadline);
    let mut done = 0;
    loop {
        let rest = payload.get(done..).unwrap_or_default();
        let riding = if done == 0 { fds } else { &[] };
        match transmit(socket, rest, riding, MsgFlags::MSG_DONTWAIT) {
            Ok(sent) if sent == rest.len() => return Ok(()),
            Ok(sent) => done += sent,
            Err(FdPassingError::WouldBlock) => {
                if !deadline.wait_for(socket, PollFlags::POLLOUT)? {
                    return Err(FdPassingError::TimedOut { done });
                }
            }
            Err(FdPassingError::Closed { .. }) => return Err(FdPassingError::Closed { done }),
            Err(error) => return Err(error),
        }
    }
}

/// Bytes in a memfd of their own (`memfd_create(2)`, close-on-exec), for what is too long to be sent beside a descriptor.
///
/// # Errors
///
/// When no descriptor is free, or no memory.
pub fn in_memfd(name: &CStr, bytes: &[u8]) -> io::Result<OwnedFd> {
    // SAFETY: `name` ends with NUL. By number: the libc wrapper needs a newer libc than the package's floor.
    let raw = unsafe { libc::syscall(libc::SYS_memfd_create, name.as_ptr(), libc::MFD_CLOEXEC) };
    let raw = Errno::result(raw)?;
    // SAFETY: the kernel has just put this descriptor (a small number) into our table.
    let memfd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// Who connected, as of that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Process id, as this process's pid namespace has it; 0 for a process that is not in it.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// `SO_PEERCRED` of a connected Unix socket.
///
/// # Errors
///
/// For other sockets.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<Credentials> {
    let credentials = getsockopt(&socket.as_fd(), PeerCredentials)?;
    Ok(Credentials { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() })
}

fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    max_fds: usize,
    flags: MsgFlags,
) -> Result<Received, FdPassingError> {
    if buffer.is_empty() {
        return Err(FdPassingError::Empty);
    }
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut control = vec![0; CONTROL];
    let mut pieces = [IoSliceMut::new(buffer)];
    let (len, flags) = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
            Ok(message) => break (message.bytes, message.flags),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(FdPassingError::WouldBlock),
            Err(errno) => return Err(FdPassingError::System(errno.into())),
        }
    };
    let owned = |raw| {
        // SAFETY: the kernel has just put this descriptor into our table; this message is its only mention.
        unsafe { OwnedFd::from_raw_fd(raw) }
    };
    let fds: Vec<OwnedFd> = passed(&control).into_iter().map(owned).collect();
    if flags.intersects(MsgFlags::MSG_CTRUNC | MsgFlags::MSG_TRUNC) || fds.len() > max_fds {
        return Err(FdPassingError::Truncated);
    }
    Ok(Received { len, fds })
}

/// The descriptors in a control buffer that was zeros before the kernel wrote to it. Read here because nix shows nothing
/// of a truncated one, and the descriptors that did arrive would stay open for ever.
fn passed(control: &[u8]) -> Vec<RawFd> {
    // The kernel's cmsghdr: a length of the width of a pointer that counts itself, then level and type.
    const WORD: usize = size_of::<usize>();
    const HEADER: usize = WORD + 2 * size_of::<i32>();
    let mut fds = Vec::new();
    let mut rest = control;
    while let Some((head, after)) = rest.split_first_chunk::<WORD>() {
        let len = usize::from_ne_bytes(*head);
        let Some(body) = len.checked_sub(WORD).and_then(|len| after.get(..len)) else { break };
        let mut words = body.chunks_exact(size_of::<i32>()).filter_map(|word| word.try_into().ok());
        let mut next = || words.next().map(i32::from_ne_bytes);
        if (next(), next()) == (Some(libc::SOL_SOCKET), Some(libc::SCM_RIGHTS)) {
            fds.extend(std::iter::from_fn(next));
        }
        rest = rest.get(len.max(HEADER).next_multiple_of(WORD)..).unwrap_or_default();
    }
    fds
}

fn transmit(
    socket: BorrowedFd<'_>,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> Result<usize, FdPassingError> {
    if payload.is_empty() {
        return Err(FdPassingError::Empty);
    }
    if fds.len() > MOST_FDS {
        return Err(FdPassingError::TooMany { count: fds.len() });
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let pieces = [IoSlice::new(payload)];
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &pieces, control, flags | MsgFlags::MSG_NOSIGNAL, None) {
            Ok(sent) => return Ok(sent),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(FdPassingError::WouldBlock),
            Err(Errno::EPIPE) => return Err(FdPassingError::Closed { done: 0 }),
            Err(errno) => return Err(FdPassingError::System(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A control message as the kernel lays it out.
    fn message(level: i32, kind: i32, words: &[i32]) -> Vec<u8> {
        let mut bytes = (16 + 4 * words.len()).to_ne_bytes().to_vec();
        for word in [level, kind].iter().chain(words) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn descriptors_are_found_between_other_control_messages() {
        let mut control = message(libc::SOL_SOCKET, libc::SCM_CREDENTIALS, &[1, 2, 3]);
        control.extend(message(libc::SOL_SOCKET, libc::SCM_RIGHTS, &[5, 6, 7]));
        control.extend(message(libc::SOL_SOCKET, libc::SCM_RIGHTS, &[8]));
        control.resize(256, 0);

        assert_eq!(passed(&control), [5, 6, 7, 8]);
    }

    #[test]
    fn a_control_buffer_without_messages_or_cut_off_has_no_descriptors() {
        let whole = message(libc::SOL_SOCKET, libc::SCM_RIGHTS, &[5, 6]);

        assert_eq!(passed(&[0; 64]), []);
        assert_eq!(passed(&whole[..20]), []);
    }
}
