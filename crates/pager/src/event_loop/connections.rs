//! How sessions come to be: listening sockets, connections, handshakes.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Entry, EventLoop, NO_SERVER, Token, earlier, unwatch, watch};
use crate::error::PagerError;
use crate::notice::{Notice, Observer};
use crate::pager::next_id;
use crate::policy::{EndReason, Rest};
use crate::server::{Pending, Server};
use crate::session::{Parts, Session};
use crate::supervise::Peer;

/// Connections taken per turn, so that a storm of them does not hold up faults.
const ACCEPTS_PER_TURN: usize = 16;
/// Without a free descriptor the connection stays in the queue and would be reported for ever.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl EventLoop {
    pub(super) fn add_server(&mut self, server: Server) {
        if let Some(listener) = &server.listener
            && let Err(errno) = watch(&self.epoll, listener.as_fd(), Token::Listener(server.id))
        {
            let error = PagerError::System { syscall: "epoll_ctl", errno };
            server.observer.notice(Notice::Rejected { peer: None, error });
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
        observer.notice(Notice::SessionStarted(Arc::clone(&session.info)));
        self.restless.insert(id);
        self.sessions.insert(id, Entry { session, server, observer: Arc::clone(observer) });
    }

    pub(super) fn close_server(&mut self, id: u64, rest: Rest) {
        if let Some(server) = self.servers.get_mut(&id) {
            // Closed and removed here: nobody can connect from now on.
            server.listener = None;
        }
        let abandoned: Vec<u64> =
            self.handshakes.iter().filter(|(_, pending)| pending.server == id).map(|(&id, _)| id).collect();
        for pending in abandoned {
            self.forget_handshake(pending);
        }
        for (&id, entry) in self.sessions.iter_mut().filter(|(_, entry)| entry.server == id) {
            self.restless.insert(id);
            entry.session.close(rest);
        }
    }

    /// The owner is going away without having closed it: every session meets its failure policy.
    pub(super) fn abandon_server(&mut self, id: u64) {
        let error = PagerError::Abandoned;
        for (&session, entry) in self.sessions.iter_mut().filter(|(_, entry)| entry.server == id) {
            self.restless.insert(session);
            entry.session.fail(EndReason::PagerLost, error.clone());
        }
        self.close_server(id, Rest::Poison);
    }

    pub(super) fn accept(&mut self, id: u64) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(server) = self.servers.get_mut(&id) else { return };
            let Some(listener) = &server.listener else { return };
            match listener.accept() {
                Ok(None) => return,
                Ok(Some(socket)) => match server.greet(socket, Instant::now()) {
                    Ok(pending) => self.add_handshake(pending),
                    Err(error) => server.observer.notice(Notice::Rejected { peer: None, error }),
                },
                Err(errno) => {
                    // The connection waits on; so does this loop, instead of being told about it without end.
                    let _ = self.epoll.delete(listener.as_fd());
                    server.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    let error = PagerError::Exhausted(format!("a connection could not be accepted: {errno}"));
                    server.observer.notice(Notice::Rejected { peer: None, error });
                    return;
                }
            }
        }
    }

    fn add_handshake(&mut self, pending: Pending) {
        let id = next_id();
        let watched = watch(&self.epoll, pending.as_fd(), Token::Handshake(id));
        let Some(server) = self.servers.get_mut(&pending.server) else { return };
        if let Err(errno) = watched {
            let error = PagerError::System { syscall: "epoll_ctl", errno };
            server.observer.notice(Notice::Rejected { peer: Some(Peer::from(pending.credentials)), error });
            return;
        }
        server.alive += 1;
        self.handshakes.insert(id, pending);
    }

    pub(super) fn shake_hands(&mut self, id: u64) {
        let Some(pending) = self.handshakes.get_mut(&id) else { return };
        match pending.receive(self.base_page_size) {
            Ok(None) => {}
            Ok(Some(handshake)) => {
                let Some(pending) = self.forget_handshake(id) else { return };
                let peer = Peer::from(pending.credentials);
                let Some(server) = self.servers.get(&pending.server) else { return };
                let (server_id, observer) = (server.id, Arc::clone(&server.observer));
                let begun = match pending.into_parts(id, &handshake, server) {
                    Ok(Some(parts)) => {
                        self.add_session(Session::new(parts, self.base_page_size), server_id, &observer)
                    }
                    Ok(None) => Err(PagerError::Protocol(
                        "the process was gone when its handshake was complete".to_owned(),
                    )),
                    Err(error) => Err(error),
                };
                if let Err(error) = begun {
                    observer.notice(Notice::Rejected { peer: Some(peer), error });
                }
            }
            Err(error) => self.reject(id, error),
        }
    }

    fn add_session(
        &mut self,
        session: Session,
        server: u64,
        observer: &Arc<dyn Observer>,
    ) -> Result<(), PagerError> {
        self.watch_session(&session)?;
        let id = session.info.id;
        if let Some(server) = self.servers.get_mut(&server) {
            server.alive += 1;
        }
        observer.notice(Notice::SessionStarted(Arc::clone(&session.info)));
        self.sessions.insert(id, Entry { session, server, observer: Arc::clone(observer) });
        Ok(())
    }

    fn watch_session(&self, session: &Session) -> Result<(), PagerError> {
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

    fn reject(&mut self, id: u64, error: PagerError) {
        let Some(pending) = self.forget_handshake(id) else { return };
        let (server, peer) = (pending.server, Peer::from(pending.credentials));
        // Everything it sent is closed by the time anybody hears of it.
        drop(pending);
        if let Some(server) = self.servers.get(&server) {
            server.observer.notice(Notice::Rejected { peer: Some(peer), error });
        }
    }

    fn forget_handshake(&mut self, id: u64) -> Option<Pending> {
        let pending = self.handshakes.remove(&id)?;
        unwatch(&self.epoll, pending.as_fd());
        if let Some(server) = self.servers.get_mut(&pending.server) {
            server.alive -= 1;
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
            let server = self.handshakes.get(&id).and_then(|pending| self.servers.get(&pending.server));
            let ms = server.map_or(0, |server| server.options.handshake_timeout.as_millis() as u64);
            self.reject(id, PagerError::Timeout { what: "the handshake was not completed", ms });
        }
        for pending in self.handshakes.values() {
            *soonest = earlier(*soonest, pending.deadline);
        }
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
