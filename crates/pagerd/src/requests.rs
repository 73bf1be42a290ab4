//! What clients ask for.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::stat::fstat;
use pager::{PagerError, PopulateOptions, Rest};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::channel::Message;
use crate::client::{Gone, MOST_OUTSTANDING};
use crate::daemon::Daemon;
use crate::keeping::{SourceValue, source_key};
use crate::outbox::Event;
use crate::protocol::{
    self, Address, CancelPopulate, Close, CloseSource, Decide, Hello, OfServer, OfSession, OpenSource,
    PROTOCOL, PopulateParams, Request, RestParams, Resume, Shutdown, SourceAnswer, TakeDirty,
};
use crate::serving::policy_of;
use crate::wire;

/// Why there is no answer.
pub(crate) enum Refusal {
    /// The words are wrong.
    Words { code: i64, message: String },
    /// What was asked for failed.
    Failed(PagerError),
}

impl From<PagerError> for Refusal {
    fn from(error: PagerError) -> Self {
        Self::Failed(error)
    }
}

/// An answer: at once, or later by the outbox.
pub(crate) enum Answer {
    Now(Value),
    Later,
}

pub(crate) type Outcome = Result<Answer, Refusal>;

pub(crate) fn done() -> Outcome {
    Ok(Answer::Now(json!({})))
}

/// The answer to a request that failed.
pub(crate) fn failure(request: &Value, error: &PagerError) -> Value {
    json!({
        "jsonrpc": "2.0",
        "id": request,
        "error": { "code": protocol::FAILED, "message": error.to_string(), "data": wire::error(error) },
    })
}

// Once for each kind: where they are used they would be put in again and again.
#[inline(never)]
pub(crate) fn params<T: DeserializeOwned>(value: Value) -> Result<T, Refusal> {
    serde_json::from_value(value)
        .map_err(|error| Refusal::Words { code: protocol::INVALID_PARAMS, message: error.to_string() })
}

fn rest_of(rest: RestParams) -> Rest {
    match rest {
        RestParams::Poison => Rest::Poison,
        RestParams::Populate => Rest::Populate,
        RestParams::Zero => Rest::Zero,
    }
}

/// Bytes of a regular file.
fn size_of_file(fd: &OwnedFd) -> Option<u64> {
    let file = fstat(fd).ok().filter(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG)?;
    u64::try_from(file.st_size).ok()
}

/// The descriptors of a line, taken by their positions.
pub(crate) struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    pub(crate) fn take(&mut self, at: usize) -> Result<OwnedFd, PagerError> {
        let missing = || PagerError::Protocol(format!("descriptor {at} did not come with the request"));
        self.0.get_mut(at).and_then(Option::take).ok_or_else(missing)
    }
}

impl Daemon {
    /// One line of a client. An error ends the connection.
    pub(crate) fn line(&mut self, client: u64, line: &[u8]) -> Result<(), Gone> {
        let request = match serde_json::from_slice::<Request>(line) {
            Ok(request) => request,
            Err(error) => {
                let code = if error.is_data() { protocol::INVALID_REQUEST } else { protocol::PARSE_ERROR };
                let answer = json!({ "code": code, "message": error.to_string() });
                self.tell(client, &json!({ "jsonrpc": "2.0", "id": null, "error": answer }));
                return Ok(());
            }
        };
        let Some(from) = self.clients.get_mut(&client) else { return Ok(()) };
        let Some(fds) = from.claim(request.fds) else { return Err(Gone::Unclaimed) };
        let id = request.id.clone();
        let greeted = from.token.is_some();
        let busy = from.outstanding >= MOST_OUTSTANDING;
        let outcome = match request.method.as_str() {
            "hello" => self.hello(client, request.params),
            _ if !greeted => Err(Refusal::Words {
                code: protocol::INVALID_REQUEST,
                message: "say `hello` first".to_owned(),
            }),
            _ if busy => Err(Refusal::Failed(PagerError::Exhausted(format!(
                "{MOST_OUTSTANDING} requests of this client are not answered yet"
            )))),
            _ => self.dispatch(client, request, Fds(fds.into_iter().map(Some).collect())),
        };
        let Some(id) = id else { return Ok(()) };
        let is_welcome = !greeted && outcome.is_ok();
        let message = match outcome {
            Ok(Answer::Now(result)) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
            Ok(Answer::Later) => {
                if let Some(client) = self.clients.get_mut(&client) {
                    client.outstanding += 1;
                }
                return Ok(());
            }
            Err(Refusal::Failed(error)) => failure(&id, &error),
            Err(Refusal::Words { code, message }) => {
                json!({ "jsonrpc": "2.0", "id": id, "error": { "code": code, "message": message } })
            }
        };
        self.tell(client, &message);
        if is_welcome {
            self.has_returned(client);
        }
        Ok(())
    }

