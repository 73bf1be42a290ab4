//! Descriptors over Unix sockets (SCM_RIGHTS), and who is at the other end.

use std::io;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, getsockopt, recvmsg};

/// One piece of a stream, and what rode with it.
#[derive(Debug)]
pub struct Received {
    /// Bytes; 0 at the end of the stream.
    pub len: usize,
    /// Descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FdPassingError {
    /// Nothing is there yet.
    #[error("nothing has arrived yet")]
    WouldBlock,
    /// More descriptors came than there was room for. All of them are closed.
    #[error("more descriptors came with a message than are accepted")]
    Truncated,
    /// A system call failed.
    #[error("{0}")]
    System(#[source] io::Error),
}

/// Room for the control messages of the most descriptors the kernel passes at once (SCM_MAX_FD), and for credentials a
/// peer may add.
const CONTROL: usize = 2048;

/// `recvmsg(2)`: one piece and the descriptors that ride with it, at most `max_fds`. Interrupted calls are repeated.
///
/// # Errors
///
/// See [`FdPassingError`]. No descriptor stays open then.
pub fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8], max_fds: usize) -> Result<Received, FdPassingError> {
    let mut control = vec![0; CONTROL];
    let mut pieces = [IoSliceMut::new(buffer)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(FdPassingError::WouldBlock),
            Err(errno) => return Err(FdPassingError::System(errno.into())),
        }
    };
    let mut fds = Vec::new();
    for control in message.cmsgs().map_err(|errno| FdPassingError::System(errno.into()))? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                // SAFETY: the kernel has just put this descriptor into our table; this message is its only mention.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) || fds.len() > max_fds {
        return Err(FdPassingError::Truncated);
    }
    Ok(Received { len: message.bytes, fds })
}

/// Who connected, as of that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
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
