//! Sessions that outlive this process: handed to a keeper before anything of them is answered, and taken over from one.

use super::{EventLoop, NO_SERVER};
use crate::error::PagerError;
use crate::keep::Successor;
use crate::notice::Notice;
use crate::policy::EndReason;
use crate::session::{Parts, Session};
use crate::taking_over::TakingOver;

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
            session.fail(EndReason::PagerLost, error);
        }
        session.keep_ending();
        self.adopt_session(session, server.unwrap_or(NO_SERVER), &observer);
        // From now on their faults are heard of.
        if let Some(entry) = self.sessions.get(&id) {
            entry.session.wake_everybody();
        }
    }
}
