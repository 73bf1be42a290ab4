//! The thread that serves: epoll over its sessions, their processes, its listening sockets and handshakes.
//!
//! It never waits for a disk (workers do), for a lock that a faulting thread could hold (there is none), or for
//! JavaScript (which is only told). Every turn goes: requests and finished reads, then what is readable, then
//! faults whose pause is over, then one step of each session that is ending.

mod connections;
mod forked;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use uffd::EventBuffer;

use crate::error::PagerError;
use crate::notice::{Notice, Observer};
use crate::pager::{Mailbox, Message};
use crate::policy::{EndReason, Rest};
use crate::server::{Pending, Server};
use crate::session::{Context, Session};
use crate::sweep::Next;
use crate::workers::Workers;

/// Messages per read(2). One faulting thread needs one; many threads overlap.
const MESSAGES_PER_READ: usize = 64;
/// The largest window, and a huge page.
const STAGING: usize = 2 << 20;
/// Readiness events per turn.
const EVENTS_PER_TURN: usize = 64;
/// After a panic of the loop: how long its sessions are given to be poisoned or killed.
const LAST_RITES: Duration = Duration::from_secs(5);

/// Where bytes rest between the source and the other process's memory. Page-aligned: copying in and out of an
/// unaligned buffer takes a quarter longer.
struct Staging {
    bytes: Vec<u8>,
    aligned: usize,
}

impl Staging {
    fn new() -> Self {
        let page = uffd::page_size();
        // Never resident beyond what is used: it comes zeroed from the allocator.
        let bytes = vec![0; STAGING + page];
        let aligned = bytes.as_ptr().align_offset(page).min(page);
        Self { bytes, aligned }
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.aligned..self.aligned + STAGING).unwrap_or_default()
    }
}

/// What an epoll event is about: an id, and in its low bits what kind of thing has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Wake,
    Timer,
    Listener(u64),
    Handshake(u64),
    Uffd(u64),
    Process(u64),
    Probe,
}

impl Token {
    fn encode(self) -> u64 {
        let (id, kind) = match self {
            Self::Wake => (0, 0),
            Self::Timer => (0, 1),
            Self::Listener(id) => (id, 2),
            Self::Handshake(id) => (id, 3),
            Self::Uffd(id) => (id, 4),
            Self::Process(id) => (id, 5),
            Self::Probe => (0, 6),
        };
        id << 3 | kind
    }

    fn decode(data: u64) -> Self {
        let id = data >> 3;
        match data & 7 {
            0 => Self::Wake,
            1 => Self::Timer,
            2 => Self::Listener(id),
            3 => Self::Handshake(id),
            4 => Self::Uffd(id),
            6 => Self::Probe,
            _ => Self::Process(id),
        }
    }
}

/// The server of sessions that came without one.
const NO_SERVER: u64 = 0;

struct Entry {
    session: Session,
    server: u64,
    observer: Arc<dyn Observer>,
}

pub(crate) struct EventLoop {
    epoll: Epoll,
    timer: TimerFd,
    mailbox: Mailbox,
    requests: Receiver<Message>,
    workers: Workers,
    servers: HashMap<u64, Server>,
    handshakes: HashMap<u64, Pending>,
    sessions: HashMap<u64, Entry>,
    /// Sessions to look at before sleeping: something happened to them, or they wait for a moment to come.
    /// Idle ones cost nothing, however many there are.
    restless: HashSet<u64>,
    /// Sessions of children that were forked, and of which session, until they are taken over.
    forked: Vec<(u64, Session)>,
    /// Sessions whose process nothing tells the end of: they are asked from time to time, by this timer.
    unwatched: HashSet<u64>,
    probe: TimerFd,
    events: EventBuffer,
    staging: Staging,
    base_page_size: u64,
    stopping: bool,
}

