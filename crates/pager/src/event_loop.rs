//! The thread that serves: epoll over its sessions, their processes, its listening sockets and handshakes.
//!
//! It never waits for a disk (workers do), for a lock that a faulting thread could hold (there is none), or for
//! JavaScript (which is only told). Every turn goes: requests, finished reads and whatever is readable is read, then each
//! session's faults are answered for a slice of time (also those whose pause is over), and it takes one step if it is ending.

mod ahead;
mod announcing;
mod asking;
mod connections;
mod forked;
mod holding;
mod keeping;
mod lent;
mod recordings;
mod token;
mod waiting;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use announcing::Standing;
use lent::Lent;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use recordings::{Burial, Unwritten};
use token::Token;

use crate::error::PagerError;
use crate::keep::Keeper;
use crate::mailbox::{Inbox, Mailbox};
use crate::notice::Observer;
use crate::offer::Offer;
use crate::pager::Message;
use crate::policy::{EndReason, Rest};
use crate::server::{Pending, Server};
use crate::session::{Context, Session};
use crate::spin::Spin;
use crate::sweep::Next;

/// Readiness events per turn.
const EVENTS_PER_TURN: usize = 64;
/// After a panic of the loop: how long its sessions are given to be poisoned or killed.
const LAST_RITES: Duration = Duration::from_secs(5);

/// The server of sessions that came without one.
const NO_SERVER: u64 = 0;

struct Entry {
    session: Session,
    server: u64,
    observer: Arc<dyn Observer>,
    standing: Standing,
}

pub(crate) struct EventLoop {
    epoll: Epoll,
    timer: TimerFd,
    inbox: Inbox<Message>,
    servers: HashMap<u64, Server>,
    handshakes: HashMap<u64, Pending>,
    /// Whose image somebody was asked for.
    asking: HashMap<u64, Offer>,
    /// Connections that the keeper has, and no session of them.
    kept_connections: HashSet<u64>,
    sessions: HashMap<u64, Entry>,
    /// Sessions to look at before sleeping: something happened to them, or they wait for a moment to come.
    /// Idle ones cost nothing, however many there are.
    restless: HashSet<u64>,
    /// Their order in one turn; kept only for its memory.
    turns: Vec<u64>,
    /// Sessions whose process nothing tells the end of: they are asked from time to time, by this timer.
    unwatched: HashSet<u64>,
    probe: TimerFd,
    lent: Lent,
    /// Held sessions whose events could not be read, and when that is tried again.
    unreadable: HashMap<u64, Instant>,
    /// Sessions that bring pages ahead.
    ahead: BTreeSet<u64>,
    /// The one that had its turn last.
    last_ahead: u64,
    /// Pieces brought ahead since a fault was answered that no stream had foreseen.
    calm: u32,
    base_page_size: u64,
    keeper: Option<Arc<dyn Keeper>>,
    spin: Spin,
    /// Recordings that are being brought to their end.
    unwritten: HashMap<u64, Unwritten>,
    mailbox: Mailbox<Message>,
    stopping: bool,
}

