//! A thread that reads the messages of a userfaultfd until it is told to stop.

use std::io::{PipeWriter, pipe};
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{Event, EventBuffer, Fault, FaultKind, Userfaultfd};

/// Faults that were answered, by kind.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    pub missing: usize,
    pub minor: usize,
    pub write_protect: usize,
}

impl Faults {
    pub fn count(&mut self, fault: &Fault) {
        match fault.kind {
            FaultKind::Missing => self.missing += 1,
            FaultKind::Minor => self.minor += 1,
            FaultKind::WriteProtect => self.write_protect += 1,
        }
    }
}

pub struct Server {
    stop: PipeWriter,
    thread: JoinHandle<Faults>,
}

impl Server {
    /// Answers faults by calling `answer`, which is to resolve them. No other message may come.
    pub fn start(uffd: &'static Userfaultfd, mut answer: impl FnMut(Fault) + Send + 'static) -> Self {
        let (stopped, stop) = pipe().unwrap();
        let thread = std::thread::spawn(move || {
            let mut buffer = EventBuffer::new(16);
            let mut faults = Faults::default();
            loop {
                let readable = wait(uffd, stopped.as_fd());
                if uffd.read_events(&mut buffer).unwrap() == 0 && !readable {
                    return faults;
                }
                for event in buffer.drain() {
                    let Event::Fault(fault) = event else { panic!("{event:?}") };
                    faults.count(&fault);
                    answer(fault);
                }
            }
        });
        Self { stop, thread }
    }

    /// Ends it; tells what it answered.
    pub fn stop(self) -> Faults {
        drop(self.stop);
        self.thread.join().unwrap()
    }
}

/// Waits for a message, or for the end: then only it is ready.
pub fn wait(uffd: &Userfaultfd, stopped: std::os::fd::BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN), PollFd::new(stopped, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::NONE).unwrap();
    let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
    ready(&fds[0])
}