impl EventLoop {
    pub(crate) fn new(
        requests: Receiver<Message>,
        mailbox: Mailbox,
        workers: usize,
    ) -> Result<Self, PagerError> {
        let failed = |syscall| move |errno| PagerError::System { syscall, errno };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("epoll_create1"))?;
        let new_timer = || {
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
                .map_err(failed("timerfd_create"))
        };
        let (timer, probe) = (new_timer()?, new_timer()?);
        for (fd, token) in [
            (mailbox.wake().as_fd(), Token::Wake),
            (timer.as_fd(), Token::Timer),
            (probe.as_fd(), Token::Probe),
        ] {
            watch(&epoll, fd, token).map_err(failed("epoll_ctl"))?;
        }
        let deliver = {
            let mailbox = mailbox.clone();
            Arc::new(move |completion| mailbox.send(Message::Completed(completion)))
        };
        Ok(Self {
            epoll,
            timer,
            mailbox,
            requests,
            workers: Workers::new(workers, deliver),
            servers: HashMap::new(),
            handshakes: HashMap::new(),
            sessions: HashMap::new(),
            restless: HashSet::new(),
            forked: Vec::new(),
            unwatched: HashSet::new(),
            probe,
            events: EventBuffer::new(MESSAGES_PER_READ),
            staging: Staging::new(),
            base_page_size: uffd::page_size() as u64,
            stopping: false,
        })
    }

    /// Serves until told to stop and everything is closed. A panic ends every session by its policy.
    pub(crate) fn run(mut self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.turns())) {
            let message = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("unknown panic");
            let error = PagerError::Internal(message.to_owned());
            // A second panic in here ends the thread; the sessions' uffds are then closed with it.
            let _ = catch_unwind(AssertUnwindSafe(|| self.last_rites(&error)));
        }
    }

    fn turns(&mut self) {
        let mut ready = [EpollEvent::empty(); EVENTS_PER_TURN];
        while !(self.stopping && self.servers.is_empty() && self.sessions.is_empty()) {
            let timeout = self.settle();
            let count = match self.epoll.wait(&mut ready, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                // The descriptors are this loop's own: any other errno would be a mistake of this file.
                Err(errno) => {
                    self.fail_all(&PagerError::System { syscall: "epoll_wait", errno });
                    return;
                }
            };
            for event in ready.iter().take(count) {
                self.dispatch(Token::decode(event.data()), event.events());
            }
        }
    }

    fn dispatch(&mut self, token: Token, flags: EpollFlags) {
        match token {
            Token::Wake => self.take_requests(),
            // Only there to end the wait: whose time has come is looked up each turn.
            Token::Timer => {
                let _ = self.timer.wait();
            }
            Token::Listener(id) => self.accept(id),
            Token::Handshake(id) => self.shake_hands(id),
            Token::Uffd(id) => self.with_session(id, |session, cx| {
                if flags.contains(EpollFlags::EPOLLERR) {
                    // The descriptor's flags are shared with the peer, who has made it blocking.
                    session.restore_nonblocking();
                }
                session.serve(cx);
            }),
            Token::Process(id) => self.with_session(id, |session, _| session.phase.peer_gone()),
            Token::Probe => self.probe_unwatched(),
        }
    }

    fn with_session(&mut self, id: u64, act: impl FnOnce(&mut Session, &mut Context<'_>)) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        self.restless.insert(id);
        let mut cx = Context {
            events: &mut self.events,
            staging: self.staging.bytes(),
            workers: &self.workers,
            forked: &mut self.forked,
        };
        act(&mut entry.session, &mut cx);
    }

    fn take_requests(&mut self) {
        // Emptied before the requests are taken: one that comes in between wakes the loop again.
        let _ = self.mailbox.wake().read();
        while let Ok(message) = self.requests.try_recv() {
            match message {
                Message::Serve(server) => self.add_server(*server),
                Message::Adopt(adopted) => self.adopt(adopted.0, &adopted.1),
                Message::CloseServer { id, rest } => self.close_server(id, rest),
                Message::CloseSession { id, rest } => self.with_session(id, |session, _| session.close(rest)),
                Message::TakeDirty { id, most, deliver } if self.sessions.contains_key(&id) => {
                    self.with_session(id, |session, _| session.take_dirty(most, deliver));
                }
                Message::TakeDirty { deliver, .. } => deliver(Err(PagerError::SessionOver)),
                Message::AbandonServer { id } => self.abandon_server(id),
                Message::Completed(completion) => {
                    self.with_session(completion.job.session, |session, cx| session.complete(completion, cx));
                }
                Message::Stop => {
                    self.stopping = true;
                    let ids: Vec<u64> = self.servers.keys().copied().collect();
                    for id in ids {
                        self.close_server(id, Rest::Poison);
                    }
                    self.close_server(NO_SERVER, Rest::Poison);
                }
            }
        }
    }

    /// Everything that happens by itself, and how long the loop may sleep afterwards.
    fn settle(&mut self) -> EpollTimeout {
        self.adopt_forked();
        let now = Instant::now();
        let mut soonest: Option<Instant> = None;
        let mut busy = false;
        let mut over = Vec::new();
        self.restless.retain(|&id| {
            let Some(entry) = self.sessions.get_mut(&id) else { return false };
            let mut cx = Context {
                events: &mut self.events,
                staging: self.staging.bytes(),
                workers: &self.workers,
                forked: &mut self.forked,
            };
            entry.session.retry(now, &mut cx);
            let next = entry.session.step(now, &mut cx);
            if entry.session.ended().is_some() {
                over.push(id);
                return false;
            }
            let parked = entry.session.deferred.due().filter(|_| entry.session.phase.answers());
            if let Some(moment) = parked {
                soonest = earlier(soonest, moment);
            }
            match next {
                Next::Now => busy = true,
                Next::At(moment) => soonest = earlier(soonest, moment),
                Next::Idle => return parked.is_some(),
            }
            true
        });
        // Forked while faults were tried again. Before their parents are buried, who else might be the last of a server.
        busy |= !self.forked.is_empty();
        self.adopt_forked();
        for id in over {
            self.bury(id);
        }
        self.time_out_handshakes(now, &mut soonest);
        self.resume_accepting(now, &mut soonest);
        self.drop_closed_servers();
        if self.stopping && self.servers.is_empty() && self.sessions.is_empty() {
            busy = true;
        }
        match soonest {
            _ if busy => EpollTimeout::ZERO,
            Some(moment) if moment <= now => EpollTimeout::ZERO,
            Some(moment) => self.sleep_until(moment, now),
            None => EpollTimeout::NONE,
        }
    }

    /// epoll's own timeout has a resolution of a millisecond, and pauses are shorter.
    fn sleep_until(&self, moment: Instant, now: Instant) -> EpollTimeout {
        let pause = TimeSpec::from_duration(moment.saturating_duration_since(now));
        match self.timer.set(Expiration::OneShot(pause), TimerSetTimeFlags::empty()) {
            Ok(()) => EpollTimeout::NONE,
            Err(_) => EpollTimeout::from(1_u8),
        }
    }

    /// Closes a session that is over, and tells.
    fn bury(&mut self, id: u64) {
        let Some(Entry { session, server, observer }) = self.sessions.remove(&id) else { return };
        // Explicitly: the peer may hold the same open file, and epoll would go on watching it.
        unwatch(&self.epoll, session.as_fd());
        self.stop_probing(id);
        if let Some(process) = &session.process {
            unwatch(&self.epoll, process.as_fd());
        }
        if let Some(server) = self.servers.get_mut(&server) {
            server.alive -= 1;
        }
        let Some((end, leave_open)) = session.ended() else { return };
        // Everything of it is closed by the time anybody hears of its end.
        let Session { uffd, process, connection, .. } = session;
        if leave_open {
            // Closing it would give zeros to every thread that waits. It stays open, on purpose, until this
            // process ends.
            std::mem::forget(uffd);
        } else {
            drop(uffd);
        }
        drop((process, connection));
        observer.notice(Notice::SessionEnded { id, end });
    }

    fn fail_all(&mut self, error: &PagerError) {
        let ids: Vec<u64> = self.servers.keys().copied().collect();
        for id in ids {
            self.close_server(id, Rest::Poison);
        }
        for (&id, entry) in &mut self.sessions {
            self.restless.insert(id);
            entry.session.fail(EndReason::PagerLost, error.clone());
        }
    }

    /// The loop is broken: every session is put through its policy without waiting for events.
    fn last_rites(&mut self, error: &PagerError) {
        self.fail_all(error);
        let deadline = Instant::now() + LAST_RITES;
        while !self.sessions.is_empty() && Instant::now() < deadline {
            let _ = self.settle();
            std::thread::yield_now();
        }
    }
}

fn watch(epoll: &Epoll, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token.encode()))
}

/// Fails only for what was not watched.
fn unwatch(epoll: &Epoll, fd: BorrowedFd<'_>) {
    let _ = epoll.delete(fd);
}

fn earlier(soonest: Option<Instant>, moment: Instant) -> Option<Instant> {
    Some(soonest.map_or(moment, |soonest| soonest.min(moment)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_way_through_epoll() {
        for token in [
            Token::Wake,
            Token::Timer,
            Token::Listener(7),
            Token::Handshake(8),
            Token::Uffd(1 << 50),
            Token::Process(9),
            Token::Probe,
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