    fn hello(&mut self, client: u64, value: Value) -> Outcome {
        let hello: Hello = params(value)?;
        if hello.protocol != PROTOCOL {
            if let Some(client) = self.clients.get_mut(&client) {
                client.leaving = true;
            }
            return Err(Refusal::Failed(PagerError::Unsupported(format!(
                "protocol {} is not spoken by userfaultfd-pagerd {}, which speaks {PROTOCOL}: use versions of the \
                 package and of the daemon that go together",
                hello.protocol,
                env!("CARGO_PKG_VERSION"),
            ))));
        }
        if let Some(client) = self.clients.get_mut(&client) {
            client.token = Some(hello.client.clone());
            client.brings_recordings = hello.recordings;
        }
        if let Some(sources) = &hello.sources {
            self.sources.keep_only(&hello.client, sources);
        }
        // Announced later: they are being filled, or taken over.
        let pending: Vec<u64> =
            self.sessions.alive.iter().filter(|(_, alive)| alive.info.is_none()).map(|(&id, _)| id).collect();
        let sessions: Vec<Value> = self
            .sessions
            .alive
            .values()
            .filter_map(|alive| {
                let info = alive.info.as_ref()?;
                let mut session = wire::session(info);
                session["stats"] = self.stats_of(info);
                session["server"] = alive.server.into();
                if let Some(held) = &alive.held {
                    session["held"] = held.clone();
                }
                Some(session)
            })
            .collect();
        let servers = self.servers_told();
        let ends: Vec<&Value> =
            hello.sessions.iter().filter_map(|&number| self.sessions.ended(number)).collect();
        Ok(Answer::Now(json!({
            "protocol": PROTOCOL,
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "holder": self.control.holder_pid(),
            "takeover": self.control.takeover,
            "confined": self.control.confined,
            "servingSince": self.control.serving_since,
            "epoch": self.control.epoch,
            "upgrades": self.control.upgrades(),
            "sessions": sessions,
            "pending": pending,
            "servers": servers,
            "ends": ends,
            "recordings": self.recordings_told(),
        })))
    }

