//! Requests by which something is served: memory that is adopted, sockets, images of those who ask.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use pager::{
    FailurePolicy, FillMode, FillOptions, Image, Images, Listener, MinorMemory, PagerError, Region,
    ServerOptions, SessionModes, SessionOptions, WorkingSet,
};
use serde_json::{Value, json};
use uffd::Userfaultfd;
use uffd::fd_passing::Credentials;
use uffd::liveness::PidFd;

use crate::channel::Message;
use crate::daemon::{Daemon, Server};
use crate::keeping::{Label, ServerValue, server_key};
use crate::outbox::Told;
use crate::protocol::{Adopt, AnswerParams, Attach, Listen, Mode, Policy, Serving};
use crate::requests::{Answer, Fds, Outcome, done, params};
use crate::sessions::Alive;

/// Sessions at one time.
const MOST_SESSIONS: usize = 16_384;

pub(crate) fn policy_of(policy: Policy) -> FailurePolicy {
    match policy {
        Policy::Poison => FailurePolicy::Poison,
        Policy::Kill => FailurePolicy::Kill,
        Policy::Hold { timeout } => FailurePolicy::Hold { timeout: timeout.map(Duration::from_millis) },
        Policy::Ask { timeout } => FailurePolicy::Ask { timeout: Duration::from_millis(timeout) },
    }
}

fn fill_of(serving: &Serving) -> FillOptions {
    let mode = match serving.mode {
        Mode::Windows => FillMode::Windows,
        Mode::Fill => FillMode::Fill,
        Mode::HugeFill => FillMode::HugeFill,
    };
    FillOptions { mode, collapse: serving.collapse }
}

impl Daemon {
    pub(crate) fn adopt(&mut self, client: u64, value: Value, mut fds: Fds) -> Outcome {
        let adopt: Adopt = params(value)?;
        if self.stopping.is_some() {
            return Err(PagerError::Closed.into());
        }
        if self.sessions.alive.len() >= MOST_SESSIONS {
            return Err(PagerError::Exhausted(format!("{MOST_SESSIONS} sessions are being served")).into());
        }
        let key = (self.token(client), adopt.source);
        let source = self.sources.get(&key)?;
        let process = match (adopt.pidfd, self.clients.get(&client)) {
            (Some(at), _) => Some(self.process(client, &mut fds, at)?),
            (None, Some(client)) if adopt.own => PidFd::of_peer(client.as_fd()).ok(),
            _ => None,
        };
        let offsets = adopt.regions.iter().map(|region| region.memfd_offset.unwrap_or_default()).collect();
        let memfd = adopt.memfd.map(|at| fds.take(at)).transpose()?;
        let regions = adopt.regions.iter().map(|region| Region {
            address: region.address.0,
            len: region.length,
            source_offset: region.source_offset,
        });
        let options = SessionOptions {
            policy: policy_of(adopt.serving.on_failure),
            window: adopt.serving.window,
            fill: fill_of(&adopt.serving),
            source_timeout: Duration::from_millis(adopt.serving.source_timeout),
            process,
            modes: SessionModes {
                missing: adopt.missing,
                minor: memfd.map(|memfd| MinorMemory { memfd, offsets }),
                write_protect: adopt.write_protect,
            },
            label: Label::text(Some(key), None),
            ..SessionOptions::new(regions.collect(), adopt.page_size, source)
        };
        let uffd = Userfaultfd::adopt(fds.take(adopt.uffd)?).map_err(PagerError::from)?;
        let observer = Arc::new(Told { outbox: Arc::clone(&self.outbox), server: None });
        let session = self.pager.adopt(uffd, options, observer)?;
        self.sessions.begin(session, None);
        Ok(Answer::Now(json!({ "session": session })))
    }

    /// The process whose memory it is. Who is not of the daemon's own user can name none but itself: it could have another killed.
    fn process(&self, client: u64, fds: &mut Fds, at: usize) -> Result<PidFd, PagerError> {
        let process =
            PidFd::from_fd(fds.take(at)?).map_err(|error| PagerError::Protocol(format!("pidfd: {error}")))?;
        let Some(client) = self.clients.get(&client) else { return Err(PagerError::Closed) };
        let own = nix::unistd::Uid::effective().as_raw();
        let Credentials { pid, uid, .. } = client.credentials;
        if uid != own && process.pid() != pid {
            return Err(PagerError::PeerNotAllowed { pid, uid, allowed: own });
        }
        Ok(process)
    }

    pub(crate) fn listen(&mut self, client: u64, value: Value, mut fds: Fds) -> Outcome {
        let listen: Listen = params(value.clone())?;
        if self.stopping.is_some() {
            return Err(PagerError::Closed.into());
        }
        let (server, owner) = (self.next(), self.token(client));
        let socket = fds.take(listen.socket)?;
        let kept = ServerValue { server, owner: owner.clone(), listen: value };
        let kept = serde_json::to_value(kept).map_err(|error| PagerError::Internal(error.to_string()))?;
        self.control.line.say(&Message::Keep { key: server_key(server), value: kept }, &[socket.as_fd()])?;
        match self.start_server(server, owner, &listen, socket) {
            Ok(path) => Ok(Answer::Now(json!({ "server": server, "socketPath": path }))),
            Err(error) => {
                self.control.line.forget(server_key(server));
                Err(error.into())
            }
        }
    }

