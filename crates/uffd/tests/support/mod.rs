//! What every test here needs: a userfaultfd, memory, and threads that fault under a deadline.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use uffd::{
    CreateOptions, Event, EventBuffer, Factory, Fault, Features, Mapping, MappingKind, Modes, Userfaultfd,
};

/// Long enough for a busy machine; a test that waits this long has failed.
pub const DEADLINE: Duration = Duration::from_secs(10);
pub const PAGE: u64 = 4096;

/// A userfaultfd with these features, or a printed reason why not.
pub fn uffd(require: Features) -> Option<Userfaultfd> {
    match Factory::open().create(&CreateOptions { require, ..CreateOptions::default() }) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

pub fn pages(count: usize, kind: MappingKind) -> Mapping {
    Mapping::new(count * PAGE as usize, kind).unwrap()
}

/// A userfaultfd and private memory of `count` pages registered with it.
pub fn registered(count: usize, modes: Modes, require: Features) -> Option<(Userfaultfd, Mapping)> {
    let uffd = uffd(require)?;
    let mapping = pages(count, MappingKind::Private);
    register(&uffd, &mapping, modes);
    Some((uffd, mapping))
}

pub fn register(uffd: &Userfaultfd, mapping: &Mapping, modes: Modes) {
    // SAFETY: no reference to the mapping exists; tests touch it on threads of their own.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, modes) }.unwrap();
}

/// Does something on a thread that may wait for a page; the answer comes when it is done.
pub fn elsewhere<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, answer) = channel();
    std::thread::spawn(move || done.send(act()));
    answer
}

pub fn finish<T>(answer: &Receiver<T>) -> T {
    answer.recv_timeout(DEADLINE).expect("it still waits")
}

/// Reads messages until `count` are there.
pub fn events(uffd: &Userfaultfd, count: usize) -> Vec<Event> {
    let mut buffer = EventBuffer::new(16);
    let mut events = Vec::new();
    let until = Instant::now() + DEADLINE;
    while events.len() < count {
        assert!(Instant::now() < until, "{} of {count} messages came", events.len());
        if uffd.read_events(&mut buffer).unwrap() == 0 {
            std::thread::yield_now();
        }
        events.extend(buffer.drain());
    }
    events
}

pub fn fault(uffd: &Userfaultfd) -> Fault {
    match events(uffd, 1).remove(0) {
        Event::Fault(fault) => fault,
        other => panic!("{other:?}"),
    }
}

/// Forks on another thread; the child exits at once, and its number comes when it has.
///
/// By the bare system call: fork(3) holds the allocator's locks until the FORK event has been read, so a reader that
/// allocates would wait for ever.
pub fn fork_and_exit() -> Receiver<i32> {
    elsewhere(|| {
        // SAFETY: a plain fork; the child makes one more system call and nothing else.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: ends the child at once, without running anything of the parent's.
            unsafe { libc::_exit(0) };
        }
        let pid = i32::try_from(pid).unwrap();
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
        pid
    })
}

/// The userfaultfd of a child that has exited: from its FORK event.
pub fn of_the_dead() -> Option<Userfaultfd> {
    let parent = uffd(Features::EVENT_FORK)?;
    let memory = pages(1, MappingKind::Private);
    register(&parent, &memory, Modes::MISSING);
    let child = fork_and_exit();
    let Some(Event::Fork { child: of_child }) = events(&parent, 1).pop() else { panic!("no FORK event") };
    finish(&child);
    Some(of_child)
}
