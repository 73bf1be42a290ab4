//! Descriptors that cross a socket: all of them or none, in whatever pieces the bytes come, and never without an end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod processes;

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use uffd::fd_passing::{FdPassingError, MOST_FDS, peer_credentials, recv, recv_exact, send, send_all};

use processes::{DEADLINE, alone, given, second, sleeps_in, until};

/// Short enough to be waited for in a test.
const SOON: Duration = Duration::from_millis(50);

/// A pipe tells whether its writing end was closed everywhere.
fn pipes(count: usize) -> (Vec<PipeReader>, Vec<PipeWriter>) {
    (0..count).map(|_| pipe().unwrap()).unzip()
}

fn borrowed<T: AsFd>(fds: &[T]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

/// Waits until nobody has the writing end of the pipe any more.
fn assert_closed_everywhere(reader: &PipeReader) {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, u16::try_from(DEADLINE.as_millis()).unwrap()).unwrap();
    assert_eq!(fds[0].revents(), Some(PollFlags::POLLHUP), "a descriptor stayed open");
}

fn nonblocking() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, theirs)
}

#[test]
fn descriptors_arrive_in_order_with_their_bytes() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (readers, writers) = pipes(3);
    assert_eq!(send(theirs.as_fd(), b"three", &borrowed(&writers)).unwrap(), 5);
    drop(writers);

    let mut buffer = [0; 16];
    let received = recv(ours.as_fd(), &mut buffer, 3).unwrap();

    assert_eq!(&buffer[..received.len], b"three");
    for (number, (fd, mut reader)) in (0_u8..).zip(received.fds.into_iter().zip(readers)) {
        File::from(fd).write_all(&[number]).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [number]);
    }
}

#[test]
fn received_descriptors_are_closed_on_exec() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(theirs.as_fd(), b"x", &[theirs.as_fd()]).unwrap();

    let received = recv(ours.as_fd(), &mut [0; 1], 1).unwrap();

    assert_eq!(fcntl(&received.fds[0], FcntlArg::F_GETFD), Ok(FdFlag::FD_CLOEXEC.bits()));
}

#[test]
fn as_many_descriptors_as_the_kernel_passes_arrive() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(theirs.as_fd(), b"x", &vec![theirs.as_fd(); MOST_FDS]).unwrap();

    let received = recv(ours.as_fd(), &mut [0; 1], MOST_FDS).unwrap();

    assert_eq!(received.fds.len(), MOST_FDS);
}

#[test]
fn more_descriptors_than_fit_are_not_sent() {
    let (ours, theirs) = nonblocking();

    let error = send(theirs.as_fd(), b"x", &vec![theirs.as_fd(); MOST_FDS + 1]).unwrap_err();

    assert!(matches!(error, FdPassingError::TooMany { count } if count == MOST_FDS + 1), "{error}");
    assert!(matches!(recv(ours.as_fd(), &mut [0; 1], 1), Err(FdPassingError::WouldBlock)));
}

#[test]
fn more_descriptors_than_accepted_are_refused_and_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (readers, writers) = pipes(2);
    send(theirs.as_fd(), b"x", &borrowed(&writers)).unwrap();
    drop(writers);

    let error = recv(ours.as_fd(), &mut [0; 1], 1).unwrap_err();

    assert!(matches!(error, FdPassingError::Truncated), "{error}");
    readers.iter().for_each(assert_closed_everywhere);
}

#[test]
fn descriptors_that_do_not_all_fit_into_the_table_are_refused_and_closed() {
    alone("descriptors_that_do_not_all_fit_into_the_table_are_refused_and_closed", || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (readers, writers) = pipes(3);
        send(theirs.as_fd(), b"x", &borrowed(&writers)).unwrap();
        drop(writers);
        // Room for one: the kernel passes that one and says that it cut the rest off.
        let next = ours.try_clone().unwrap().as_raw_fd();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, next as u64 + 1, hard).unwrap();

        let error = recv(ours.as_fd(), &mut [0; 1], 3).unwrap_err();

        assert!(matches!(error, FdPassingError::Truncated), "{error}");
        readers.iter().for_each(assert_closed_everywhere);
    });
}

