//! Requests by which something is served: memory that is adopted, sockets, images of those who ask.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use pager::{
    FailurePolicy, FillMode, FillOptions, Image, Images, Listener, MinorMemory, PageSource, PagerError,
    Region, ServerOptions, SessionModes, SessionOptions, WorkingSet,
};
use serde_json::{Value, json};
use uffd::Userfaultfd;
use uffd::fd_passing::Credentials;
use uffd::liveness::PidFd;

use crate::channel::Message;
use crate::daemon::{Daemon, Server};
use crate::keeping::{Label, ServerValue, server_key};
use crate::outbox::{SourceKey, Told};
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
    let mode = if serving.replay.is_some() || serving.plan.is_some() { FillMode::Replay } else { mode };
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
        let (working_set, plan) = self.working_set(&adopt.serving, &key, None, &source, &mut fds)?;
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
            working_set,
            label: Label::text(Some(key), None, plan),
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
        let mut listen: Listen = params(value.clone())?;
        if self.stopping.is_some() {
            return Err(PagerError::Closed.into());
        }
        let (server, owner) = (self.next(), self.token(client));
        let socket = fds.take(listen.socket)?;
        let value = self.as_kept(&owner, value, &mut listen.serving, &mut fds)?;
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
        let (mut images, mut working_set) = (Images::Asked, WorkingSet::default());
        if let Some(key) = &key {
            let source = self.sources.get(key)?;
            let whose = (owner, listen.serving.client_uid);
            let to = |record| self.record_to(record, whose, Some(server), &source);
            working_set.record = listen.serving.record.as_ref().map(to).transpose()?;
            working_set.replay = listen.serving.plan.and_then(|plan| self.plans.get(plan));
            images = Images::One(source);
        }
        Ok(ServerOptions {
            images,
            policy: policy_of(listen.serving.on_failure),
            window: listen.serving.window,
            fill: fill_of(&listen.serving),
            source_timeout: Duration::from_millis(listen.serving.source_timeout),
            peer_uid: listen.peer_uid,
            handshake_timeout: Duration::from_millis(listen.handshake_timeout),
            max_sessions: listen.max_sessions.min(MOST_SESSIONS),
            working_set,
            label: Label::text(key, Some(server), listen.serving.plan),
        })
    }

    /// A server whose client is gone becomes this client's, which says anew how whoever connects from now on is served.
    pub(crate) fn attach(&mut self, client: u64, value: Value, mut fds: Fds) -> Outcome {
        let Attach { server: number, mut listen } = params(value.clone())?;
        let owner = self.token(client);
        let value = self.as_kept(&owner, value, &mut listen.serving, &mut fds)?;
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
        self.servers.get(&server).is_some_and(|server| self.is_there(&server.owner))
    }

    /// Whether a client is connected, or may come back.
    pub(crate) fn is_there(&self, client: &str) -> bool {
        self.client_of(client).is_some() || self.awaited.contains_key(client)
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

    pub(crate) fn answer(&mut self, client: u64, value: Value, mut fds: Fds) -> Outcome {
        let answer: AnswerParams = params(value)?;
        let token = self.token(client);
        let server = self.questions.remove(&answer.session);
        let image = match (answer.source, answer.error) {
            (Some(source), None) => self.chosen((token, source), server, &answer.serving, &mut fds),
            (_, error) => Err(no_image(answer.code.as_deref(), error.unwrap_or_default())),
        };
        self.pager.answer(answer.session, image);
        done()
    }

    fn chosen(
        &mut self,
        key: SourceKey,
        server: Option<u64>,
        serving: &Serving,
        fds: &mut Fds,
    ) -> Result<Image, PagerError> {
        let source = self.sources.get(&key)?;
        let (working_set, plan) = self.working_set(serving, &key, server, &source, fds)?;
        Ok(Image {
            source,
            policy: policy_of(serving.on_failure),
            window: serving.window,
            fill: fill_of(serving),
            source_timeout: Duration::from_millis(serving.source_timeout),
            working_set,
            label: Label::text(Some(key), server, plan),
        })
    }

    /// What one session does about its working set, and the number of what it replays.
    fn working_set(
        &mut self,
        serving: &Serving,
        key: &SourceKey,
        server: Option<u64>,
        source: &Arc<dyn PageSource>,
        fds: &mut Fds,
    ) -> Result<(WorkingSet, Option<u64>), PagerError> {
        let to = |record| self.record_to(record, (&key.0, self.uid_of(&key.0)), server, source);
        let record = serving.record.as_ref().map(to).transpose()?;
        let plan = self.plan_of(serving, fds)?;
        let replay = plan.and_then(|plan| self.plans.get(plan));
        Ok((WorkingSet { record, replay }, plan))
    }

    /// Takes what the sessions of a server are to replay; the request as it is kept, which names that, and whose it is.
    fn as_kept(
        &mut self,
        owner: &str,
        mut value: Value,
        serving: &mut Serving,
        fds: &mut Fds,
    ) -> Result<Value, PagerError> {
        serving.plan = self.plan_of(serving, fds)?;
        value["plan"] = serving.plan.into();
        serving.client_uid = self.uid_of(owner);
        value["clientUid"] = serving.client_uid.into();
        Ok(value)
    }

    /// The number of what is to be replayed.
    fn plan_of(&mut self, serving: &Serving, fds: &mut Fds) -> Result<Option<u64>, PagerError> {
        serving.replay.map(|at| fds.take(at).and_then(|fd| self.take_plan(fd))).transpose()
    }

    fn uid_of(&self, owner: &str) -> Option<u32> {
        let client = self.client_of(owner).and_then(|client| self.clients.get(&client));
        client.map(|client| client.credentials.uid)
    }
}

/// Why a process gets no image, as its client says.
fn no_image(code: Option<&str>, message: String) -> PagerError {
    let code = match code {
        Some("ERR_UFFD_TRACE") => "ERR_UFFD_TRACE",
        Some("ERR_UFFD_TRACE_IMAGE") => "ERR_UFFD_TRACE_IMAGE",
        _ => return PagerError::NoImage(message),
    };
    PagerError::Inherited { message, code }
}