    fn dispatch(&mut self, client: u64, request: Request, mut fds: Fds) -> Outcome {
        let Request { id, method, params: value, .. } = request;
        match method.as_str() {
            "source.open" => self.open_source(client, value, fds),
            "source.close" => {
                let close: CloseSource = params(value)?;
                self.sources.close(&(self.token(client), close.source), close.ended);
                done()
            }
            "source.answer" => {
                let answer: SourceAnswer = params(value)?;
                let bytes = match answer.error {
                    Some(error) => Err(error),
                    None => fds.take(0).map_err(|error| error.to_string()),
                };
                self.sources.answer(&(self.token(client), answer.source), answer.request, bytes);
                done()
            }
            "session.adopt" => self.adopt(client, value, fds),
            "session.close" => {
                let close: Close = params(value)?;
                self.pager.close_session(close.session, rest_of(close.rest));
                done()
            }
            "session.stats" => {
                let of: OfSession = params(value)?;
                let alive = self.sessions.alive.get(&of.session);
                let info = alive.and_then(|alive| alive.info.as_ref()).ok_or(PagerError::SessionOver)?;
                Ok(Answer::Now(self.stats_of(info)))
            }
            "session.populate" => self.populate(client, id, value),
            "session.cancelPopulate" => {
                let cancel: CancelPopulate = params(value)?;
                self.pager.cancel_populate(cancel.session, cancel.request);
                done()
            }
            "session.hold" => {
                let of: OfSession = params(value)?;
                let deliver = self.answering(client, id, |()| json!({}));
                self.pager.hold(of.session, deliver);
                Ok(Answer::Later)
            }
            "session.resume" => self.resume_held(client, id, value),
            "session.ends" => Ok(Answer::Now(json!({ "ends": self.sessions.ends() }))),
            "session.decide" => {
                let decide: Decide = params(value)?;
                self.pager.decide(decide.session, policy_of(decide.policy));
                done()
            }
            "session.detach" => {
                let of: OfSession = params(value)?;
                let deliver = self.answering(client, id, |()| json!({}));
                self.pager.detach(of.session, deliver);
                Ok(Answer::Later)
            }
            "session.replayed" => {
                let of: OfSession = params(value)?;
                let deliver = self.answering(client, id, |()| json!({}));
                self.pager.await_replay(of.session, deliver);
                Ok(Answer::Later)
            }
            "session.stopRecording" => self.stop_recording(client, id, value),
            "recording.list" => Ok(Answer::Now(json!({ "recordings": self.recordings_told() }))),
            "recording.read" => self.read_recording(value),
            "recording.done" => self.recording_done(value),
            "session.takeDirty" => {
                let take: TakeDirty = params(value)?;
                let deliver = self.answering(client, id, |pages| wire::dirty(&pages));
                self.pager.take_dirty_with(take.session, take.most, deliver);
                Ok(Answer::Later)
            }
            "firecracker.serve" => self.listen(client, value, fds),
            "firecracker.attach" => self.attach(client, value, fds),
            "firecracker.list" => Ok(Answer::Now(json!({ "servers": self.servers_told() }))),
            "firecracker.answer" => self.answer(client, value, fds),
            "firecracker.close" | "firecracker.drain" | "firecracker.giveUp" => {
                let of: OfServer = params(value)?;
                let server = self.servers.get(&of.server);
                let internal = server.map(|server| server.internal).ok_or(PagerError::Closed)?;
                match method.as_str() {
                    "firecracker.close" => self.pager.close_server(internal, rest_of(of.rest)),
                    "firecracker.drain" => self.pager.drain_server(internal),
                    _ => self.pager.abandon_server(internal),
                }
                done()
            }
            "upgrade" => self.upgrade(client, id, value),
            "shutdown" => self.shutdown(client, id, value),
            _ => Err(Refusal::Words {
                code: protocol::METHOD_NOT_FOUND,
                message: format!("there is no method {method:?} in protocol {PROTOCOL}"),
            }),
        }
    }

    /// What a request has come to that was not answered at once.
    pub(crate) fn answered(&mut self, client: u64, request: &Value, answer: Result<Value, PagerError>) {
        let message = match answer {
            Ok(result) => json!({ "jsonrpc": "2.0", "id": request, "result": result }),
            Err(error) => failure(request, &error),
        };
        self.reply(client, &message);
    }

