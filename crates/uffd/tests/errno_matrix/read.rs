//! `read(2)`, mostly as the crate never issues it: with buffers of its own making.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc::Receiver;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use uffd::{CreateOptions, Event, EventBuffer, Factory, Features, MappingKind, Userfaultfd};
use userfaultfd_sys::{UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE};

use crate::processes::{sleeps_in, until};
use crate::support::{PAGE, elsewhere, events, finish, fork_and_exit, pages, registered};
use crate::tables::{Done, EFAULT, EINVAL, Fails, Outcome, Row, row, skipped};
use crate::world::{M, World, dead, wait_readable, while_changing};

fn read(uffd: &Userfaultfd, buffer: &mut [u8]) -> Result<usize, Errno> {
    nix::unistd::read(uffd.as_fd(), buffer)
}

/// Threads that each wait for a page of their own, in the order of the pages.
fn waiting(world: &World, count: u64) -> Vec<Receiver<u8>> {
    let one = |page| {
        let reader = world.reader(page);
        until("the thread waits", || world.uffd.waiting().unwrap().pending == page + 1);
        reader
    };
    (0..count).map(one).collect()
}

fn answer(world: &World, readers: &[Receiver<u8>]) -> Outcome {
    world.copy(0, readers.len() as u64)?;
    readers.iter().for_each(|reader| assert_eq!(finish(reader), 7));
    Ok(())
}

/// The address of a fault message.
fn address(message: &[u8]) -> u64 {
    assert_eq!(message[0], UFFD_EVENT_PAGEFAULT);
    u64::from_ne_bytes(message[16..24].try_into().unwrap())
}

fn with_one_waiting(act: impl FnOnce(&World) -> Outcome) -> Outcome {
    let world = World::private(M);
    let readers = waiting(&world, 1);
    let outcome = act(&world);
    answer(&world, &readers)?;
    outcome
}

