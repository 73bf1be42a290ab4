//! The heir: a process that shares the daemon's descriptor table (`CLONE_FILES`), has a memory of its own, and waits. When the daemon
//! dies, in whatever way, the table lives on in it. It hands to the holder what may have been in that table alone (userfaultfds of
//! children that were being forked, connections that were being accepted), and ends; only then everything else is closed.
//!
//! It is cloned from a process that may have threads, so it does nothing but bare system calls: no allocation, no lock.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use uffd::liveness::PidFd;

/// Descriptors that ride with one message.
const AT_ONCE: usize = 64;
/// Room for a message of so many numbers.
const TEXT: usize = 64 + AT_ONCE * 12;
/// How long the holder may take for a message, in milliseconds.
const PATIENCE: i32 = 1000;
/// Bytes of control data before the descriptors, and with them.
const RIGHTS: usize = size_of::<libc::cmsghdr>() + AT_ONCE * size_of::<RawFd>();

/// It, as the daemon knows it.
pub(crate) struct Heir {
    process: PidFd,
    /// The daemon itself, for the heir, which has the same table.
    _daemon: PidFd,
}

impl Heir {
    /// Starts one. `control` is the socket whose connections are no served processes'.
    pub(crate) fn start(channel: BorrowedFd<'_>, control: BorrowedFd<'_>) -> Result<Self, Errno> {
        let gone = |_| Errno::ESRCH;
        let daemon = PidFd::open(std::process::id() as i32).map_err(gone)?;
        let (watched, channel) = (daemon.as_fd().as_raw_fd(), channel.as_raw_fd());
        let control = Name::of(control.as_raw_fd()).ok_or(Errno::ENOTSOCK)?;
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: as fork(2): the child has a copy of this memory and stack, and only makes bare system calls until it ends.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            inherit(watched, channel, &control);
        }
        let process = PidFd::open(Errno::result(pid)? as i32).map_err(gone)?;
        Ok(Self { process, _daemon: daemon })
    }
}

impl AsFd for Heir {
    /// Readable when it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// The name that a socket is bound to, and connections to it have as well.
#[derive(Clone, Copy)]
struct Name {
    bytes: [u8; size_of::<libc::sockaddr_storage>()],
    len: usize,
}

impl Name {
    fn of(socket: RawFd) -> Option<Self> {
        let mut bytes = [0; size_of::<libc::sockaddr_storage>()];
        let mut len = bytes.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to this array.
        let outcome = unsafe { libc::getsockname(socket, bytes.as_mut_ptr().cast(), &raw mut len) };
        (outcome == 0).then_some(Self { bytes, len: len as usize })
    }

