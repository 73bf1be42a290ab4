//! What the upstream crate `userfaultfd` 0.9 gets wrong or does not have, done right: each on real faults and events.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod processes;
mod support;

use std::fs;
use std::io::{PipeWriter, Write, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use uffd::{
    Backend, ContinueOptions, CopyOptions, CreateOptions, Event, EventBuffer, Factory, FaultKind, Features,
    Ioctls, Mapping, MappingKind, Modes, MoveOptions, UffdError, Userfaultfd,
};

use processes::{alone, sleeps_in, until};
use support::{PAGE, elsewhere, events, fault, finish, fork_and_exit, pages, register, registered, uffd};

const M: Modes = Modes::MISSING;
const W: Modes = Modes::WRITE_PROTECT;
const C: Modes = Modes::MINOR;
const SEVENS: [u8; PAGE as usize] = [7; PAGE as usize];

fn copy(uffd: &Userfaultfd, dst: u64, options: CopyOptions) -> Result<(), UffdError> {
    // SAFETY: the source is a constant.
    unsafe { uffd.copy(dst, SEVENS.as_ptr(), SEVENS.len(), options) }
}

fn move_pages(uffd: &Userfaultfd, to: u64, from: &Mapping, options: MoveOptions) -> Result<(), UffdError> {
    // SAFETY: no reference to either side exists.
    unsafe { uffd.move_pages(to, from.address(), from.len() as u64, options) }
}

/// A thread that reads the first byte.
fn reader(mapping: &Arc<Mapping>) -> std::sync::mpsc::Receiver<u8> {
    let mapping = Arc::clone(mapping);
    elsewhere(move || {
        let mut byte = [0];
        mapping.read(0, &mut byte).unwrap();
        byte[0]
    })
}

fn wait_readable(uffd: &Userfaultfd) {
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap(), 1, "nothing came");
}

/// Upstream closes the descriptor that it returns.
#[test]
fn a_descriptor_that_is_handed_out_still_serves_who_waits() {
    let Some((uffd, mapping)) = registered(1, M, Features::empty()) else { return };
    let mapping = Arc::new(mapping);
    let byte = reader(&mapping);
    fault(&uffd);

    let again = Userfaultfd::adopt(uffd.into_owned_fd()).unwrap();
    copy(&again, mapping.address(), CopyOptions::default()).unwrap();

    assert_eq!(finish(&byte), 7, "closing would have given it zeros");
}

/// Upstream reports 18446744073709551605 bytes.
#[test]
fn a_copy_that_the_kernel_refuses_for_a_change_has_copied_nothing() {
    let Some((uffd, mapping)) = registered(2, M, Features::EVENT_REMOVE) else { return };
    let mapping = Arc::new(mapping);
    let changing = Arc::clone(&mapping);
    let discarded = elsewhere(move || changing.discard(PAGE as usize, PAGE as usize).unwrap());
    wait_readable(&uffd);

    let refused = copy(&uffd, mapping.address(), CopyOptions::default());

    assert_eq!(refused, Err(UffdError::Changing));
    drop(events(&uffd, 1));
    finish(&discarded);
    assert_eq!(copy(&uffd, mapping.address(), CopyOptions::default()), Ok(()));
}

/// Upstream loses the counts of ZEROPAGE, and has neither MOVE nor POISON.
#[test]
fn what_stops_half_way_says_after_how_many_bytes_whatever_it_is() {
    let two = 2 * PAGE;
    let Some((uffd, mapping)) = registered(3, M, Features::POISON | Features::MOVE) else { return };
    let missing = mapping.address();
    copy(&uffd, missing + two, CopyOptions::default()).unwrap();
    let source = pages(3, MappingKind::Private);
    source.write(0, &[1; 3 * PAGE as usize]).unwrap();
    let shared = pages(3, MappingKind::Shared);
    nix::sys::uio::pwrite(shared.memfd().unwrap(), &[1; 2 * PAGE as usize], 0).unwrap();
    register(&uffd, &shared, M | C);
    let emptied = || mapping.discard(0, two as usize).unwrap();

    let zeroed = uffd.zero(missing, 3 * PAGE, true);
    emptied();
    let poisoned = uffd.poison(missing, 3 * PAGE, true);
    emptied();
    let moved = move_pages(&uffd, missing, &source, MoveOptions::default());
    let continued = uffd.continue_pages(shared.address(), 3 * PAGE, ContinueOptions::default());

    assert_eq!([zeroed, poisoned, moved, continued], [Err(UffdError::PartiallyCopied { done: two }); 4]);
    assert_eq!(uffd.zero(missing + two, PAGE, true), Err(UffdError::PageExist), "why it stopped");
}

