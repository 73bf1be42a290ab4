//! Connecting and handing over: one message with the JSON and the descriptor, or one of the ways in which real
//! and broken peers differ from that.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use crate::args::{Descriptor, Handshake};
use crate::failure::Failure;

/// `SIOCOUTQ` of linux/sockios.h: bytes the receiver has not taken yet.
const SIOCOUTQ: u32 = 0x5411;

/// How long the receiver of a piece may leave it lying. A pager's own deadlines are shorter.
const RECEIVE_DEADLINE: Duration = Duration::from_secs(60);

/// Descriptors in one message: `--fd two` and `--fd memfd` are the most.
const MOST_DESCRIPTORS: usize = 2;

/// Connects, once, as Firecracker does.
///
/// # Errors
/// connect(2)'s: `ENOENT` where nothing is at the path, `ECONNREFUSED` where nobody listens.
pub(crate) fn connect(path: &Path) -> Result<UnixStream, Failure> {
    UnixStream::connect(path).map_err(|error| Failure::io(format!("connect to {}", path.display()), &error))
}

/// Sends `text` and the descriptor as `handshake` says. What comes back has to stay open while the process
/// lives: the connection, unless it was to be closed, and the other end of a pipe that was sent.
///
/// `second_uffd` makes the descriptor of `--fd no-api`; `memfd` is that of `--fd memfd`.
///
/// # Errors
/// A call that failed, a text with fewer bytes than pieces, a receiver that takes no piece for a minute.
pub(crate) fn perform(
    handshake: &Handshake,
    socket: UnixStream,
    text: &str,
    uffd: &OwnedFd,
    memfd: Option<&OwnedFd>,
    second_uffd: impl FnOnce() -> Result<OwnedFd, Failure>,
) -> Result<Vec<OwnedFd>, Failure> {
    let mut kept = Vec::new();
    let extra: Option<OwnedFd> = match handshake.descriptor {
        Descriptor::Uffd | Descriptor::Blocking | Descriptor::None => None,
        Descriptor::Null | Descriptor::Two => Some(null()?),
        Descriptor::NoApi => Some(second_uffd()?),
        Descriptor::Memfd => memfd
            .map(OwnedFd::try_clone)
            .transpose()
            .map_err(|error| Failure::io("dup of the memfd", &error))?,
        Descriptor::Pipe => {
            let (reader, writer) = std::io::pipe().map_err(|error| Failure::io("pipe", &error))?;
            // Closing it would make the sent end readable, which nobody asked for.
            kept.push(writer.into());
            Some(reader.into())
        }
    };
    let with_uffd = matches!(
        handshake.descriptor,
        Descriptor::Uffd | Descriptor::Blocking | Descriptor::Two | Descriptor::Memfd
    );
    let descriptors: Vec<RawFd> =
        with_uffd.then_some(uffd).into_iter().chain(&extra).map(AsRawFd::as_raw_fd).collect();

    let limit = handshake.hang_up_after.unwrap_or(text.len());
    let mut sent = 0;
    for (index, piece) in pieces(text.as_bytes(), handshake.pieces)?.into_iter().enumerate() {
        let piece = piece.get(..piece.len().min(limit - sent.min(limit))).unwrap_or(piece);
        if piece.is_empty() {
            break;
        }
        if index > 0 {
            wait_until_received(&socket)?;
        }
        let riding: &[RawFd] = if index == handshake.fd_piece { &descriptors } else { &[] };
        send(&socket, piece, riding)?;
        sent += piece.len();
    }
    if !handshake.close && handshake.hang_up_after.is_none() {
        kept.push(socket.into());
    }
    Ok(kept)
}

fn null() -> Result<OwnedFd, Failure> {
    let file = File::open("/dev/null").map_err(|error| Failure::io("open of /dev/null", &error))?;
    Ok(file.into())
}

