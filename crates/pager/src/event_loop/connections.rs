//! How sessions come to be: listening sockets, connections, handshakes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use uffd::errno_of;
use uffd::limit_behind;

use super::announcing::Standing;
use super::{Entry, EventLoop, NO_SERVER, Token, earlier, unwatch, watch};
use crate::error::PagerError;
use crate::firecracker::Handshake;
use crate::notice::{Notice, Observer};
use crate::pager::next_id;
use crate::policy::{EndReason, Rest};
use crate::server::{Image, Images, Pending, Server, ServerOptions};
use crate::session::{Parts, Session};
use crate::supervise::Peer;

/// Connections taken per turn, so that a storm of them does not hold up faults.
const ACCEPTS_PER_TURN: usize = 16;
/// Connections that can wait to be accepted (SOMAXCONN).
const MOST_WAITING: usize = 4096;
/// Handshakes that descriptors are kept free for.
const MOST_ROOM: usize = 32;
/// A connection that is not accepted, for want of a descriptor or of room, stays in the queue and would be reported for ever.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl EventLoop {
    pub(super) fn add_server(&mut self, server: Server) {
        if let Some(listener) = &server.listener
            && let Err(errno) = watch(&self.epoll, listener.as_fd(), Token::Listener(server.id))
        {
            let error = PagerError::System { syscall: "epoll_ctl", errno };
            server.observer.notice(Notice::Rejected { asked: None, peer: None, error });
        }
        self.servers.insert(server.id, server);
    }

    /// Memory that came without a handshake.
    pub(super) fn adopt(&mut self, parts: Parts, observer: &Arc<dyn Observer>) {
        let session = Session::new(parts, self.base_page_size);
        self.adopt_session(session, NO_SERVER, observer);
    }

    /// A session that has begun already, whatever happens here: its process is running.
    pub(super) fn adopt_session(&mut self, mut session: Session, server: u64, observer: &Arc<dyn Observer>) {
        let id = session.info.id;
        if let Err(error) = self.keep(&mut session, server) {
            session.fail(EndReason::PagerLost, error);
        }
        if let Err(error) = self.watch_session(&session) {
            // Not a moment without somebody who answers: it ends by its policy, which needs no events.
            session.fail(EndReason::Exhausted, error);
        }
        if session.process.is_none() && !session.own {
            self.start_probing(id);
        }
        if let Some(server) = self.servers.get_mut(&server) {
            server.alive += 1;
        }
        self.start_recording(&mut session);
        self.restless.insert(id);
        let (observer, standing) = (Arc::clone(observer), Standing::Unannounced { asked: false });
        self.sessions.insert(id, Entry { session, server, observer, standing });
        self.announce(id);
    }

    pub(super) fn close_server(&mut self, id: u64, rest: Rest) {
        self.stop_listening(id, &PagerError::Closed);
        for (&id, entry) in self.sessions.iter_mut().filter(|(_, entry)| entry.server == id) {
            self.restless.insert(id);
            entry.session.close(rest);
        }
    }

    /// Who has connected before is served to its end; who has not will find nobody.
    pub(super) fn drain_server(&mut self, id: u64) {
        for _ in 0..MOST_WAITING {
            if !self.accept_one(id) {
                break;
            }
        }
        if let Some(server) = self.servers.get_mut(&id) {
            server.listener = None;
        }
    }

    /// Nobody is served any more who is not yet.
    fn stop_listening(&mut self, id: u64, why: &PagerError) {
        // Who has connected before waits for an answer.
        self.drain_server(id);
        let begun: Vec<u64> =
            self.handshakes.iter().filter(|(_, pending)| pending.server == id).map(|(&id, _)| id).collect();
        for pending in begun {
            self.cut_short(pending, why);
        }
        self.drop_questions(id, why);
    }

    /// Takes what has arrived of a handshake, and turns its process away.
    pub(super) fn cut_short(&mut self, id: u64, why: &PagerError) {
        let Some(pending) = self.handshakes.get_mut(&id) else { return };
        let received = pending.receive(self.base_page_size);
        if pending.refusal.is_none() {
            pending.refusal = Some(why.clone());
            if let Some(server) = self.servers.get_mut(&pending.server) {
                server.refused += 1;
            }
        }
        match received {
            Ok(Some(handshake)) => self.complete(id, handshake),
            Ok(None) | Err(_) => self.reject(id, why.clone()),
        }
    }

    /// The owner is going away without having closed it: every session meets its failure policy.
    pub(super) fn abandon_server(&mut self, id: u64) {
        let error = PagerError::Abandoned;
        for (&session, entry) in self.sessions.iter_mut().filter(|(_, entry)| entry.server == id) {
            self.restless.insert(session);
            entry.session.fail(EndReason::PagerLost, error.clone());
        }
        self.stop_listening(id, &error);
    }

    /// Takes connections that have come, some at a time.
    pub(super) fn accept(&mut self, id: u64) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(server) = self.servers.get_mut(&id) else { return };
            if server.is_full() {
                // Closed unheard, their processes would wait for ever. The queue they wait in has a limit of its own.
                self.pause_accepting(id);
                return;
            }
            if !self.accept_one(id) {
                return;
            }
        }
    }

    /// Takes a connection. Whether there was one.
    fn accept_one(&mut self, id: u64) -> bool {
        let room = self.has_room();
        let Some(server) = self.servers.get_mut(&id) else { return false };
        let Some(listener) = &server.listener else { return false };
        match room.and_then(|()| listener.accept()) {
            Ok(None) => return false,
            Ok(Some(socket)) => self.welcome(next_id(), id, socket, false),
            Err(errno) => {
                let limit = limit_behind("accept4", errno as i32).unwrap_or_default();
                let error =
                    PagerError::Exhausted(format!("a connection could not be accepted: {errno}. {limit}"));
                server.observer.notice(Notice::Rejected { asked: None, peer: None, error });
                self.pause_accepting(id);
                return false;
            }
        }
        true
    }

    /// Begins to listen to a connection. `again`: an earlier process had it.
    pub(super) fn welcome(&mut self, id: u64, server: u64, socket: OwnedFd, again: bool) {
        let Some(of) = self.servers.get(&server) else { return };
        let label = of.options.label.clone();
        match of.greet(socket, Instant::now()) {
            Ok(mut pending) => {
                pending.asked = again;
                if let Err(error) = self.keep_connection(id, label, &mut pending, again) {
                    pending.refusal.get_or_insert(error);
                }
                self.add_handshake(id, pending);
            }
            Err(error) => {
                of.observer.notice(Notice::Rejected { asked: None, peer: None, error });
                if again {
                    self.kept_connections.insert(id);
                    self.forget_connection(id);
                }
            }
        }
    }

    /// Whether descriptors are free for a connection and for what will come of those that have begun. One that comes with a
    /// message and finds no room is lost, and with it every means to tell its process anything.
    fn has_room(&self) -> Result<(), Errno> {
        let wanted = 4 + 2 * self.handshakes.len().min(MOST_ROOM);
        let taken: Result<Vec<_>, _> =
            (0..wanted).map(|_| self.epoll.0.as_fd().try_clone_to_owned()).collect();
        taken.map(drop).map_err(|error| errno_of(&error))
    }

    /// Connections wait on; so does this loop, instead of being told about them without end.
    fn pause_accepting(&mut self, id: u64) {
        let Some(server) = self.servers.get_mut(&id) else { return };
        let Some(listener) = &server.listener else { return };
        unwatch(&self.epoll, listener.as_fd());
        server.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
    }

    fn add_handshake(&mut self, id: u64, pending: Pending) {
        let flags = if pending.peeks {
            // What was peeked at stays there, and would be reported for ever.
            EpollFlags::EPOLLIN | EpollFlags::EPOLLET
        } else {
            EpollFlags::EPOLLIN
        };
        let watched = self.epoll.add(pending.as_fd(), EpollEvent::new(flags, Token::Handshake(id).encode()));
        if let Err(errno) = watched {
            let error = PagerError::System { syscall: "epoll_ctl", errno };
            let (server, peer) = (pending.server, Peer::from(pending.credentials));
            drop(pending);
            return self.tell_rejected(id, server, peer, false, error);
        }
        let Some(server) = self.servers.get_mut(&pending.server) else { return };
        server.alive += 1;
        server.refused += usize::from(pending.refusal.is_some());
        self.handshakes.insert(id, pending);
    }

    pub(super) fn shake_hands(&mut self, id: u64) {
        let Some(pending) = self.handshakes.get_mut(&id) else { return };
        match pending.receive(self.base_page_size) {
            Ok(None) => {}
            Ok(Some(handshake)) => self.complete(id, handshake),
            Err(error) => self.reject(id, error),
        }
    }

    fn complete(&mut self, id: u64, handshake: Handshake) {
        let Some(pending) = self.forget_handshake(id) else { return };
        let (server, peer, asked) = (pending.server, Peer::from(pending.credentials), pending.asked);
        let offer = match pending.into_offer(Some(handshake)) {
            Ok(offer) => offer,
            Err(error) => return self.tell_rejected(id, server, peer, asked, error),
        };
        if let Some(error) = offer.refusal.clone() {
            return self.turn_away(id, offer, error);
        }
        let Some(server) = self.servers.get(&server) else { return };
        let ServerOptions { images, policy, window, fill, source_timeout, working_set, label, .. } =
            &server.options;
        match images {
            Images::One(source) => {
                let image = Image {
                    label: label.clone(),
                    source: Arc::clone(source),
                    policy: *policy,
                    window: *window,
                    fill: *fill,
                    source_timeout: *source_timeout,
                    working_set: working_set.clone(),
                };
                self.begin(id, offer, image);
            }
            Images::Asked => self.ask(id, offer),
        }
    }

    pub(super) fn watch_session(&self, session: &Session) -> Result<(), PagerError> {
        let id = session.info.id;
        let failed = |errno| PagerError::System { syscall: "epoll_ctl", errno };
        watch(&self.epoll, session.as_fd(), Token::Uffd(id)).map_err(failed)?;
        if let Some(process) = &session.process
            && let Err(errno) = watch(&self.epoll, process.as_fd(), Token::Process(id))
        {
            unwatch(&self.epoll, session.as_fd());
            return Err(failed(errno));
        }
        Ok(())
    }

    /// Turns away a handshake that was not completed. If its uffd has come, somebody may wait for its memory already.
    fn reject(&mut self, id: u64, error: PagerError) {
        let Some(mut pending) = self.forget_handshake(id) else { return };
        let (server, peer, asked) = (pending.server, Peer::from(pending.credentials), pending.asked);
        let error = pending.refusal.take().unwrap_or(error);
        // Everything else it sent is closed by the time anybody hears of it.
        match pending.into_offer(None) {
            Ok(offer) => self.turn_away(id, offer, error),
            Err(_) => self.tell_rejected(id, server, peer, asked, error),
        }
    }

    /// Nothing of it is open here any more.
    fn tell_rejected(&mut self, id: u64, server: u64, peer: Peer, asked: bool, error: PagerError) {
        self.forget_connection(id);
        if let Some(server) = self.servers.get(&server) {
            server.observer.notice(Notice::Rejected { asked: asked.then_some(id), peer: Some(peer), error });
        }
    }

    fn forget_handshake(&mut self, id: u64) -> Option<Pending> {
        let pending = self.handshakes.remove(&id)?;
        unwatch(&self.epoll, pending.as_fd());
        if let Some(server) = self.servers.get_mut(&pending.server) {
            server.alive -= 1;
            server.refused -= usize::from(pending.refusal.is_some());
        }
        Some(pending)
    }

    pub(super) fn time_out_handshakes(&mut self, now: Instant, soonest: &mut Option<Instant>) {
        let late: Vec<u64> = self
            .handshakes
            .iter()
            .filter(|(_, pending)| pending.deadline <= now)
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            let ms = self.handshakes.get(&id).map_or(0, |pending| self.handshake_timeout_of(pending.server));
            self.reject(id, PagerError::Timeout { what: "the handshake was not completed", ms });
        }
        for pending in self.handshakes.values() {
            *soonest = earlier(*soonest, pending.deadline);
        }
    }

    /// In milliseconds.
    pub(super) fn handshake_timeout_of(&self, server: u64) -> u64 {
        self.servers
            .get(&server)
            .map_or(0, |server| server.options.handshake_timeout.as_millis().try_into().unwrap_or(u64::MAX))
    }

    pub(super) fn resume_accepting(&mut self, now: Instant, soonest: &mut Option<Instant>) {
        for server in self.servers.values_mut() {
            let Some(moment) = server.paused_until else { continue };
            if moment > now {
                *soonest = earlier(*soonest, moment);
                continue;
            }
            server.paused_until = None;
            let Some(listener) = &server.listener else { continue };
            if watch(&self.epoll, listener.as_fd(), Token::Listener(server.id)).is_err() {
                server.paused_until = Some(now + ACCEPT_PAUSE);
                *soonest = earlier(*soonest, now + ACCEPT_PAUSE);
            }
        }
    }

    pub(super) fn drop_closed_servers(&mut self) {
        self.servers.retain(|_, server| {
            let closed = server.listener.is_none() && server.alive == 0;
            if closed {
                server.observer.notice(Notice::ServerClosed);
            }
            !closed
        });
    }
}
