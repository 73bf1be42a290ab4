//! Going on where an earlier daemon was stopped: sources, servers and sessions, as the holder has kept them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use pager::{FailurePolicy, KeptConnection, LeftBehind, PagerError, Successor};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::channel::Message;
use crate::daemon::Daemon;
use crate::keeping::{
    self, CONNECTION, END, FEED, Label, PLAN, RECORDING, SERVER, SESSION, SOURCE, ServerValue, SessionValue,
    SourceValue,
};
use crate::kept::{Kept, take};
use crate::left::Left;
use crate::outbox::Told;
use crate::protocol::Listen;

/// How long clients wait for the pager to have taken everything over.
const SETTLING: Duration = Duration::from_secs(1);
/// No server's number in the pager.
const NO_SERVER: u64 = 0;

impl Daemon {
    /// Takes everything over, in the order in which it came to be.
    pub(crate) fn resume(&mut self, mut kept: Vec<Kept>) {
        // A server that has changed its client came later than its sessions, and its source later than itself.
        kept.sort_by_key(|kept| match &kept.key {
            key if key.starts_with(SOURCE) || key.starts_with(PLAN) => 0,
            key if key.starts_with(SERVER) => 1,
            _ => 2,
        });
        for Kept { key, value, .. } in kept.iter().filter(|kept| kept.key.starts_with(FEED)) {
            let id = key.strip_prefix(FEED).and_then(|id| id.parse().ok());
            if let (Some(id), Ok(source)) = (id, serde_json::from_value(value.clone())) {
                self.feeds.restore(id, source);
            }
        }
        let left = Left::take(&mut kept);
        let servers = left.servers(&kept);
        self.pager.inherit(left.children);
        // They come last: those who were served before them have their places.
        let connections = take(&mut kept, CONNECTION);
        for Kept { key, value, fds } in kept.into_iter().chain(connections) {
            let taken = if key.starts_with(SOURCE) {
                read(value).and_then(|value| self.resume_source(value, fds))
            } else if key.starts_with(SERVER) {
                read(value).and_then(|value| self.resume_server(value, fds))
            } else if key.starts_with(SESSION) {
                read(value).map(|value| self.resume_session(&value, &fds))
            } else if key.starts_with(CONNECTION) {
                read(value).and_then(|value| self.resume_connection(&value, fds))
            } else if key.starts_with(RECORDING) {
                read(value).and_then(|value| self.resume_recording(value, fds))
            } else if key.starts_with(PLAN) {
                self.resume_plan(&key, fds)
            } else if key.starts_with(END) {
                self.sessions.remember(value["id"].as_u64().unwrap_or_default(), value);
                Ok(())
            } else {
                Ok(())
            };
            if let Err(error) = taken {
                crate::log(format_args!("{key} could not be taken over: {error}"));
            }
        }
        // What no session has wanted was a client's, who has it still.
        self.pager.inherit(LeftBehind::default());
        for (socket, server) in servers {
            // It was accepted, and no more.
            let server = server.and_then(|(server, _)| self.servers.get(&server));
            self.pager.add_connection(socket, server.map_or(NO_SERVER, |server| server.internal));
        }
        let (done, all_done) = channel();
        let line = Arc::clone(&self.control.line);
        self.pager.after_that(Box::new(move || {
            let _ = done.send(());
            let _ = line.say(&Message::TakenOver, &[]);
        }));
        // Who connects finds everything as it is. Faults are answered meanwhile; where that takes long, so are clients.
        let _ = all_done.recv_timeout(SETTLING);
    }

    fn resume_source(&mut self, value: SourceValue, fds: Vec<OwnedFd>) -> Result<(), PagerError> {
        let description = read(value.description)?;
        // Its client may connect again, and be asked then.
        self.await_client(&value.key.0);
        if let Err(error) = self.sources.open(value.key.clone(), &description, fds, &self.outbox) {
            self.sources.lose(value.key, error);
        }
        Ok(())
    }

    fn resume_server(&mut self, value: ServerValue, mut fds: Vec<OwnedFd>) -> Result<(), PagerError> {
        let listen: Listen = read(value.listen)?;
        let socket = fds.pop().ok_or_else(no_socket)?;
        if listen.source.is_none() {
            // It may connect again, and be asked then.
            self.await_client(&value.owner);
        }
        self.start_server(value.server, value.owner, &listen, socket).map(drop)
    }

    /// A process that was not served yet: its handshake is still in the connection.
    fn resume_connection(&self, value: &KeptConnection, mut fds: Vec<OwnedFd>) -> Result<(), PagerError> {
        let socket = fds.pop().ok_or_else(no_socket)?;
        let number = Label::of(&value.label).and_then(|label| label.server);
        if let Some(server) = number.and_then(|server| self.servers.get(&server)) {
            self.pager.resume_connection(value.id, socket, server.internal);
        } else {
            let observer = Arc::new(Told { outbox: Arc::clone(&self.outbox), server: None });
            let why = PagerError::Closed;
            self.pager.fail_connection(value.id, socket, FailurePolicy::Poison, why, observer);
        }
        Ok(())
    }

    fn resume_session(&mut self, value: &SessionValue, fds: &[OwnedFd]) {
        let id = value.session.id;
        let label = Label::of(&value.session.label);
        let server = label.as_ref().and_then(|label| label.server);
        self.sessions.begin(id, server);
        if let Err(error) = self.try_resume(value, fds, label.as_ref()) {
            self.give_up(value, fds, server, error);
        }
    }

    fn try_resume(
        &self,
        value: &SessionValue,
        fds: &[OwnedFd],
        label: Option<&Label>,
    ) -> Result<(), PagerError> {
        let nowhere = || PagerError::NoImage("nothing says where its memory comes from".to_owned());
        let label = label.ok_or_else(nowhere)?;
        let source = self.feeds.get(value.session.id).or_else(|| label.source.clone()).ok_or_else(nowhere)?;
        let source = self.sources.get(&source)?;
        let server = label.server.and_then(|server| self.servers.get(&server)).map(|server| server.internal);
        let observer = Arc::new(Told { outbox: Arc::clone(&self.outbox), server: label.server });
        // Children that were forked have their parent's label, and replay nothing.
        let plan = label.plan.filter(|_| value.session.parent.is_none());
        let replay = plan.and_then(|plan| self.plans.get(plan));
        let successor = Successor { source, observer, server, replay };
        self.pager.resume_session(&value.session, keeping::descriptors(value, fds)?, successor)
    }

    /// It cannot be served any more: its process is gone, or it meets its failure policy.
    fn give_up(&mut self, value: &SessionValue, fds: &[OwnedFd], server: Option<u64>, why: PagerError) {
        let id = value.session.id;
        let observer = Arc::new(Told { outbox: Arc::clone(&self.outbox), server });
        let failed = match why {
            PagerError::PeerExited => Err(PagerError::PeerExited),
            why => keeping::descriptors(value, fds)
                .and_then(|descriptors| self.pager.fail_session(&value.session, descriptors, why, observer)),
        };
        let Err(error) = failed else { return };
        let end = keeping::never_resumed(error);
        self.control.line.ended(id, &end);
        self.sessions.end(id);
        self.sessions.remember(id, keeping::ended(id, &end));
    }
}

fn no_socket() -> PagerError {
    PagerError::Internal("its socket did not come".to_owned())
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, PagerError> {
    serde_json::from_value(value)
        .map_err(|error| PagerError::Internal(format!("what was kept of it is not understood: {error}")))
}