pub(crate) fn blocking() -> Userfaultfd {
    let options = CreateOptions { non_blocking: false, ..CreateOptions::default() };
    Factory::open().create(&options).unwrap()
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("read: buffer of 31 bytes", EINVAL, || {
            with_one_waiting(|world| Ok(read(&world.uffd, &mut [0; 31]).map(drop)?))
        }),
        row("read: buffer of 0 bytes", EINVAL, || {
            with_one_waiting(|world| Ok(read(&world.uffd, &mut []).map(drop)?))
        }),
        row("read: buffer not a multiple of 32", Done, || {
            let world = World::private(M);
            let readers = waiting(&world, 3);
            let mut buffer = [0; 95];
            assert_eq!(read(&world.uffd, &mut buffer)?, 64);
            assert_eq!([address(&buffer), address(&buffer[32..])], [world.at(0), world.at(1)]);
            assert_eq!(world.uffd.waiting().unwrap().pending, 1);
            answer(&world, &readers)
        }),
        row("read: several waiting, faults first, in order of arrival", Done, || {
            while_changing(|world| {
                // The event is older than these.
                let readers = [world.reader(0)];
                until("the thread waits", || world.uffd.waiting().unwrap().pending == 1);
                let later = world.reader(1);
                until("the thread waits", || world.uffd.waiting().unwrap().pending == 2);
                let mut buffer = [0; 128];
                assert_eq!(read(&world.uffd, &mut buffer)?, 96);
                assert_eq!([address(&buffer), address(&buffer[32..])], [world.at(0), world.at(1)]);
                assert_eq!(buffer[64], UFFD_EVENT_REMOVE);
                // The reads above have taken what `while_changing` waits for: another one.
                until("the change is over", || world.copy(0, 2).is_ok());
                readers.iter().chain([&later]).for_each(|reader| assert_eq!(finish(reader), 7));
                discard_again(world);
                Ok(())
            })
        }),
        row("read: nothing, O_NONBLOCK", Fails(libc::EAGAIN), || {
            Ok(read(&World::private(M).uffd, &mut [0; 32]).map(drop)?)
        }),
        row("read: nothing, RWF_NOWAIT", Done, || {
            // The crate's own way: it never waits, even where the descriptor would.
            assert_eq!(blocking().read_events(&mut EventBuffer::new(4))?, 0);
            Ok(())
        }),
        row("read: nothing, blocking, sleeps for the first message only", Done, || {
            let memory = pages(8, MappingKind::Private);
            let uffd = blocking();
            crate::support::register(&uffd, &memory, M);
            let fd = uffd.as_fd().try_clone_to_owned().unwrap();
            let (tell, thread) = std::sync::mpsc::channel();
            let read = elsewhere(move || {
                tell.send(nix::unistd::gettid().as_raw()).unwrap();
                nix::unistd::read(&fd, &mut [0; 128]).unwrap()
            });
            let thread = finish(&thread);
            until("it sleeps in read", || sleeps_in(thread, libc::SYS_read));
            let toucher = elsewhere(move || {
                memory.read(0, &mut [0]).unwrap();
                memory
            });
            assert_eq!(finish(&read), 32);
            drop(uffd);
            drop(finish(&toucher));
            Ok(())
        }),
        row("read: interrupted by a signal without SA_RESTART", Fails(libc::EINTR), || {
            interrupting(Signal::SIGUSR1);
            let (uffd, (tell, thread)) = (blocking(), std::sync::mpsc::channel());
            let read = elsewhere(move || {
                // SAFETY: takes nothing.
                let pthread = unsafe { libc::pthread_self() };
                tell.send((nix::unistd::gettid().as_raw(), pthread)).unwrap();
                nix::unistd::read(uffd.as_fd(), &mut [0; 32])
            });
            let (thread, pthread) = finish(&thread);
            until("it sleeps in read", || sleeps_in(thread, libc::SYS_read));
            // SAFETY: the thread sleeps, so it exists.
            unsafe { libc::pthread_kill(pthread, libc::SIGUSR1) };
            Ok(finish(&read).map(drop)?)
        }),
        row("read: bad buffer pointer", EFAULT, || {
            let world = World::private(M);
            let reader = waiting(&world, 1).remove(0);
            let (fd, nowhere) = (world.uffd.as_fd().as_raw_fd(), std::ptr::without_provenance_mut(8));
            // SAFETY: nothing is mapped there, so nothing is written.
            let result = unsafe { libc::read(fd, nowhere, 32) };
            let outcome = Errno::result(result);
            // The message is lost: nobody will read it, but its thread sleeps on and is woken by an answer.
            assert_eq!(read(&world.uffd, &mut [0; 32]), Err(Errno::EAGAIN));
            assert_eq!(world.asleep(), 1);
            answer(&world, &[reader])?;
            Ok(outcome.map(drop)?)
        }),
        row("read: process gone", Done, || {
            let dead = dead().expect("made before the first row");
            assert_eq!(dead.read_events(&mut EventBuffer::new(4))?, 0);
            assert_eq!(read(dead, &mut [0; 32]), Err(Errno::EAGAIN));
            Ok(())
        }),
        row("read: readv with pieces of 16 bytes", Done, || {
            with_one_waiting(|world| {
                let (mut first, mut second) = ([0; 16], [0; 16]);
                let mut pieces = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
                assert_eq!(nix::sys::uio::readv(world.uffd.as_fd(), &mut pieces)?, 32);
                assert_eq!(address(&[first, second].concat()), world.at(0));
                Ok(())
            })
        }),
        row("read: a fault that was resolved before it was read", Done, || {
            let world = World::private(M);
            let reader = waiting(&world, 1).remove(0);
            wait_readable(world.uffd.as_fd());
            world.copy(0, 1)?;
            assert_eq!(finish(&reader), 7);
            assert_eq!(world.uffd.read_events(&mut EventBuffer::new(4))?, 0);
            Ok(())
        }),
    ]
}

/// A signal that does nothing but interrupt.
fn interrupting(signal: Signal) {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(signal, &action) }.unwrap();
}

/// Makes one more event, which somebody else reads.
fn discard_again(world: &World) {
    let memory = std::sync::Arc::clone(&world.memory);
    drop(elsewhere(move || memory.discard(6 * PAGE as usize, PAGE as usize).unwrap()));
}

/// In a process of its own: no other thread may need a descriptor meanwhile.
pub(crate) fn rows_at_the_limit() -> Vec<Row> {
    vec![row("read: FORK event but no free fd", Done, || {
        let Some((uffd, _memory)) = registered(1, M, Features::EVENT_FORK) else {
            return skipped("EVENT_FORK is not permitted");
        };
        let mut buffer = EventBuffer::new(4);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let child = fork_and_exit();
        wait_readable(uffd.as_fd());
        // All descriptors that are open lie below: none is free.
        let next = uffd.as_fd().try_clone_to_owned().unwrap().as_raw_fd();
        setrlimit(Resource::RLIMIT_NOFILE, next as u64, hard)?;

        let refused = uffd.read_events(&mut buffer);
        wait_readable(uffd.as_fd());
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;

        assert_eq!(refused.map_err(|error| error.errno()), Err(Some(libc::EMFILE)));
        assert!(matches!(events(&uffd, 1).remove(0), Event::Fork { .. }), "the event stays queued");
        finish(&child);
        Ok(())
    })]
}
