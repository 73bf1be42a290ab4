//! `poll(2)`, `select(2)` and `epoll(7)`.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::channel;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{EventBuffer, MappingKind, Userfaultfd};

use crate::processes::{sleeps_in, until};
use crate::read::blocking;
use crate::support::{elsewhere, fault, finish, pages, register};
use crate::tables::{Done, Outcome, Row, row};
use crate::world::{M, World, dead, wait_readable, while_changing};

/// What poll says of it now.
fn now(uffd: &Userfaultfd) -> PollFlags {
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].revents().unwrap()
}

struct Epoll(OwnedFd);

impl Epoll {
    fn of(uffd: &Userfaultfd, flags: i32) -> Self {
        use std::os::fd::FromRawFd;
        // SAFETY: takes a number.
        let raw = Errno::result(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).unwrap();
        // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
        let epoll = Self(unsafe { OwnedFd::from_raw_fd(raw) });
        let mut event = libc::epoll_event { events: (libc::EPOLLIN | flags) as u32, u64: 0 };
        let (raw, fd) = (epoll.0.as_raw_fd(), uffd.as_fd().as_raw_fd());
        // SAFETY: `event` lives across the call.
        Errno::result(unsafe { libc::epoll_ctl(raw, libc::EPOLL_CTL_ADD, fd, &raw mut event) }).unwrap();
        epoll
    }

    /// Descriptors that are ready.
    fn wait(&self, milliseconds: i32) -> i32 {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for the one event.
        Errno::result(unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut event, 1, milliseconds) })
            .unwrap()
    }
}

/// Does something that sleeps in a system call with the uffd of a world, closes it meanwhile, and then lets a fault end
/// the sleep.
fn closed_meanwhile(
    uffd: Userfaultfd,
    call: libc::c_long,
    act: impl FnOnce(i32) -> i32 + Send + 'static,
) -> Outcome {
    let memory = pages(1, MappingKind::Private);
    register(&uffd, &memory, M);
    let fd = uffd.into_owned_fd();
    let number = fd.as_raw_fd();
    let (tell, thread) = channel();
    let result = elsewhere(move || {
        tell.send(nix::unistd::gettid().as_raw()).unwrap();
        act(number)
    });
    let thread = finish(&thread);
    until("it sleeps", || sleeps_in(thread, call));

    drop(fd);

    // A thread that was woken does not sleep in the call any more, even if it has not run yet.
    assert!(sleeps_in(thread, call), "it was woken");
    let reader = elsewhere(move || memory.read(0, &mut [0]).unwrap());
    assert!(finish(&result) > 0, "the fault was to end it");
    finish(&reader);
    Ok(())
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("poll: without O_NONBLOCK, nothing waiting", Done, || {
            assert_eq!(now(&blocking()), PollFlags::POLLERR);
            Ok(())
        }),
        row("poll: without O_NONBLOCK, a fault waiting", Done, || {
            let (uffd, memory) = (blocking(), pages(1, MappingKind::Private));
            register(&uffd, &memory, M);
            let reader = elsewhere(move || memory.read(0, &mut [0]).unwrap());
            until("the thread waits", || uffd.waiting().unwrap().pending == 1);
            assert_eq!(now(&uffd), PollFlags::POLLERR);
            drop(uffd);
            finish(&reader);
            Ok(())
        }),
        row("select: without O_NONBLOCK", Done, || {
            use nix::sys::select::{FdSet, select};
            use nix::sys::time::TimeVal;
            let uffd = blocking();
            let (mut reading, mut writing) = (FdSet::new(), FdSet::new());
            reading.insert(uffd.as_fd());
            writing.insert(uffd.as_fd());
            let ready = select(None, &mut reading, &mut writing, None, &mut TimeVal::new(0, 0))?;
            assert_eq!(ready, 2);
            Ok(())
        }),
        row("poll: nothing waiting", Done, || {
            assert_eq!(now(&World::private(M).uffd), PollFlags::empty());
            Ok(())
        }),
        row("poll: POLLIN while a fault is unread", Done, || {
            let world = World::private(M);
            let reader = world.reader(0);
            wait_readable(world.uffd.as_fd());
            assert_eq!(now(&world.uffd), PollFlags::POLLIN);
            fault(&world.uffd);
            assert_eq!(now(&world.uffd), PollFlags::empty(), "it was read");
            world.copy(0, 1)?;
            finish(&reader);
            Ok(())
        }),
        row("poll: POLLIN while an event is unread", Done, || {
            while_changing(|world| {
                assert_eq!(now(&world.uffd), PollFlags::POLLIN);
                Ok(())
            })
        }),
        row("poll: process gone, never POLLHUP", Done, || {
            assert_eq!(now(dead().expect("made before the first row")), PollFlags::empty());
            Ok(())
        }),
        row("epoll: level-triggered", Done, || {
            let world = World::private(M);
            let epoll = Epoll::of(&world.uffd, 0);
            assert_eq!(epoll.wait(0), 0);
            let reader = world.reader(0);
            assert_eq!(epoll.wait(10_000), 1);
            assert_eq!(epoll.wait(0), 1, "it is unread still");
            fault(&world.uffd);
            assert_eq!(epoll.wait(0), 0);
            world.copy(0, 1)?;
            finish(&reader);
            Ok(())
        }),
        row("epoll: edge-triggered, one edge per new fault", Done, || {
            let world = World::private(M);
            let epoll = Epoll::of(&world.uffd, libc::EPOLLET);
            let readers = [0, 1].map(|page| {
                let reader = world.reader(page);
                assert_eq!(epoll.wait(10_000), 1);
                assert_eq!(epoll.wait(0), 0, "one edge");
                reader
            });
            assert_eq!(world.uffd.read_events(&mut EventBuffer::new(4))?, 2);
            world.copy(0, 2)?;
            readers.iter().for_each(|reader| assert_eq!(finish(reader), 7));
            Ok(())
        }),
        row("poll: closing does not wake a sleeper", Done, || {
            closed_meanwhile(World::private(M).uffd, libc::SYS_ppoll, |fd| {
                let mut fds = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
                let (none, no_mask) = (std::ptr::null(), std::ptr::null());
                // SAFETY: the one structure lives across the call; without a time there is no limit.
                unsafe { libc::ppoll(&raw mut fds, 1, none, no_mask) }
            })
        }),
        row("read: closing does not wake a sleeper", Done, || {
            closed_meanwhile(blocking(), libc::SYS_read, |fd| {
                let mut message = [0_u8; 32];
                // SAFETY: room for as many bytes as are asked for.
                unsafe { libc::read(fd, message.as_mut_ptr().cast(), message.len()) as i32 }
            })
        }),
        row("epoll: a closed fd is dropped silently", Done, || {
            let world = World::private(M);
            let epoll = Epoll::of(&world.uffd, 0);
            let reader = world.reader(0);
            assert_eq!(epoll.wait(10_000), 1);
            drop(world);
            finish(&reader);
            assert_eq!(epoll.wait(0), 0);
            Ok(())
        }),
    ]
}