#[test]
fn a_datagram_longer_than_the_buffer_is_refused_and_its_descriptor_closed() {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let (readers, writers) = pipes(1);
    send(theirs.as_fd(), b"longer", &borrowed(&writers)).unwrap();
    drop(writers);

    let error = recv(ours.as_fd(), &mut [0; 3], 1).unwrap_err();

    assert!(matches!(error, FdPassingError::Truncated), "{error}");
    readers.iter().for_each(assert_closed_everywhere);
}

#[test]
fn a_payload_in_pieces_is_put_together_and_keeps_all_descriptors() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (ready, go_on) = channel();
    let sender = std::thread::spawn(move || {
        send(theirs.as_fd(), b"first ", &[theirs.as_fd()]).unwrap();
        // The second piece goes once the first was taken, so that it cannot be merged with it.
        go_on.recv_timeout(DEADLINE).unwrap();
        send(theirs.as_fd(), b"second", &[theirs.as_fd(), theirs.as_fd()]).unwrap();
    });
    let mut first = [0; 3];
    let mut rest = [0; 9];

    let mut fds = recv_exact(ours.as_fd(), &mut first, 3, DEADLINE).unwrap();
    ready.send(()).unwrap();
    fds.extend(recv_exact(ours.as_fd(), &mut rest, 2, DEADLINE).unwrap());

    assert_eq!((&first, &rest), (b"fir", b"st second"));
    assert_eq!(fds.len(), 3);
    sender.join().unwrap();
}

#[test]
fn descriptors_over_the_limit_in_a_later_piece_are_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (readers, writers) = pipes(2);
    send(theirs.as_fd(), b"a", &borrowed(&writers[..1])).unwrap();
    send(theirs.as_fd(), b"b", &borrowed(&writers[1..])).unwrap();
    drop(writers);

    let error = recv_exact(ours.as_fd(), &mut [0; 2], 1, DEADLINE).unwrap_err();

    assert!(matches!(error, FdPassingError::Truncated), "{error}");
    readers.iter().for_each(assert_closed_everywhere);
}

#[test]
fn descriptors_ride_with_the_first_byte_of_a_payload_that_needs_many_calls() {
    const LEN: usize = 4 << 20;
    let (ours, theirs) = nonblocking();
    theirs.set_nonblocking(true).unwrap();
    let payload: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
    let sent = payload.clone();
    let sender = std::thread::spawn(move || {
        send_all(theirs.as_fd(), &sent, &[theirs.as_fd()], DEADLINE).unwrap();
    });
    let mut first = [0; 1];
    let mut rest = vec![0; LEN - 1];

    let fds = recv_exact(ours.as_fd(), &mut first, 1, DEADLINE).unwrap();
    let more: Vec<OwnedFd> = recv_exact(ours.as_fd(), &mut rest, 1, DEADLINE).unwrap();

    assert_eq!((fds.len(), more.len()), (1, 0));
    assert_eq!(first[0], payload[0]);
    assert!(rest == payload[1..]);
    sender.join().unwrap();
}

#[test]
fn a_nonblocking_socket_without_a_message_says_so() {
    let (ours, _theirs) = nonblocking();

    assert!(matches!(recv(ours.as_fd(), &mut [0; 1], 1), Err(FdPassingError::WouldBlock)));
}

#[test]
fn a_nonblocking_socket_without_room_says_so() {
    let (ours, _theirs) = nonblocking();

    let error = std::iter::repeat_with(|| send(ours.as_fd(), &[0; 65536], &[])).find_map(Result::err);

    assert!(matches!(error, Some(FdPassingError::WouldBlock)), "{error:?}");
}

#[test]
fn the_end_of_the_stream_is_a_piece_without_bytes() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);

    let received = recv(ours.as_fd(), &mut [0; 1], 1).unwrap();

    assert_eq!((received.len, received.fds.len()), (0, 0));
}

#[test]
fn a_stream_that_ends_too_early_tells_how_much_came_and_closes_what_rode_with_it() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (readers, writers) = pipes(1);
    send(theirs.as_fd(), b"ab", &borrowed(&writers)).unwrap();
    theirs.write_all(b"c").unwrap();
    drop((theirs, writers));
    let mut buffer = [0; 4];

    let error = recv_exact(ours.as_fd(), &mut buffer, 1, DEADLINE).unwrap_err();

    assert!(matches!(error, FdPassingError::Closed { done: 3 }), "{error}");
    assert_eq!(&buffer, b"abc\0");
    readers.iter().for_each(assert_closed_everywhere);
}