/// Cuts `bytes` into `count` parts, as equal as they can be.
fn pieces(bytes: &[u8], count: usize) -> Result<Vec<&[u8]>, Failure> {
    if bytes.len() < count {
        // A message without a byte does not exist on a stream, and its descriptor would not arrive.
        return Err(Failure::new(format!("--pieces: {} bytes cannot become {count} messages", bytes.len())));
    }
    let mut rest = bytes;
    let mut parts = Vec::with_capacity(count);
    for left in (1..=count).rev() {
        let (part, behind) = rest.split_at(rest.len() / left);
        parts.push(part);
        rest = behind;
    }
    Ok(parts)
}

/// Waits until the receiver has taken everything sent so far, so that what follows arrives by itself.
fn wait_until_received(socket: &UnixStream) -> Result<(), Failure> {
    let deadline = Instant::now() + RECEIVE_DEADLINE;
    loop {
        let mut queued: libc::c_int = 0;
        // SAFETY: SIOCOUTQ stores one int, into `queued`, which lives across the call.
        if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCOUTQ as libc::Ioctl, &raw mut queued) } != 0 {
            return Err(Failure::errno("ioctl(SIOCOUTQ) on the connection"));
        }
        if queued == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure::new(format!(
                "the receiver left a piece of the handshake unread for {} s ({queued} bytes accounted)",
                RECEIVE_DEADLINE.as_secs()
            )));
        }
        // Nothing signals that a peer has read; the pause only keeps the CPU free for it.
        thread::sleep(Duration::from_micros(200));
    }
}

/// The control message of SCM_RIGHTS. The data follows the header without padding wherever this compiles.
#[repr(C)]
struct Rights {
    header: libc::cmsghdr,
    descriptors: [RawFd; MOST_DESCRIPTORS],
}

// SAFETY: CMSG_LEN computes a length from its argument alone.
const HEADER_LEN: usize = unsafe { libc::CMSG_LEN(0) } as usize;
const _: () = assert!(std::mem::offset_of!(Rights, descriptors) == HEADER_LEN);

/// Sends all of `bytes`, `descriptors` with the first of them.
fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) -> Result<(), Failure> {
    let mut rest = bytes;
    let mut riding = descriptors;
    while !rest.is_empty() {
        let sent = send_once(socket, rest, riding)?;
        rest = rest.get(sent..).unwrap_or_default();
        riding = &[];
    }
    Ok(())
}

/// One sendmsg(2); the bytes it took.
fn send_once(socket: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) -> Result<usize, Failure> {
    // SAFETY: a cmsghdr and integers; all zero is a value of each.
    let mut rights: Rights = unsafe { std::mem::zeroed() };
    // SAFETY: integers and pointers; all zero is a value of each.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    message.msg_iov = ptr::from_mut(&mut vector);
    message.msg_iovlen = 1;
    if !descriptors.is_empty() {
        for (slot, descriptor) in rights.descriptors.iter_mut().zip(descriptors) {
            *slot = *descriptor;
        }
        let len = HEADER_LEN + size_of_val(descriptors);
        rights.header.cmsg_level = libc::SOL_SOCKET;
        rights.header.cmsg_type = libc::SCM_RIGHTS;
        rights.header.cmsg_len = len as _;
        message.msg_control = ptr::from_mut(&mut rights).cast();
        message.msg_controllen = len as _;
    }
    // SAFETY: `message` points to `vector` and `rights`, which live across the call; the lengths are those of
    // `bytes`, which sendmsg only reads, and of the used part of `rights`.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| {
        Failure::errno(format!("sendmsg({} bytes, {} descriptors)", bytes.len(), descriptors.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_together_are_the_text_and_none_is_empty() {
        let text = b"0123456789";
        for count in 1..=text.len() {
            let parts = pieces(text, count).unwrap();

            assert_eq!(parts.len(), count);
            assert!(parts.iter().all(|part| !part.is_empty()));
            assert_eq!(parts.concat(), text);
        }
    }

    #[test]
    fn more_pieces_than_bytes_are_refused() {
        assert!(pieces(b"ab", 3).is_err());
    }
}