/// Only this thread, and only the call that does not wait: kernels that lack it are read the other way.
fn without_preadv2() -> Result<(), Errno> {
    let statement = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut statements = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_preadv2 as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: statements.len() as u16, filter: statements.as_mut_ptr() };
    // SAFETY: takes numbers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: the program and its statements live across the call, which copies them.
    Errno::result(unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    })?;
    Ok(())
}

static INTERRUPTIONS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn interrupted(_: i32) {
    INTERRUPTIONS.fetch_add(1, Ordering::SeqCst);
}

/// Upstream returns EINTR.
#[test]
fn a_read_that_a_signal_interrupts_goes_on() {
    alone("a_read_that_a_signal_interrupts_goes_on", || {
        let options = CreateOptions { non_blocking: false, ..CreateOptions::default() };
        let uffd = Arc::new(Factory::open().create(&options).unwrap());
        let mapping = Arc::new(pages(1, MappingKind::Private));
        register(&uffd, &mapping, M);
        let action = SigAction::new(SigHandler::Handler(interrupted), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only counts.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
        let (reading, (tell, told)) = (Arc::clone(&uffd), channel());
        let read = elsewhere(move || {
            // SAFETY: takes nothing.
            let pthread = unsafe { libc::pthread_self() };
            tell.send(without_preadv2().map(|()| (nix::unistd::gettid().as_raw(), pthread))).unwrap();
            reading.read_events(&mut EventBuffer::new(4))
        });
        let (thread, pthread) = match finish(&told) {
            Ok(ids) => ids,
            Err(errno) => return eprintln!("skipped: no seccomp filter to make a read wait with: {errno}"),
        };
        until("it sleeps in read", || sleeps_in(thread, libc::SYS_read));

        // SAFETY: the thread sleeps, so it exists.
        unsafe { libc::pthread_kill(pthread, libc::SIGUSR1) };

        until("the signal is taken", || INTERRUPTIONS.load(Ordering::SeqCst) == 1);
        until("it sleeps in read again", || sleeps_in(thread, libc::SYS_read));
        let byte = reader(&mapping);
        assert_eq!(finish(&read), Ok(1));
        copy(&uffd, mapping.address(), CopyOptions::default()).unwrap();
        assert_eq!(finish(&byte), 7);
    });
}

/// Upstream owns them when its iterator gives them out, and loses those behind.
#[test]
fn the_descriptor_of_a_fork_behind_the_last_message_taken_is_closed() {
    let userfaultfds = || {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        let links = links.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        links.filter(|link| link.as_os_str() == "anon_inode:[userfaultfd]").count()
    };
    alone("the_descriptor_of_a_fork_behind_the_last_message_taken_is_closed", || {
        let Some((uffd, mapping)) = registered(1, M, Features::EVENT_FORK) else { return };
        let mapping = Arc::new(mapping);
        let child = fork_and_exit();
        wait_readable(&uffd);
        let byte = reader(&mapping);
        until("a thread waits", || uffd.waiting().unwrap().pending == 1);
        let mut buffer = EventBuffer::new(4);
        assert_eq!(userfaultfds(), 1);

        assert_eq!(uffd.read_events(&mut buffer), Ok(2));
        assert_eq!(userfaultfds(), 2, "it is here from the moment it is read");
        let first = buffer.drain().next();
        drop(buffer);

        assert!(matches!(first, Some(Event::Fault(_))), "faults come first: {first:?}");
        assert_eq!(userfaultfds(), 1);
        finish(&child);
        until("the change is over", || copy(&uffd, mapping.address(), CopyOptions::default()).is_ok());
        assert_eq!(finish(&byte), 7);
    });
}

/// A userfaultfd whose number has become a pipe behind its back: it reads what is written there.
fn reading_a_pipe() -> Option<(Userfaultfd, PipeWriter)> {
    let uffd = uffd(Features::empty())?;
    let (ours, theirs) = pipe().unwrap();
    // SAFETY: the number stays the object's, which closes it in the end.
    let result = unsafe { libc::dup2(ours.as_raw_fd(), uffd.as_fd().as_raw_fd()) };
    Errno::result(result).unwrap();
    Some((uffd, theirs))
}

/// One page fault message, to the byte.
fn message(kind: u8, address: u64) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[0] = kind;
    bytes[8..16].copy_from_slice(&1_u64.to_ne_bytes());
    bytes[16..24].copy_from_slice(&address.to_ne_bytes());
    bytes[24..28].copy_from_slice(&77_u32.to_ne_bytes());
    bytes
}

