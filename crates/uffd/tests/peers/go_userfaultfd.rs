//! ricardobranco777/go-userfaultfd, whose suite takes no fault: here each call answers a real one.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{
    ContinueOptions, CreateOptions, EventBuffer, Factory, FaultKind, Features, MappingKind, Modes,
    MoveOptions, UffdError, Userfaultfd,
};
use userfaultfd_sys as sys;

use crate::processes::alone;
use crate::reader;
use crate::support::{PAGE, elsewhere, fault, finish, pages, register, registered, uffd};

const M: Modes = Modes::MISSING;

/// Alone: the number of a descriptor that was closed is given to the next that is opened.
#[test]
fn a_new_descriptor_has_its_flags_and_is_closed_with_its_object() {
    alone("go_userfaultfd::a_new_descriptor_has_its_flags_and_is_closed_with_its_object", || {
        let Some(uffd) = uffd(Features::empty()) else { return };
        let link = format!("/proc/self/fd/{}", uffd.as_fd().as_raw_fd());
        let status = OFlag::from_bits_retain(fcntl(&uffd, FcntlArg::F_GETFL).unwrap());
        let descriptor = FdFlag::from_bits_retain(fcntl(&uffd, FcntlArg::F_GETFD).unwrap());

        assert!(status.contains(OFlag::O_NONBLOCK) && descriptor.contains(FdFlag::FD_CLOEXEC));
        assert_eq!(fs::read_link(&link).unwrap().as_os_str(), "anon_inode:[userfaultfd]");
        drop(uffd);

        assert!(fs::read_link(&link).is_err());
    });
}

fn created(non_blocking: bool) -> Userfaultfd {
    Factory::open().create(&CreateOptions { non_blocking, ..CreateOptions::default() }).unwrap()
}

fn polled(uffd: &Userfaultfd, timeout: PollTimeout) -> (PollFlags, Duration) {
    let start = Instant::now();
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout).unwrap();
    (fds[0].revents().unwrap(), start.elapsed())
}

/// Not at all, for a while, and for ever: on a descriptor that can be waited for, and on one that cannot.
#[test]
fn waiting_for_a_message_ends_in_time_and_is_an_error_on_a_blocking_descriptor() {
    finish(&elsewhere(waits_in_time));
}

fn waits_in_time() {
    const WHILE: Duration = Duration::from_millis(50);
    let a_while = PollTimeout::from(50_u16);
    let (uffd, blocking) = (created(true), created(false));

    assert_eq!(polled(&uffd, PollTimeout::ZERO).0, PollFlags::empty());
    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)), Ok(0));
    let (ready, waited) = polled(&uffd, a_while);
    assert_eq!(ready, PollFlags::empty());
    assert!(waited >= WHILE, "{waited:?}");
    for timeout in [PollTimeout::ZERO, a_while, PollTimeout::NONE] {
        assert_eq!(polled(&blocking, timeout).0, PollFlags::POLLERR, "{timeout:?}");
        assert_eq!(blocking.read_events(&mut EventBuffer::new(1)), Ok(0));
    }
    let mapping = Arc::new(pages(1, MappingKind::Private));
    register(&uffd, &mapping, M);
    let byte = reader(&mapping, 0);
    assert_eq!(polled(&uffd, PollTimeout::NONE).0, PollFlags::POLLIN);
    assert_eq!(fault(&uffd).address, mapping.address());
    uffd.zero(mapping.address(), PAGE, true).unwrap();
    assert_eq!(finish(&byte), 0);
}

#[test]
fn shared_memory_is_registered_and_given_back() {
    let Some(uffd) = uffd(Features::MISSING_SHMEM) else { return };
    let mapping = Arc::new(pages(2, MappingKind::Shared));
    register(&uffd, &mapping, M);
    let byte = reader(&mapping, 0);
    assert_eq!(fault(&uffd).kind, FaultKind::Missing);
    uffd.zero(mapping.address(), PAGE, true).unwrap();
    assert_eq!(finish(&byte), 0);

    uffd.unregister(mapping.address(), 2 * PAGE).unwrap();

    assert_eq!(uffd.zero(mapping.address() + PAGE, PAGE, true), Err(UffdError::NotRegistered));
    assert_eq!(finish(&reader(&mapping, PAGE)), 0, "without a message");
    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)), Ok(0));
}

#[test]
fn shared_memory_whose_page_is_not_mapped_any_more_is_continued_with_its_bytes() {
    let Some(uffd) = uffd(Features::MINOR_SHMEM) else { return };
    let mapping = Arc::new(pages(1, MappingKind::Shared));
    mapping.write(0, &[0xab; PAGE as usize]).unwrap();
    register(&uffd, &mapping, Modes::MINOR);
    // Of this page table only; the memfd keeps the page.
    // SAFETY: the test's own mapping, to which nothing refers.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), PAGE as usize, libc::MADV_DONTNEED) };
    assert_eq!(result, 0);
    let byte = reader(&mapping, 0);
    assert_eq!(fault(&uffd).kind, FaultKind::Minor);

    uffd.continue_pages(mapping.address(), PAGE, ContinueOptions::default()).unwrap();

    assert_eq!(finish(&byte), 0xab);
}

#[test]
fn a_page_that_was_filled_with_zeros_is_moved_and_missing_where_it_was() {
    let Some((uffd, mapping)) = registered(2, M, Features::MOVE) else { return };
    let mapping = Arc::new(mapping);
    let (from, to) = (mapping.address(), mapping.address() + PAGE);
    uffd.zero(from, PAGE, true).unwrap();
    let byte = reader(&mapping, PAGE);
    assert_eq!(fault(&uffd).address, to);

    // SAFETY: no reference to the memory exists.
    unsafe { uffd.move_pages(to, from, PAGE, MoveOptions::default()) }.unwrap();

    assert_eq!(finish(&byte), 0);
    assert_eq!(uffd.zero(from, PAGE, true), Ok(()));
}

#[test]
fn structures_have_the_sizes_of_the_kernels() {
    let sizes = [
        size_of::<sys::uffd_msg>(),
        size_of::<sys::uffdio_api>(),
        size_of::<sys::uffdio_register>(),
        size_of::<sys::uffdio_range>(),
        size_of::<sys::uffdio_copy>(),
        size_of::<sys::uffdio_zeropage>(),
        size_of::<sys::uffdio_writeprotect>(),
        size_of::<sys::uffdio_continue>(),
        size_of::<sys::uffdio_move>(),
        size_of::<sys::uffdio_poison>(),
    ];

    assert_eq!(sizes, [32, 24, 32, 16, 40, 32, 24, 32, 40, 32]);
    // The number of an ioctl has the size of its structure in it.
    let of_ioctls = [
        (sys::UFFDIO_API, 24),
        (sys::UFFDIO_REGISTER, 32),
        (sys::UFFDIO_UNREGISTER, 16),
        (sys::UFFDIO_WAKE, 16),
        (sys::UFFDIO_COPY, 40),
        (sys::UFFDIO_ZEROPAGE, 32),
        (sys::UFFDIO_WRITEPROTECT, 24),
        (sys::UFFDIO_CONTINUE, 32),
        (sys::UFFDIO_MOVE, 40),
        (sys::UFFDIO_POISON, 32),
    ];
    assert!(of_ioctls.iter().all(|(number, size)| number >> 16 & 0x3fff == *size), "{of_ioctls:x?}");
}
