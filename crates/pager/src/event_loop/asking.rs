//! Between a handshake and its session: asking which image the process gets, and turning it away.

use std::sync::Arc;
use std::time::Instant;

use super::announcing::{Refusal, Standing};
use super::{Entry, EventLoop, Token, earlier, unwatch, watch};
use crate::error::PagerError;
use crate::notice::Notice;
use crate::offer::Offer;
use crate::policy::{EndReason, FailurePolicy};
use crate::server::Image;
use crate::session::Session;
use crate::supervise::{Supervised, check_policy};

impl EventLoop {
    /// Has the observer say which image this is. Its faults wait in the uffd meanwhile.
    pub(super) fn ask(&mut self, id: u64, mut offer: Offer) {
        // Whatever image it will be, these regions must be possible.
        let map = match offer.map(u64::MAX) {
            Ok(map) => map,
            Err(error) => return self.turn_away(id, offer, error),
        };
        if let Some(process) = offer.process_fd()
            && let Err(errno) = watch(&self.epoll, process, Token::Process(id))
        {
            return self.turn_away(id, offer, PagerError::System { syscall: "epoll_ctl", errno });
        }
        let Some(server) = self.servers.get_mut(&offer.server) else { return };
        server.alive += 1;
        let observer = Arc::clone(&server.observer);
        let (peer, regions, page_size) = (offer.peer, map.regions().collect(), map.page_size());
        offer.asked = true;
        self.asking.insert(id, offer);
        observer.notice(Notice::Asking { id, peer, regions, page_size });
    }

    pub(super) fn answer(&mut self, id: u64, image: Result<Image, PagerError>) {
        let Some(offer) = self.stop_asking(id) else { return };
        match image {
            Ok(image) => self.begin(id, offer, image),
            Err(error) => self.turn_away(id, offer, error),
        }
    }

    pub(super) fn asked_is_gone(&mut self, id: u64) {
        let Some(offer) = self.stop_asking(id) else { return };
        let error = PagerError::Protocol("the process exited before it was served".to_owned());
        self.turn_away(id, offer, error);
    }

    fn stop_asking(&mut self, id: u64) -> Option<Offer> {
        let offer = self.asking.remove(&id)?;
        if let Some(process) = offer.process_fd() {
            unwatch(&self.epoll, process);
        }
        if let Some(server) = self.servers.get_mut(&offer.server) {
            server.alive -= 1;
        }
        Some(offer)
    }

    pub(super) fn time_out_questions(&mut self, now: Instant, soonest: &mut Option<Instant>) {
        let late: Vec<u64> =
            self.asking.iter().filter(|(_, offer)| offer.deadline <= now).map(|(&id, _)| id).collect();
        for id in late {
            let Some(offer) = self.stop_asking(id) else { continue };
            let ms = self.handshake_timeout_of(offer.server);
            let what = "which memory image the process gets was not said";
            self.turn_away(id, offer, PagerError::Timeout { what, ms });
        }
        for offer in self.asking.values() {
            *soonest = earlier(*soonest, offer.deadline);
        }
    }

    /// Turns away whom `server` has asked about.
    pub(super) fn drop_questions(&mut self, server: u64, why: &PagerError) {
        let ids: Vec<u64> =
            self.asking.iter().filter(|(_, offer)| offer.server == server).map(|(&id, _)| id).collect();
        for id in ids {
            if let Some(offer) = self.stop_asking(id) {
                self.turn_away(id, offer, why.clone());
            }
        }
    }

    /// Serves what was handed over.
    pub(super) fn begin(&mut self, id: u64, offer: Offer, image: Image) {
        let map = match offer.map(image.source.size()) {
            Ok(map) => map,
            Err(error) => return self.turn_away(id, offer, error),
        };
        if let Some(replay) = &image.working_set.replay
            && let Err(error) = replay.fits(image.source.size())
        {
            return self.turn_away(id, offer, error);
        }
        let process = offer.process.as_ref().map(Supervised::pidfd);
        if let Err(error) = check_policy(image.policy, process, &offer.uffd) {
            return self.turn_away(id, offer, error);
        }
        let (server, asked, unread) = (offer.server, offer.asked, offer.unread);
        let mut session = Session::new(offer.into_parts(id, map, image), self.base_page_size);
        match self.keep(&mut session, server).and_then(|()| self.watch_session(&session)) {
            Ok(()) => {
                self.became_session(&session, unread);
                self.add_session(id, server, session, Standing::Unannounced { asked });
                self.announce(id);
            }
            Err(error) => self.refuse(server, session, Refusal { error, asked }, (true, unread)),
        }
    }

    /// Puts what was handed over through the server's failure policy; the observer hears of it when that is done.
    pub(super) fn turn_away(&mut self, id: u64, offer: Offer, error: PagerError) {
        let (server, asked, unread) = (offer.server, offer.asked, offer.unread);
        let policy = self.servers.get(&server).map_or(FailurePolicy::Poison, |server| server.options.policy);
        // A server that is closed on purpose does to those what it does to its sessions.
        let policy = if matches!(error, PagerError::Closed) { FailurePolicy::Poison } else { policy };
        let (parts, known) = offer.into_refused(id, policy);
        let session = Session::new(parts, self.base_page_size);
        // Faults that cannot be heard of are poisoned by the sweep.
        let _ = self.watch_session(&session);
        self.refuse(server, session, Refusal { error, asked }, (known, unread));
    }

    /// `known`: whether its map says what of its memory is to be poisoned.
    fn refuse(
        &mut self,
        server: u64,
        mut session: Session,
        refusal: Refusal,
        (known, unread): (bool, usize),
    ) {
        let id = session.info.id;
        // Where nothing is known of its memory, the connection is what a successor has.
        if known {
            // It ends in any case.
            let _ = self.keep(&mut session, server);
            self.became_session(&session, unread);
        }
        if session.process.as_ref().is_some_and(Supervised::has_exited) {
            session.phase.peer_gone();
        }
        // There is nothing that could go on later, and nobody who would know of it.
        session.policy = session.policy.at_once();
        session.fail(EndReason::Protocol, refusal.error.clone());
        if !known && session.phase.poisons() {
            // Nobody knows which of its memory waits.
            session.phase.cannot_poison(session.process.as_ref());
        }
        self.add_session(id, server, session, Standing::Refused(refusal));
    }

    fn add_session(&mut self, id: u64, server: u64, mut session: Session, standing: Standing) {
        self.start_recording(&mut session);
        let Some(owner) = self.servers.get_mut(&server) else { return };
        owner.alive += 1;
        owner.refused += usize::from(standing.is_refused());
        let observer = Arc::clone(&owner.observer);
        self.restless.insert(id);
        self.sessions.insert(id, Entry { session, server, observer, standing });
    }
}