    pub(crate) fn reply(&mut self, client: u64, message: &Value) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.outstanding = client.outstanding.saturating_sub(1);
        }
        self.tell(client, message);
    }

    pub(crate) fn token(&self, client: u64) -> String {
        self.clients.get(&client).and_then(|client| client.token.clone()).unwrap_or_default()
    }

    /// Delivers an outcome to who asked, from whatever thread has it.
    fn answering<T>(
        &self,
        client: u64,
        id: Option<Value>,
        tell: impl FnOnce(T) -> Value + Send + 'static,
    ) -> Box<dyn FnOnce(Result<T, PagerError>) + Send> {
        let outbox = Arc::clone(&self.outbox);
        let request = id.unwrap_or_default();
        Box::new(move |outcome| {
            outbox.push(Event::Answer { client, request, answer: outcome.map(tell) });
        })
    }

    fn open_source(&mut self, client: u64, value: Value, fds: Fds) -> Outcome {
        let mut open: OpenSource = params(value)?;
        let key = (self.token(client), open.source);
        let fds: Vec<OwnedFd> = fds.0.into_iter().flatten().collect();
        // A successor opens it when it may have been cut short.
        let file = open.description["fd"].as_u64().and_then(|at| fds.get(at as usize));
        if open.description["kind"] == "file"
            && let Some(size) = file.and_then(size_of_file)
        {
            open.description["size"] = size.into();
        }
        if self.sources.reopen(&key) {
            return done();
        }
        let description = serde_json::from_value(open.description.clone())
            .map_err(|error| Refusal::Words { code: protocol::INVALID_PARAMS, message: error.to_string() })?;
        let value = SourceValue { key: key.clone(), description: open.description };
        let value = serde_json::to_value(value).map_err(|error| PagerError::Internal(error.to_string()))?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.control.line.say(&Message::Keep { key: source_key(&key), value }, &borrowed)?;
        if let Err(error) = self.sources.open(key.clone(), &description, fds, &self.outbox) {
            self.control.line.forget(source_key(&key));
            return Err(error.into());
        }
        done()
    }

    fn populate(&mut self, client: u64, id: Option<Value>, value: Value) -> Outcome {
        let populate: PopulateParams = params(value)?;
        let range = |(Address(start), len): (Address, u64)| start..start.saturating_add(len);
        let options = PopulateOptions {
            ranges: populate.ranges.map(|ranges| ranges.into_iter().map(range).collect()),
            rate: populate.rate,
        };
        let deliver = self.answering(client, id, |()| json!({}));
        self.pager.populate(populate.session, populate.request, options, deliver);
        Ok(Answer::Later)
    }

    fn resume_held(&mut self, client: u64, id: Option<Value>, value: Value) -> Outcome {
        let resume: Resume = params(value)?;
        let source = match resume.source {
            None => None,
            Some(source) => {
                let key = (self.token(client), source);
                let pages = self.sources.get(&key)?;
                Some((key, pages))
            }
        };
        let (outbox, session) = (Arc::clone(&self.outbox), resume.session);
        let answer = self.answering(client, id, move |()| {
            outbox.push(Event::Resumed { session });
            json!({})
        });
        let Some((key, pages)) = source else {
            self.pager.resume(session, None, answer);
            return Ok(Answer::Later);
        };
        let before = self.feeds.put(session, Some(key))?;
        let feeds = self.feeds.clone();
        let deliver = Box::new(move |outcome: Result<(), PagerError>| {
            // It goes on from the one that it had. A holder that takes nothing will hear no more of this session.
            if outcome.is_err() {
                let _ = feeds.put(session, before);
            }
            answer(outcome);
        });
        self.pager.resume(session, Some(pages), deliver);
        Ok(Answer::Later)
    }

    fn shutdown(&mut self, client: u64, id: Option<Value>, value: Value) -> Outcome {
        let shutdown: Shutdown = if value.is_null() { Shutdown::default() } else { params(value)? };
        if self.stopping.is_none() {
            for server in self.servers.values() {
                self.pager.close_server(server.internal, rest_of(shutdown.rest));
            }
            for &id in self.sessions.alive.keys() {
                self.pager.close_session(id, rest_of(shutdown.rest));
            }
        }
        self.begin_stop(id.map(|id| (client, id)));
        Ok(Answer::Later)
    }
}