impl EventLoop {
    pub(crate) fn new(
        inbox: Inbox<Message>,
        mailbox: Mailbox<Message>,
        workers: usize,
        keeper: Option<Arc<dyn Keeper>>,
    ) -> Result<Self, PagerError> {
        let failed = |syscall| move |errno| PagerError::System { syscall, errno };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("epoll_create1"))?;
        let new_timer = || {
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
                .map_err(failed("timerfd_create"))
        };
        let (timer, probe) = (new_timer()?, new_timer()?);
        for (fd, token) in [
            (inbox.bell().as_fd(), Token::Wake),
            (timer.as_fd(), Token::Timer),
            (probe.as_fd(), Token::Probe),
        ] {
            watch(&epoll, fd, token).map_err(failed("epoll_ctl"))?;
        }
        let completed = mailbox.clone();
        let deliver = Arc::new(move |completion| completed.send(Message::Completed(completion)));
        let mut lent = Lent::new(workers, deliver);
        lent.keep_spare(epoll.0.as_fd());
        Ok(Self {
            epoll,
            timer,
            inbox,
            servers: HashMap::new(),
            handshakes: HashMap::new(),
            asking: HashMap::new(),
            kept_connections: HashSet::new(),
            sessions: HashMap::new(),
            restless: HashSet::new(),
            turns: Vec::new(),
            unwatched: HashSet::new(),
            probe,
            lent,
            base_page_size: uffd::page_size() as u64,
            keeper,
            unreadable: HashMap::new(),
            ahead: BTreeSet::new(),
            last_ahead: 0,
            calm: u32::MAX,
            spin: Spin::new(),
            unwritten: HashMap::new(),
            mailbox,
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
        while !(self.stopping && self.is_empty()) {
            let timeout = self.settle();
            let count = match self.wait(&mut ready, timeout) {
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
            Token::Uffd(id) => {
                self.with_session(id, |session, cx| {
                    if flags.contains(EpollFlags::EPOLLERR) {
                        // The descriptor's flags are shared with the peer, who has made it blocking.
                        session.restore_nonblocking();
                    }
                    session.read(cx);
                });
                self.pause_reading(id);
            }
            Token::Process(id) if self.asking.contains_key(&id) => self.asked_is_gone(id),
            Token::Process(id) => self.with_session(id, |session, _| session.phase.peer_gone()),
            Token::Probe => self.probe_unwatched(),
        }
    }

    fn with_session(&mut self, id: u64, act: impl FnOnce(&mut Session, &mut Context<'_>)) {
        let alone = self.sessions.len() <= 1;
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        self.restless.insert(id);
        act(&mut entry.session, &mut self.lent.context(alone));
    }

    fn take_requests(&mut self) {
        // Emptied before the requests are taken: one that comes in between wakes the loop again.
        self.inbox.silence();
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Serve(server) => self.add_server(*server),
                Message::Adopt(adopted) => self.adopt(adopted.0, &adopted.1),
                Message::TakeOver(taken) => self.take_over(taken.0, taken.1, taken.2),
                Message::Connection(id, socket, to) => self.take_connection(id, socket, to),
                Message::Answer { id, image } => self.answer(id, image),
                Message::CloseServer { id, rest } => self.close_server(id, rest),
                Message::ConfigureServer { id, options } => {
                    if let Some(server) = self.servers.get_mut(&id) {
                        server.options = *options;
                    }
                }
                Message::CloseSession { id, rest } => self.with_session(id, |session, _| session.close(rest)),
                Message::DrainServer { id } => self.drain_server(id),
                Message::TakeDirty { id, most, answer } => {
                    self.with_session(id, |session, _| session.take_dirty(most, answer));
                }
                Message::Populate { id, request, options, answer } => {
                    self.with_session(id, |session, _| session.populate(request, options, answer));
                }
                Message::Detach { id, answer } => self.with_session(id, |session, _| session.detach(answer)),
                Message::CancelPopulate { id, request } => {
                    self.with_session(id, |session, _| session.cancel_populate(request));
                }
                Message::Hold { id, answer } => self.with_session(id, |session, _| session.hold(answer)),
                Message::Resume { id, source, answer } => {
                    self.with_session(id, |session, _| session.resume(source, answer));
                }
                Message::Decide { id, policy } => {
                    self.with_session(id, |session, _| session.decide(policy));
                }
                Message::AbandonServer { id } => self.abandon_server(id),
                Message::StopRecording { id, answer } => self.stop_recording(id, answer),
                Message::AwaitReplay { id, answer } => {
                    self.with_session(id, |session, _| session.await_replay(answer));
                }
                Message::Recorded { id } => self.recording_over(id),
                Message::Completed(completion) => {
                    self.with_session(completion.job.session, |session, cx| session.complete(completion, cx));
                }
                Message::Then(act) => act(),
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
        let alone = self.sessions.len() <= 1;
        let mut turns = std::mem::take(&mut self.turns);
        turns.extend(self.restless.iter().copied());
        // Who has one fault waiting goes before who has many: a storm waits for the others, not they for it.
        turns.sort_by_key(|id| self.sessions.get(id).map_or(0, |entry| entry.session.faults_waiting()));
        for (nth, id) in turns.drain(..).enumerate() {
            let Some(entry) = self.sessions.get_mut(&id) else {
                self.restless.remove(&id);
                continue;
            };
            let mut cx = self.lent.context(alone);
            let retried = entry.session.retry(now, &mut cx);
            let turn = if nth == 0 && !retried { now } else { Instant::now() };
            let queued = entry.session.queue.len();
            let unanswered = entry.session.answer_queued(turn, &mut cx);
            if entry.session.window.foreseen() < queued {
                self.calm = 0;
            }
            // After the answers, which start reads.
            let overdue = entry.session.check_reads(now, &mut cx);
            busy |= unanswered;
            let next = entry.session.step(now, &mut cx);
            if let Some(notice) = entry.session.take_news() {
                entry.observer.notice(notice);
            }
            if entry.session.has_ahead() {
                self.ahead.insert(id);
            }
            if entry.session.ended().is_some() {
                self.restless.remove(&id);
                over.push(id);
                continue;
            }
            let parked = entry.session.deferred.due().filter(|_| entry.session.phase.answers());
            if let Some(moment) = parked {
                soonest = earlier(soonest, moment);
            }
            match next {
                Next::Now => busy = true,
                Next::At(moment) => soonest = earlier(soonest, moment),
                Next::Idle if unanswered || parked.is_some() || overdue.is_some() => {}
                Next::Idle => {
                    self.restless.remove(&id);
                }
            }
            if let Some(moment) = overdue {
                soonest = earlier(soonest, moment);
            }
        }
        self.turns = turns;
        // Faults first, of all sessions.
        if !busy {
            busy = self.bring_ahead(now, &mut soonest);
        }
        // Forked while faults were tried again. Before their parents are buried, who else might be the last of a server.
        busy |= !self.lent.forked.is_empty();
        self.adopt_forked();
        for id in over {
            self.bury(id);
        }
        // Those that have ended have given one back.
        self.lent.keep_spare(self.epoll.0.as_fd());
        self.time_out_handshakes(now, &mut soonest);
        self.time_out_questions(now, &mut soonest);
        self.resume_accepting(now, &mut soonest);
        self.resume_reading(now, &mut soonest);
        self.drop_closed_servers();
        self.give_up_recordings(now, &mut soonest);
        if self.stopping && self.is_empty() {
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
        let Some(Entry { mut session, server, observer, standing }) = self.sessions.remove(&id) else {
            return;
        };
        self.ahead.remove(&id);
        self.unreadable.remove(&id);
        // Explicitly: the peer may hold the same open file, and epoll would go on watching it.
        unwatch(&self.epoll, session.as_fd());
        self.stop_probing(id);
        if let Some(process) = &session.process {
            unwatch(&self.epoll, process.as_fd());
        }
        let Some((end, leave_open)) = session.ended() else { return };
        session.info.stats.unanswered.add(session.faults_waiting() as u64);
        session.drop_reads();
        // Everything of it is closed by the time anybody hears of its end.
        let Session { uffd, process, connection, source, backing, info, recorder, kept, .. } = session;
        if leave_open {
            // Closing it would give zeros to every thread that waits. It stays open, on purpose, until this
            // process ends.
            std::mem::forget(uffd);
        } else {
            drop(uffd);
        }
        drop((process, connection, source, backing));
        if let Some(keeper) = kept.as_ref().and_then(|kept| kept.keeper()) {
            keeper.forget(id, &end, leave_open);
        }
        self.forget_connection(id);
        let refused = standing.is_refused();
        let notice = standing.ended(id, server, info.peer, end);
        self.announce_when_recorded(id, Burial { server, observer, notice, refused }, recorder, &info);
    }

    fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.sessions.is_empty() && self.unwritten.is_empty()
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
        while !(self.sessions.is_empty() && self.unwritten.is_empty()) && Instant::now() < deadline {
            self.take_requests();
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