/// Upstream counts the bytes that are missing as those that came, and loses the messages in front of them. The kernel never
/// does this.
#[test]
fn a_message_that_is_not_whole_is_an_error_and_those_in_front_of_it_are_not_lost() {
    let Some((uffd, mut theirs)) = reading_a_pipe() else { return };
    theirs.write_all(&message(0x12, 0x5000)).unwrap();
    theirs.write_all(&[0; 8]).unwrap();
    let mut buffer = EventBuffer::new(4);

    assert_eq!(uffd.read_events(&mut buffer), Err(UffdError::ShortRead { bytes: 40 }));

    let event = buffer.drain().next();
    assert!(
        matches!(event, Some(Event::Fault(fault)) if fault.address == 0x5000 && fault.write && fault.thread_id.is_none()),
        "{event:?}"
    );
    assert!(buffer.drain().next().is_none());
    theirs.write_all(&message(0x12, 0x6000)).unwrap();
    assert_eq!(uffd.read_events(&mut buffer), Ok(1), "reading goes on");
}

#[test]
fn the_end_of_a_file_is_an_error_and_not_the_absence_of_messages() {
    let Some((uffd, theirs)) = reading_a_pipe() else { return };
    let mut buffer = EventBuffer::new(4);
    assert_eq!(uffd.read_events(&mut buffer), Ok(0));
    drop(theirs);

    assert_eq!(uffd.read_events(&mut buffer), Err(UffdError::EndOfFile));
}

/// Upstream panics or stops at what it does not know.
#[test]
fn a_message_of_a_kind_to_come_is_given_out_as_unknown() {
    let Some((uffd, mut theirs)) = reading_a_pipe() else { return };
    theirs.write_all(&message(0x77, 0)).unwrap();
    let mut buffer = EventBuffer::new(4);

    assert_eq!(uffd.read_events(&mut buffer), Ok(1));

    let event = buffer.drain().next();
    assert!(matches!(event, Some(Event::Unknown { event: 0x77 })), "{event:?}");
}

/// Upstream compares them with the ioctls of the handshake, which never has them.
#[test]
fn ioctls_that_a_range_must_take_are_checked_where_they_are_told() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let mapping = pages(1, MappingKind::Private);
    let filling = Ioctls::COPY | Ioctls::ZEROPAGE | Ioctls::WAKE;
    let requiring = |require| {
        // SAFETY: no reference to the memory exists.
        unsafe { uffd.register_requiring(mapping.address(), PAGE, M, require) }
    };

    let refused = requiring(filling | Ioctls::CONTINUE);

    assert_eq!(refused, Err(UffdError::MissingIoctls { missing: Ioctls::CONTINUE }));
    assert_eq!(uffd.zero(mapping.address(), PAGE, true), Err(UffdError::NotRegistered), "it is undone");
    assert!(requiring(filling).unwrap().contains(filling));
    assert_eq!(uffd.zero(mapping.address(), PAGE, true), Ok(()));
}

/// Upstream gives up.
#[test]
fn a_device_that_may_not_be_opened_falls_back_to_the_system_call() {
    const NOBODY: u32 = 65_534;
    let created = finish(&elsewhere(|| {
        // SAFETY: takes numbers. By number, because the libc wrapper changes all threads of the process.
        unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        let factory = Factory::open();
        (factory.device_error(), factory.create(&CreateOptions::default()))
    }));
    if created.0 != Some(Errno::EACCES) {
        println!("skipped: opening the device as nobody is {:?} and not EACCES", created.0);
        return;
    }

    let uffd = created.1.unwrap();

    assert_eq!(uffd.origin().unwrap().backend, Backend::Syscall);
    let mapping = Arc::new(pages(1, MappingKind::Private));
    register(&uffd, &mapping, M);
    let byte = reader(&mapping);
    assert_eq!(fault(&uffd).address, mapping.address());
    copy(&uffd, mapping.address(), CopyOptions::default()).unwrap();
    assert_eq!(finish(&byte), 7);
}

