//! The pager's side of the handshake: a listener, and messages one by one, with the descriptors each carried.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

use super::DEADLINE;
use super::peer::Peer;

/// A socket in a directory of its own, which goes with it.
pub(crate) struct Receiver {
    listener: UnixListener,
    directory: TempDir,
}

/// What one recvmsg(2) gave; no bytes mean the end of the stream.
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// The accepted end.
pub(crate) struct Connection {
    stream: UnixStream,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        Self { listener, directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Starts a peer that connects here; its ready line and the connection.
    pub(crate) fn peer(&self, arguments: &[&str]) -> (Peer, Value, Connection) {
        let path = self.path();
        let mut all = vec!["--socket", path.to_str().unwrap()];
        all.extend_from_slice(arguments);
        let mut peer = Peer::start(&all);
        let ready = peer.line();
        (peer, ready, self.accept())
    }

    /// The peer connects before it prints its ready line: after that line this does not wait.
    pub(crate) fn accept(&self) -> Connection {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Connection { stream }
    }
}

impl Connection {
    /// The next message.
    pub(crate) fn message(&self) -> Message {
        loop {
            match self.receive(libc::MSG_CMSG_CLOEXEC) {
                // With a timeout on the socket the kernel does not restart it, not even after a stop.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.unwrap(),
            }
        }
    }

    /// Whether the stream is open and has nothing to read.
    pub(crate) fn is_quiet(&self) -> bool {
        match self.receive(libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) {
            Ok(_) => false,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    fn receive(&self, flags: libc::c_int) -> io::Result<Message> {
        let mut bytes = vec![0u8; 65536];
        // Room for more descriptors than any peer sends, aligned like the header it begins with.
        let mut control = [0u64; 16];
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: integers and pointers; all zero is a value of each.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: `message` describes `bytes` and `control`, which live across the call.
        let got = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &raw mut message, flags) };
        let len = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        assert_eq!(message.msg_flags & libc::MSG_CTRUNC, 0, "more descriptors than expected");
        bytes.truncate(len);
        let used = message.msg_controllen as usize;
        Ok(Message { bytes, descriptors: descriptors(&control, used) })
    }
}

/// The descriptors of the one control message in the first `used` bytes of `control`. On 64-bit machines:
/// length (8 bytes), level and type (4 each), then the data.
fn descriptors(control: &[u64], used: usize) -> Vec<OwnedFd> {
    if used == 0 {
        return Vec::new();
    }
    let kind =
        (u64::from(libc::SCM_RIGHTS.unsigned_abs()) << 32) | u64::from(libc::SOL_SOCKET.unsigned_abs());
    assert_eq!(control[1], kind, "not SCM_RIGHTS");
    let count = (usize::try_from(control[0]).unwrap() - 16) / size_of::<RawFd>();
    let halves = control[2..].iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]);
    halves
        .take(count)
        .map(|raw| {
            // SAFETY: the kernel has just installed this descriptor for us, and nothing else knows it.
            unsafe { OwnedFd::from_raw_fd(RawFd::try_from(raw).unwrap()) }
        })
        .collect()
}
