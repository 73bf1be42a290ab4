//! Sessions that outlive this process: handed to a keeper before anything of them is answered, and taken over from one.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use uffd::fd_passing;

use super::{EventLoop, NO_SERVER};
use crate::error::PagerError;
use crate::keep::{KeptConnection, Successor, To};
use crate::notice::{Notice, Observer};
use crate::pager::next_id;
use crate::policy::{EndReason, FailurePolicy};
use crate::server::{Pending, Server};
use crate::session::{Parts, Session};
use crate::taking_over::TakingOver;

/// Nobody hears of it.
struct Unheard;

impl Observer for Unheard {
    fn notice(&self, _: Notice) {}
}

impl EventLoop {
    /// Hands a session to the keeper, where there is one.
    pub(super) fn keep(&self, session: &mut Session, server: u64) -> Result<(), PagerError> {
        match &self.keeper {
            // Memory of this process ends with it.
            Some(keeper) if !session.own && session.kept.is_none() => {
                session.keep(keeper, Some(server).filter(|&server| server != NO_SERVER))
            }
            _ => Ok(()),
        }
    }

    /// Hands a connection to the keeper, where there is one, and leaves in its queue what is read of it. `again`: the keeper has it.
    pub(super) fn keep_connection(
        &mut self,
        id: u64,
        label: String,
        pending: &mut Pending,
        again: bool,
    ) -> Result<(), PagerError> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        pending.peek()?;
        if !again {
            keeper.keep_connection(&KeptConnection { id, label }, pending.as_fd())?;
        }
        self.kept_connections.insert(id);
        Ok(())
    }

    /// Its session is kept: nothing that it said is needed any more.
    pub(super) fn became_session(&mut self, session: &Session, unread: usize) {
        if session.kept.is_none() {
            return;
        }
        if let Some(connection) = &session.connection {
            // It is in there, unless the peer could take it out: then it is gone as well.
            let _ = fd_passing::take_out(connection.as_fd(), unread);
        }
        self.forget_connection(session.info.id);
    }

    pub(super) fn forget_connection(&mut self, id: u64) {
        if self.kept_connections.remove(&id)
            && let Some(keeper) = &self.keeper
        {
            keeper.forget_connection(id);
        }
    }

    /// Goes on with a connection of an earlier process.
    pub(super) fn take_connection(&mut self, id: u64, socket: OwnedFd, to: To) {
        let (mut server, why) = match to {
            To::Server(server) if self.servers.contains_key(&server) => {
                return self.welcome(id, server, socket, true);
            }
            To::New(server) if self.servers.contains_key(&server) => {
                return self.welcome(id, server, socket, false);
            }
            To::Server(_) | To::New(_) => {
                let server = Server::standing_in(next_id(), FailurePolicy::Poison, Arc::new(Unheard));
                (server, PagerError::Closed)
            }
            To::Nobody { server, why } => (*server, why),
        };
        server.options.peer_uid = fd_passing::peer_credentials(socket.as_fd()).ok().map(|peer| peer.uid);
        let number = server.id;
        self.servers.insert(number, server);
        self.welcome(id, number, socket, true);
        self.cut_short(id, &why);
    }

    /// Goes on with a session whose process was killed, or ends it by its policy.
    pub(super) fn take_over(&mut self, parts: Parts, taking_over: TakingOver, successor: Successor) {
        let Successor { observer, server, .. } = successor;
        let id = parts.id;
        if self.sessions.contains_key(&id) {
            let error = PagerError::Record(format!("session {id} is served by this pager already"));
            return observer.notice(Notice::Rejected { asked: Some(id), peer: Some(parts.peer), error });
        }
        let server = server.filter(|server| self.servers.contains_key(server));
        let mut taking_over = taking_over;
        let failing = taking_over.failing.take();
        let mut session = Session::new(parts, self.base_page_size);
        let keeper = self.keeper.clone();
        if let Err(error) = session.take_over(taking_over, keeper.as_ref(), server, &mut self.lent.forked) {
            session.fail(EndReason::PagerLost, error);
        }
        if let Some(error) = failing {
            let its = self.lent.forked.iter_mut().filter(|(parent, _)| *parent == id);
            its.for_each(|(_, child)| child.fail(EndReason::PagerLost, error.clone()));
            session.fail(EndReason::PagerLost, error);
        }
        session.keep_ending();
        self.adopt_session(session, server.unwrap_or(NO_SERVER), &observer);
        // From now on their faults are heard of.
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.session.wake_everybody();
            // That it is held is known as soon as that it is there.
            if let Some(notice) = entry.session.take_news() {
                entry.observer.notice(notice);
            }
        }
    }
}