    /// Listens; where.
    pub(crate) fn start_server(
        &mut self,
        server: u64,
        owner: String,
        listen: &Listen,
        socket: OwnedFd,
    ) -> Result<String, PagerError> {
        let options = self.server_options(server, &owner, listen)?;
        let failed = |_| PagerError::System { syscall: "fcntl", errno: Errno::EMFILE };
        let again = socket.try_clone().map_err(failed)?;
        let listener = Listener::inherit(socket)?;
        let path = listener.path().to_string_lossy().into_owned();
        let observer = Arc::new(Told { outbox: Arc::clone(&self.outbox), server: Some(server) });
        let internal = self.pager.serve_firecracker(listener, options, observer);
        let image = listen.image.clone();
        self.servers.insert(server, Server { internal, owner, path: path.clone(), image, socket: again });
        Ok(path)
    }

    fn server_options(&self, server: u64, owner: &str, listen: &Listen) -> Result<ServerOptions, PagerError> {
        let key = listen.source.map(|source| (owner.to_owned(), source));
        let images = match &key {
            Some(key) => Images::One(self.sources.get(key)?),
            None => Images::Asked,
        };
        Ok(ServerOptions {
            images,
            policy: policy_of(listen.serving.on_failure),
            window: listen.serving.window,
            fill: fill_of(&listen.serving),
            source_timeout: Duration::from_millis(listen.serving.source_timeout),
            peer_uid: listen.peer_uid,
            handshake_timeout: Duration::from_millis(listen.handshake_timeout),
            max_sessions: listen.max_sessions.min(MOST_SESSIONS),
            working_set: WorkingSet::default(),
            label: Label::text(key, Some(server)),
        })
    }

    /// A server whose client is gone becomes this client's, which says anew how whoever connects from now on is served.
    pub(crate) fn attach(&mut self, client: u64, value: Value) -> Outcome {
        let Attach { server: number, listen } = params(value.clone())?;
        let owner = self.token(client);
        let options = self.server_options(number, &owner, &listen)?;
        let attended = self.is_attended(number);
        let Some(server) = self.servers.get_mut(&number) else { return Err(PagerError::Closed.into()) };
        if attended && server.owner != owner {
            return Err(PagerError::Socket {
                path: (&server.path).into(),
                syscall: "bind",
                errno: Errno::EADDRINUSE,
                hint: "another client of the daemon serves there",
            }
            .into());
        }
        let kept = ServerValue { server: number, owner: owner.clone(), listen: value };
        let kept = serde_json::to_value(kept).map_err(|error| PagerError::Internal(error.to_string()))?;
        let keep = Message::Keep { key: server_key(number), value: kept };
        self.control.line.say(&keep, &[server.socket.as_fd()])?;
        server.owner = owner;
        server.image = listen.image;
        self.pager.configure_server(server.internal, options);
        let path = server.path.clone();
        let of_server = |alive: &Alive| alive.server == Some(number);
        let sessions: Vec<u64> =
            self.sessions.alive.iter().filter(|(_, alive)| of_server(alive)).map(|(&id, _)| id).collect();
        Ok(Answer::Now(json!({ "server": number, "socketPath": path, "sessions": sessions })))
    }

    /// Whether the client that a server belongs to is there, or may come back to it.
    fn is_attended(&self, server: u64) -> bool {
        let owner = self.servers.get(&server).map(|server| server.owner.as_str());
        owner.is_some_and(|owner| self.client_of(owner).is_some() || self.awaited.contains_key(owner))
    }

    pub(crate) fn servers_told(&self) -> Vec<Value> {
        let told = |(&id, server): (&u64, &Server)| {
            json!({
                "id": id,
                "socketPath": server.path,
                "owner": server.owner,
                "image": server.image,
                "attended": self.is_attended(id),
            })
        };
        self.servers.iter().map(told).collect()
    }

    pub(crate) fn answer(&mut self, client: u64, value: Value) -> Outcome {
        let answer: AnswerParams = params(value)?;
        let token = self.token(client);
        let server = self.questions.remove(&answer.session);
        let image = match (answer.source, answer.error) {
            (Some(source), None) => self.sources.get(&(token.clone(), source)).map(|pages| Image {
                source: pages,
                policy: policy_of(answer.serving.on_failure),
                window: answer.serving.window,
                fill: fill_of(&answer.serving),
                source_timeout: Duration::from_millis(answer.serving.source_timeout),
                working_set: WorkingSet::default(),
                label: Label::text(Some((token.clone(), source)), server),
            }),
            (_, error) => Err(PagerError::NoImage(error.unwrap_or_default())),
        };
        self.pager.answer(answer.session, image);
        done()
    }
}