#[test]
fn a_silent_peer_is_waited_for_until_the_deadline_on_a_blocking_socket() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"ab").unwrap();
    let start = Instant::now();

    let error = recv_exact(ours.as_fd(), &mut [0; 3], 1, SOON).unwrap_err();

    assert!(matches!(error, FdPassingError::TimedOut { done: 2 }), "{error}");
    assert!(start.elapsed() >= SOON);
}

#[test]
fn a_peer_that_does_not_read_is_waited_for_until_the_deadline_on_a_blocking_socket() {
    const LEN: usize = 16 << 20;
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let start = Instant::now();

    let error = send_all(ours.as_fd(), &vec![0; LEN], &[], SOON).unwrap_err();

    assert!(matches!(error, FdPassingError::TimedOut { done: 1..LEN }), "{error}");
    assert!(start.elapsed() >= SOON);
}

#[test]
fn sending_to_a_closed_socket_is_an_error_and_no_signal() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    // The test program ignores the signal, as every Rust program does; with its default it would end here.
    alone("sending_to_a_closed_socket_is_an_error_and_no_signal", || {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(Signal::SIGPIPE, &default) }.unwrap();

        let error = send_all(ours.as_fd(), b"x", &[], DEADLINE).unwrap_err();

        assert!(matches!(error, FdPassingError::Closed { done: 0 }), "{error}");
    });
}

#[test]
fn a_message_without_a_byte_is_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();

    assert!(matches!(send(theirs.as_fd(), &[], &[theirs.as_fd()]), Err(FdPassingError::Empty)));
    assert!(matches!(send_all(theirs.as_fd(), &[], &[], DEADLINE), Err(FdPassingError::Empty)));
    assert!(matches!(recv(ours.as_fd(), &mut [], 1), Err(FdPassingError::Empty)));
}

#[test]
fn a_signal_does_not_end_the_wait_for_a_message() {
    static SIGNALS: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn count(_: i32) {
        SIGNALS.fetch_add(1, Ordering::SeqCst);
    }
    alone("a_signal_does_not_end_the_wait_for_a_message", || {
        let action = SigAction::new(SigHandler::Handler(count), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only counts.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (id, receiver) = channel();
        let waiting = std::thread::spawn(move || {
            id.send(nix::unistd::gettid().as_raw()).unwrap();
            recv(ours.as_fd(), &mut [0; 1], 0).map(|received| received.len)
        });
        let thread = receiver.recv_timeout(DEADLINE).unwrap();
        until("the receiver sleeps", || sleeps_in(thread, libc::SYS_recvmsg));

        let process = nix::unistd::getpid().as_raw();
        // SAFETY: takes numbers; the thread lives until it is joined.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
        until("the signal was handled", || SIGNALS.load(Ordering::SeqCst) == 1);
        until("the receiver sleeps again", || sleeps_in(thread, libc::SYS_recvmsg));
        theirs.write_all(b"x").unwrap();

        assert_eq!(waiting.join().unwrap().unwrap(), 1);
    });
}

#[test]
fn the_credentials_of_a_peer_are_those_of_the_process_that_connected() {
    let name = "the_credentials_of_a_peer_are_those_of_the_process_that_connected";
    if let Some(path) = given(name) {
        let mut stream = UnixStream::connect(path).unwrap();
        // Until the other end has seen enough.
        stream.read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let path = std::env::temp_dir().join(format!("uffd-credentials-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut child = second(name, path.to_str().unwrap());
    let mut accepted = None;
    until("the second process connects", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (stream, _) = accepted.unwrap();
    std::fs::remove_file(path).unwrap();

    let credentials = peer_credentials(stream.as_fd()).unwrap();

    drop(stream);
    assert!(child.wait().unwrap().success());
    assert_eq!(credentials.pid, child.id() as i32);
    assert_eq!(credentials.uid, nix::unistd::getuid().as_raw());
    assert_eq!(credentials.gid, nix::unistd::getgid().as_raw());
}

#[test]
fn a_file_has_no_peer() {
    let file = File::open("/dev/null").unwrap();

    assert_eq!(peer_credentials(file.as_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTSOCK));
}
