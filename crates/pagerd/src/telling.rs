//! What the pager has to say, passed on to clients, and what only clients can answer.

use std::time::{Duration, Instant};

use pager::{Notice, PagerError};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::keeping::{ended, server_key};
use crate::outbox::SourceKey;
use crate::wire;

/// How long clients of an earlier daemon may take to connect again.
const RETURNING: Duration = Duration::from_secs(10);

/// What a source wants of its client.
pub(crate) struct Ask {
    pub(crate) source: SourceKey,
    pub(crate) id: u64,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

impl Daemon {
    pub(crate) fn ask(&mut self, client: u64, ask: &Ask) {
        let Ask { source, id, offset, len } = ask;
        let params = json!({ "source": source.1, "request": id, "offset": offset, "length": len });
        self.tell(client, &json!({ "jsonrpc": "2.0", "method": "read", "params": params }));
    }

    pub(crate) fn nobody_answers(&self, ask: &Ask) {
        let gone = "the program that answers for this source is not connected".to_owned();
        self.sources.answer(&ask.source, ask.id, Err(gone));
    }

    /// A client of an earlier daemon: what only it can answer waits for it for a while.
    pub(crate) fn await_client(&mut self, token: &str) {
        self.awaited.insert(token.to_owned(), Instant::now() + RETURNING);
    }

    /// It is there, and has been welcomed: it is asked for what has waited for it.
    pub(crate) fn has_returned(&mut self, client: u64) {
        let token = self.token(client);
        self.awaited.remove(&token);
        for ask in self.asks.extract_if(.., |ask| ask.source.0 == token).collect::<Vec<_>>() {
            self.ask(client, &ask);
        }
        for question in self.unasked_of(&token) {
            self.tell(client, &question);
        }
    }

    fn unasked_of(&mut self, token: &str) -> Vec<Value> {
        let its = self.unasked.extract_if(.., |(owner, _)| owner == token);
        its.map(|(_, question)| question).collect()
    }

    pub(crate) fn stop_awaiting(&mut self, now: Instant) {
        let late: Vec<String> =
            self.awaited.iter().filter(|(_, until)| now >= **until).map(|(token, _)| token.clone()).collect();
        for token in late {
            self.awaited.remove(&token);
            self.sources.abandon(&token);
            let its: Vec<Ask> = self.asks.extract_if(.., |ask| ask.source.0 == token).collect();
            its.iter().for_each(|ask| self.nobody_answers(ask));
            for question in self.unasked_of(&token) {
                self.nobody_chooses(question["params"]["session"]["id"].as_u64().unwrap_or_default());
            }
        }
    }

    pub(crate) fn notice(&mut self, server: Option<u64>, notice: Notice) {
        let owner = server.and_then(|server| self.servers.get(&server)).map(|server| server.owner.clone());
        let mut params = json!({ "at": wire::now(), "server": server });
        match notice {
            Notice::SessionStarted(info) => {
                if info.lost_children > 0 {
                    crate::log(format_args!(
                        "process {} had forked {} children whose memory nobody has: it reads zero where it was missing",
                        info.peer.pid, info.lost_children
                    ));
                }
                self.sessions.begin(info.id, server);
                params["kind"] = "session".into();
                params["session"] = wire::session(&info);
                params["session"]["stats"] = self.stats_of(&info);
                if let Some(alive) = self.sessions.alive.get_mut(&info.id) {
                    alive.info = Some(info);
                }
            }
            Notice::SessionEnded { id, end } => {
                // One that its client has not written yet: whoever is there may.
                self.tell_recorded(id);
                let alive = self.sessions.end(id);
                self.feeds.forget(id);
                params = ended(id, &end);
                params["server"] = server.into();
                if let Some(info) = alive.and_then(|alive| alive.info) {
                    params["stats"] = self.stats_of(&info);
                    params["peer"] = wire::peer(info.peer);
                }
                self.sessions.remember(id, params.clone());
            }
            Notice::Held { id, peer, hold } => {
                params["kind"] = "held".into();
                params["id"] = id.into();
                params["peer"] = wire::peer(peer);
                params["asks"] = hold.asks.into();
                if let Some(failure) = &hold.failure {
                    params["reason"] = failure.reason.as_str().into();
                    if let Some(error) = &failure.error {
                        params["error"] = wire::error(error);
                    }
                }
                if let Some(until) = hold.until {
                    let left = until.saturating_duration_since(Instant::now());
                    params["until"] = (wire::now() + left.as_secs_f64() * 1000.0).into();
                }
                if let Some(alive) = self.sessions.alive.get_mut(&id) {
                    alive.held = Some(params.clone());
                }
            }
            Notice::Asking { id, peer, regions, page_size } => {
                params["kind"] = "asking".into();
                params["session"] = wire::asking(id, peer, &regions, page_size);
                self.questions.extend(server.map(|server| (id, server)));
                return self.ask_owner(owner, id, &params);
            }
            Notice::Rejected { asked, peer, error } => {
                params["kind"] = "rejected".into();
                params["error"] = wire::error(&error);
                if let Some(asked) = asked {
                    self.questions.remove(&asked);
                    params["id"] = asked.into();
                }
                if let Some(peer) = peer {
                    params["peer"] = wire::peer(peer);
                }
            }
            Notice::ServerClosed => {
                // One that stood in for another is nobody's.
                let Some(server) = server else { return };
                params["kind"] = "closed".into();
                self.servers.remove(&server);
                self.control.line.forget(server_key(server));
            }
        }
        self.tell_all(&json!({ "jsonrpc": "2.0", "method": "notice", "params": params }));
    }

    /// A session is held no more: whoever told it to go on knows, and all others hear of it.
    pub(crate) fn resumed(&mut self, id: u64) {
        let Some(alive) = self.sessions.alive.get_mut(&id) else { return };
        alive.held = None;
        let params = json!({ "kind": "resumed", "at": wire::now(), "server": alive.server, "id": id });
        self.tell_all(&json!({ "jsonrpc": "2.0", "method": "notice", "params": params }));
    }

    /// A process waits to be told its image, by whoever listens on its socket.
    fn ask_owner(&mut self, owner: Option<String>, id: u64, params: &Value) {
        let question = json!({ "jsonrpc": "2.0", "method": "notice", "params": params });
        match owner.map(|owner| (self.client_of(&owner), owner)) {
            Some((Some(client), _)) => self.tell(client, &question),
            Some((None, owner)) if self.awaited.contains_key(&owner) => self.unasked.push((owner, question)),
            _ => self.nobody_chooses(id),
        }
    }

    fn nobody_chooses(&self, id: u64) {
        let reason = "the program that says which image a process gets is not connected".to_owned();
        self.pager.answer(id, Err(PagerError::NoImage(reason)));
    }
}