/// Upstream takes its constants from the build host's header, and has no name for half of them.
#[test]
fn every_feature_and_ioctl_has_its_name_and_number() {
    let features = [
        "pagefault-flag-wp",
        "event-fork",
        "event-remap",
        "event-remove",
        "missing-hugetlbfs",
        "missing-shmem",
        "event-unmap",
        "sigbus",
        "thread-id",
        "minor-hugetlbfs",
        "minor-shmem",
        "exact-address",
        "wp-hugetlbfs-shmem",
        "wp-unpopulated",
        "poison",
        "wp-async",
        "move",
    ];
    let ioctls =
        ["register", "unregister", "wake", "copy", "zeropage", "move", "writeprotect", "continue", "poison"];

    assert_eq!(Features::from_bits_retain((1 << 17) - 1).names(), features);
    assert_eq!(Ioctls::from_bits_retain((1 << 9) - 1).names(), ioctls);
    assert_eq!(Ioctls::from_bits_retain(1 << 0x3f).names(), ["api"]);
}

/// Upstream has no such mode.
#[test]
fn a_page_that_is_copied_in_protected_reports_the_next_write() {
    let Some((uffd, mapping)) = registered(1, M | W, Features::empty()) else { return };
    let mapping = Arc::new(mapping);
    let byte = reader(&mapping);
    assert_eq!(fault(&uffd).kind, FaultKind::Missing);

    copy(&uffd, mapping.address(), CopyOptions { write_protect: true, ..CopyOptions::default() }).unwrap();

    assert_eq!(finish(&byte), 7);
    reports_the_next_write(&uffd, &mapping);
}

/// Upstream has no such mode.
#[test]
fn a_page_that_is_continued_protected_reports_the_next_write() {
    let Some(uffd) = uffd(Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM) else { return };
    let mapping = Arc::new(pages(1, MappingKind::Shared));
    nix::sys::uio::pwrite(mapping.memfd().unwrap(), &SEVENS, 0).unwrap();
    register(&uffd, &mapping, C | W);
    let byte = reader(&mapping);
    assert_eq!(fault(&uffd).kind, FaultKind::Minor);

    let options = ContinueOptions { write_protect: true, ..ContinueOptions::default() };
    uffd.continue_pages(mapping.address(), PAGE, options).unwrap();

    assert_eq!(finish(&byte), 7);
    reports_the_next_write(&uffd, &mapping);
}

fn reports_the_next_write(uffd: &Userfaultfd, mapping: &Arc<Mapping>) {
    let writer = Arc::clone(mapping);
    let written = elsewhere(move || writer.write(0, &[8]).unwrap());
    let message = fault(uffd);
    assert_eq!((message.kind, message.write), (FaultKind::WriteProtect, true));
    uffd.write_protect(mapping.address(), PAGE, false, true).unwrap();
    finish(&written);
    assert_eq!(finish(&reader(mapping)), 8);
}

/// Upstream has no MOVE.
#[test]
fn pages_are_moved_to_who_waits_for_them_and_holes_are_passed_over() {
    let Some((uffd, mapping)) = registered(3, M, Features::MOVE) else { return };
    let mapping = Arc::new(mapping);
    let source = pages(3, MappingKind::Private);
    source.write(0, &[7]).unwrap();
    source.write(2 * PAGE as usize, &[9]).unwrap();
    let byte = reader(&mapping);
    assert_eq!(fault(&uffd).address, mapping.address());

    let options = MoveOptions { allow_source_holes: true, ..MoveOptions::default() };
    move_pages(&uffd, mapping.address(), &source, options).unwrap();

    assert_eq!(finish(&byte), 7);
    assert_eq!(uffd.zero(mapping.address() + PAGE, PAGE, true), Ok(()), "the hole is missing still");
    assert_eq!(uffd.zero(mapping.address() + 2 * PAGE, PAGE, true), Err(UffdError::PageExist));
}