    fn get(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

/// The life of the heir.
fn inherit(daemon: RawFd, channel: RawFd, control: &Name) -> ! {
    // SAFETY: names this thread; the text ends with NUL.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"uffd-heir".as_ptr()) };
    while !wait_for(daemon, libc::POLLIN, -1) {}
    hand_over(channel, control);
    // SAFETY: ends this process, and runs nothing of the daemon's.
    unsafe { libc::_exit(0) }
}

/// Whether it is ready; `false` also for a signal.
fn wait_for(fd: RawFd, events: i16, ms: i32) -> bool {
    let mut fds = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one entry, which lives across the call.
    unsafe { libc::poll(&raw mut fds, 1, ms) == 1 }
}

fn hand_over(channel: RawFd, control: &Name) {
    let mut bundle = Bundle { fds: [0; AT_ONCE], len: 0 };
    // SAFETY: the path ends with NUL.
    let table = unsafe {
        libc::open(c"/proc/self/fd".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC)
    };
    if table < 0 {
        return;
    }
    let mut entries = [0_u8; 4096];
    loop {
        // SAFETY: the kernel writes at most the length of this array.
        let read = unsafe { libc::syscall(libc::SYS_getdents64, table, entries.as_mut_ptr(), entries.len()) };
        let Some(read) = usize::try_from(read).ok().filter(|&read| read > 0) else {
            if read == 0 {
                bundle.send(channel, true);
            }
            return;
        };
        let mut rest = entries.get(..read).unwrap_or(&[]);
        while let Some((entry, after)) = next_entry(rest) {
            rest = after;
            let Some(fd) = number(entry).filter(|&fd| fd != channel && is_left(table, entry, fd, control))
            else {
                continue;
            };
            if !bundle.add(fd) {
                if !bundle.send(channel, false) {
                    return;
                }
                bundle.add(fd);
            }
        }
    }
}

/// The name of the first `struct linux_dirent64`, with its NUL, and what is behind it.
fn next_entry(bytes: &[u8]) -> Option<(&CStr, &[u8])> {
    // Inode, offset, length, type.
    let len = bytes.get(16..18)?;
    let len = usize::from(u16::from_ne_bytes(len.try_into().ok()?));
    let name = CStr::from_bytes_until_nul(bytes.get(19..len)?).ok()?;
    Some((name, bytes.get(len..)?))
}

fn number(name: &CStr) -> Option<RawFd> {
    name.to_str().ok()?.parse().ok()
}

/// Whether it is something that may be in this table alone.
fn is_left(table: RawFd, name: &CStr, fd: RawFd, control: &Name) -> bool {
    let mut what = [0_u8; 32];
    // SAFETY: the name ends with NUL; the kernel writes at most the length of the array.
    let len = unsafe { libc::readlinkat(table, name.as_ptr(), what.as_mut_ptr().cast(), what.len()) };
    let what = usize::try_from(len).ok().and_then(|len| what.get(..len)).unwrap_or(&[]);
    what.starts_with(b"anon_inode:[userfaultfd]")
        || what.starts_with(b"socket:")
            && is_connection(fd)
            && Name::of(fd).is_some_and(|of| is_other(&of, control))
}

/// Whether somebody has connected to it, or it has.
fn is_connection(fd: RawFd) -> bool {
    option(fd, libc::SO_TYPE) == Some(libc::SOCK_STREAM) && option(fd, libc::SO_ACCEPTCONN) == Some(0)
}

/// Bound to a name, and not to that one.
fn is_other(name: &Name, control: &Name) -> bool {
    name.len > size_of::<libc::sa_family_t>() && name.get() != control.get()
}

fn option(fd: RawFd, option: i32) -> Option<i32> {
    let mut value = 0_i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`.
    let outcome =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len) };
    (outcome == 0).then_some(value)
}

/// Descriptors that go together, as [`Message::Left`](crate::channel::Message::Left).
struct Bundle {
    fds: [RawFd; AT_ONCE],
    len: usize,
}

impl Bundle {
    /// Whether there was room.
    fn add(&mut self, fd: RawFd) -> bool {
        let Some(place) = self.fds.get_mut(self.len) else { return false };
        *place = fd;
        self.len += 1;
        true
    }

    fn send(&mut self, channel: RawFd, all: bool) -> bool {
        let len = std::mem::take(&mut self.len);
        let fds = self.fds.get(..len).unwrap_or(&[]);
        let mut text = Text { bytes: [0; TEXT], len: 0 };
        text.push(br#"{"left":{"fds":["#);
        for (nth, &fd) in fds.iter().enumerate() {
            text.push(if nth > 0 { b"," } else { b"" });
            text.push_number(fd);
        }
        text.push(br#"],"all":"#);
        text.push(if all { b"true}}" } else { b"false}}" });
        transmit(channel, text.get(), fds)
    }
}

/// Sends a packet; whether it was taken.
fn transmit(channel: RawFd, text: &[u8], fds: &[RawFd]) -> bool {
    // Words, because control data is aligned like them.
    let mut control = [0_u64; RIGHTS.div_ceil(8) + 1];
    let bytes = size_of_val(fds);
    let mut piece = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // SAFETY: zeros are a message without an address, pieces or control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes a number.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(bytes as u32) } as _;
        // SAFETY: the message has control data of that size, which lives across this function.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: computes a number.
        let len = unsafe { libc::CMSG_LEN(bytes as u32) };
        // SAFETY: the header is in `control`, whose words are aligned for it, and nobody else refers to it; zeros are one.
        let header_at = unsafe { &mut *header };
        header_at.cmsg_len = len as _;
        header_at.cmsg_level = libc::SOL_SOCKET;
        header_at.cmsg_type = libc::SCM_RIGHTS;
        // SAFETY: computes an address in `control`, behind the header.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: `control` has room for as many descriptors behind its header, and is not where they come from.
        unsafe { std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), data, bytes) };
    }
    loop {
        // SAFETY: everything that the message names lives across the call.
        let sent =
            unsafe { libc::sendmsg(channel, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        match Errno::result(sent) {
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if wait_for(channel, libc::POLLOUT, PATIENCE) => {}
            Err(_) => return false,
        }
    }
}

/// Text in a place of its own.
struct Text {
    bytes: [u8; TEXT],
    len: usize,
}

impl Text {
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text) {
            *to = *from;
        }
        self.len = (self.len + text.len()).min(TEXT);
    }

    fn push_number(&mut self, number: RawFd) {
        let mut digits = [b'0'; 10];
        let mut rest = number.unsigned_abs();
        let mut first = digits.len();
        while first == digits.len() || rest > 0 {
            first -= 1;
            if let Some(digit) = digits.get_mut(first) {
                *digit = b'0' + (rest % 10) as u8;
            }
            rest /= 10;
        }
        self.push(digits.get(first..).unwrap_or(&[]));
    }

    fn get(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::channel::{Channel, Message};

    #[test]
    fn what_a_table_alone_has_is_handed_over_by_number_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("userfaultfd-heir-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let listen = |name: &str| UnixListener::bind(dir.join(name)).unwrap();
        let (control, served) = (listen("control"), listen("served"));
        let _clients = ["control", "served"].map(|name| UnixStream::connect(dir.join(name)).unwrap());
        let (client, _) = control.accept().unwrap();
        let (process, _) = served.accept().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let (ours, theirs) = Channel::pair().unwrap();

        hand_over(theirs.as_fd().as_raw_fd(), &Name::of(control.as_raw_fd()).unwrap());

        let mut left = Vec::new();
        loop {
            let (Message::Left { fds, all }, came) = ours.receive().unwrap().unwrap() else { panic!() };
            assert_eq!(fds.len(), came.len());
            left.extend(fds);
            if all {
                break;
            }
        }
        // Other tests of this process may have others.
        assert!(left.contains(&process.as_raw_fd()));
        for other in [client.as_raw_fd(), control.as_raw_fd(), served.as_raw_fd(), theirs.as_fd().as_raw_fd()]
        {
            assert!(!left.contains(&other));
        }
    }

    #[test]
    fn numbers_are_written_as_text() {
        let mut text = Text { bytes: [0; TEXT], len: 0 };
        for number in [0, 7, 10, 65_535, i32::MAX] {
            text.push_number(number);
            text.push(b" ");
        }

        assert_eq!(text.get(), b"0 7 10 65535 2147483647 ");
    }
}
