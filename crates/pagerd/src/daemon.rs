//! The daemon: one loop for all that is not a fault. Clients, what they ask for, what the pager has to tell them.
//!
//! Faults are the pager's own threads'. Nothing here is waited for by them, and whatever becomes of a client, what is
//! served from descriptors goes on.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pager::{Keeper, Pager, PagerError, PagerOptions};
use serde_json::{Value, json};

use crate::client::{Client, Gone};
use crate::control::{Control, FromHolder};
use crate::feeds::Feeds;
use crate::keeping::{HolderKeeper, plan_key, source_key};
use crate::outbox::{Event, Outbox};
use crate::plans::Plans;
use crate::recordings::Recordings;
use crate::sessions::Sessions;
use crate::sources::Sources;
use crate::telling::Ask;
use crate::upgrades::Upgrades;

/// Clients at one time.
const MOST_CLIENTS: usize = 64;
/// A connection that says nothing is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How often clients hear of counters that have changed.
const STATS_INTERVAL: Duration = Duration::from_millis(100);
/// Sessions whose counters go out at one time.
const STATS_AT_ONCE: usize = 64;
/// How often a daemon without clients looks whether anything is still served from what they have closed.
const SWEEPING: Duration = Duration::from_secs(1);
/// How long an ordered stop waits for what is served to be put through its policy.
const STOPPING: Duration = Duration::from_secs(10);

/// A socket on which processes hand over their memory.
pub(crate) struct Server {
    /// Its number in the pager.
    pub(crate) internal: u64,
    /// Whose it is; it goes on without.
    pub(crate) owner: String,
    pub(crate) path: String,
    /// What its client called what it serves.
    pub(crate) image: Option<String>,
    /// Its socket, for the holder to keep when its client changes.
    pub(crate) socket: OwnedFd,
}

/// An ordered stop that is under way.
pub(crate) struct Stopping {
    pub(crate) until: Instant,
    /// Who asked for it, and in which request.
    pub(crate) asked_by: Option<(u64, Value)>,
}

pub(crate) struct Daemon {
    pub(crate) pager: Pager,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) sources: Sources,
    pub(crate) sessions: Sessions,
    pub(crate) servers: BTreeMap<u64, Server>,
    pub(crate) clients: BTreeMap<u64, Client>,
    pub(crate) control: Control,
    pub(crate) stopping: Option<Stopping>,
    /// Clients that may connect again, and until when.
    pub(crate) awaited: BTreeMap<String, Instant>,
    pub(crate) asks: Vec<Ask>,
    /// Processes whose images are asked for, and on which server they came.
    pub(crate) questions: BTreeMap<u64, u64>,
    /// Those of them whose clients may connect again: whose they are, and what these will be told.
    pub(crate) unasked: Vec<(String, Value)>,
    pub(crate) feeds: Feeds,
    pub(crate) recordings: Recordings,
    /// Since when its holder is gone and there is nothing to do.
    lonely_since: Option<Instant>,
    pub(crate) plans: Plans,
    pub(crate) upgrades: Upgrades,
    last: u64,
    stats_at: Instant,
    /// The next session whose counters are looked at.
    stats_from: u64,
}

/// What poll(2) has found, in the order in which it was asked.
struct Ready {
    told: bool,
    signal: bool,
    holder: bool,
    heir: bool,
    connecting: bool,
    clients: Vec<u64>,
}

impl Daemon {
    pub(crate) fn new(control: Control) -> Result<Self, PagerError> {
        let failed = |errno| PagerError::System { syscall: "eventfd", errno };
        let keeper: Arc<dyn Keeper> = Arc::new(HolderKeeper(Arc::clone(&control.line)));
        let feeds = Feeds::new(Arc::clone(&control.line));
        let pager = Pager::start(&PagerOptions { keeper: Some(keeper), ..PagerOptions::default() })?;
        // Numbers of an earlier daemon reach nothing of this one's own.
        pager.skip_ids(control.epoch << 32);
        Ok(Self {
            pager,
            outbox: Arc::new(Outbox::new().map_err(failed)?),
            sources: Sources::default(),
            sessions: Sessions::default(),
            servers: BTreeMap::new(),
            clients: BTreeMap::new(),
            control,
            stopping: None,
            awaited: BTreeMap::new(),
            asks: Vec::new(),
            questions: BTreeMap::new(),
            unasked: Vec::new(),
            feeds,
            recordings: Recordings::default(),
            lonely_since: None,
            plans: Plans::default(),
            upgrades: Upgrades::default(),
            last: 0,
            stats_at: Instant::now(),
            stats_from: 0,
        })
    }

    /// A number that was not given before.
    pub(crate) fn next(&mut self) -> u64 {
        self.last += 1;
        (self.control.epoch << 32) + self.last
    }

    /// Serves until it is told to stop.
    pub(crate) fn run(&mut self) -> Result<(), Errno> {
        loop {
            let lonely = self.lonely();
            if lonely == Some(Duration::ZERO) {
                crate::log(format_args!("nobody needs this daemon any more, whose holder is gone: it ends"));
                return Ok(());
            }
            let alive = self.control.say_alive();
            let ready = self.wait([alive, lonely].into_iter().flatten().min())?;
            if ready.told {
                for event in self.outbox.take() {
                    self.take(event);
                }
            }
            let mut stop = false;
            if ready.holder {
                match self.control.hear() {
                    FromHolder::Stop => stop = true,
                    FromHolder::Proved(unfit) => self.proved(unfit),
                    FromHolder::Lost => self.holder_lost(),
                    FromHolder::Nothing => {}
                }
            }
            if ready.signal && self.control.signalled() {
                if self.control.is_succeeded() {
                    // A service manager clears up behind a holder that has died. No session ends, whatever would be dropped here.
                    crate::log(format_args!("what is served is left to the next holder"));
                    std::process::exit(0);
                }
                stop = true;
            }
            if ready.heir {
                crate::log(format_args!("the heir of this daemon has died: there is another"));
                self.control.start_heir();
            }
            if stop && self.stopping.is_none() {
                self.abandon_all();
            }
            if ready.connecting {
                self.accept();
            }
            for id in ready.clients {
                self.serve_client(id);
            }
            self.tick();
            if self.stopped() {
                return Ok(());
            }
        }
    }

    /// How long it is to stay, where its holder is gone and there is nothing to do.
    fn lonely(&mut self) -> Option<Duration> {
        let idle = self.sessions.alive.is_empty() && self.servers.is_empty() && self.clients.is_empty();
        if !idle || !self.control.line.is_lost() {
            self.lonely_since = None;
            return None;
        }
        let since = *self.lonely_since.get_or_insert_with(Instant::now);
        Some(self.control.lonely_for().saturating_sub(since.elapsed()))
    }

    /// Nobody would take over from this daemon any more; what it serves goes on.
    fn holder_lost(&mut self) {
        crate::log(format_args!("the holder is gone: nothing replaces this daemon when it dies"));
        self.tell_all(&json!({ "jsonrpc": "2.0", "method": "holder", "params": { "lost": true } }));
        self.nobody_upgrades();
    }

    /// Waits, at most for so long.
    fn wait(&self, most: Option<Duration>) -> Result<Ready, Errno> {
        let (holder, stop) = (self.control.holder(), self.control.stop());
        let mut fds = vec![PollFd::new(self.outbox.as_fd(), PollFlags::POLLIN)];
        fds.push(PollFd::new(stop, PollFlags::POLLIN));
        let holder_at = holder.map(|holder| push(&mut fds, holder, PollFlags::POLLIN));
        let heir_at = self.control.heir().map(|heir| push(&mut fds, heir, PollFlags::POLLIN));
        let full = self.clients.len() >= MOST_CLIENTS;
        let listener_at = (!full).then(|| push(&mut fds, self.control.listener.as_fd(), PollFlags::POLLIN));
        let first = fds.len();
        for client in self.clients.values() {
            let write = if client.has_output() { PollFlags::POLLOUT } else { PollFlags::empty() };
            push(&mut fds, client.as_fd(), PollFlags::POLLIN | write);
        }
        let idle = self.clients.is_empty() && self.stopping.is_none() && self.awaited.is_empty();
        let sweeps = self.sources.has_closed() || self.plans.are_there();
        let often = if idle { sweeps.then_some(SWEEPING) } else { Some(STATS_INTERVAL) };
        let soonest = [most, often].into_iter().flatten().min();
        // Rounded up: poll(2) counts in milliseconds.
        let rounded =
            |first: Duration| PollTimeout::try_from(first.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let timeout = soonest.map_or(PollTimeout::NONE, rounded);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let is_ready = |at: usize| fds.get(at).and_then(PollFd::any).unwrap_or(false);
        let clients = self.clients.keys().enumerate();
        Ok(Ready {
            told: is_ready(0),
            signal: is_ready(1),
            holder: holder_at.is_some_and(is_ready),
            heir: heir_at.is_some_and(is_ready),
            connecting: listener_at.is_some_and(is_ready),
            clients: clients.filter(|(at, _)| is_ready(first + at)).map(|(_, &id)| id).collect(),
        })
    }

    fn accept(&mut self) {
        while self.clients.len() < MOST_CLIENTS {
            let Some((socket, credentials)) = self.control.accept() else { return };
            let mut client = Client::new(socket, credentials);
            if !self.control.may_connect(credentials.uid) {
                // It is told, and let go of when it has gone: closing first could keep it from hearing.
                client.leaving = true;
                let refused = PagerError::PeerNotAllowed {
                    pid: credentials.pid,
                    uid: credentials.uid,
                    allowed: nix::unistd::Uid::effective().as_raw(),
                };
                if client.tell(&crate::requests::failure(&Value::Null, &refused)).is_err() {
                    continue;
                }
            }
            let id = self.next();
            self.clients.insert(id, client);
        }
    }

    fn serve_client(&mut self, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let came = client.flush().and_then(|()| client.receive());
        let leaving = client.leaving;
        match came {
            Ok(lines) => {
                for line in lines.into_iter().filter(|_| !leaving) {
                    if let Err(gone) = self.line(id, &line) {
                        return self.let_go(id, &gone);
                    }
                }
            }
            Err(gone) => self.let_go(id, &gone),
        }
    }

    /// A client is gone: what it would have answered fails, everything else goes on.
    pub(crate) fn let_go(&mut self, id: u64, why: &Gone) {
        let Some(client) = self.clients.remove(&id) else { return };
        if !matches!(why, Gone::HungUp) {
            crate::log(format_args!("process {} was disconnected: {why}", client.credentials.pid));
        }
        let Some(token) = client.token else { return };
        let again = self.clients.values().any(|other| other.token.as_deref() == Some(&token));
        if !again {
            self.sources.abandon(&token);
        }
    }

    /// Tells one client something.
    pub(crate) fn tell(&mut self, id: u64, message: &Value) {
        if let Some(client) = self.clients.get_mut(&id)
            && let Err(gone) = client.tell(message)
        {
            self.let_go(id, &gone);
        }
    }

    pub(crate) fn tell_all(&mut self, message: &Value) {
        let greeted: Vec<u64> =
            self.clients.iter().filter(|(_, client)| client.token.is_some()).map(|(&id, _)| id).collect();
        for id in greeted {
            self.tell(id, message);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Notice { server, notice } => self.notice(server, notice),
            Event::Answer { client, request, answer } => self.answered(client, &request, answer),
            Event::Recorded { value, recording, bytes } => self.recorded(value, &recording, bytes),
            Event::Stopped { client, request, session, outcome } => {
                self.recording_stopped(client, &request, session, outcome);
            }
            Event::Resumed { session } => self.resumed(session),
            Event::Ask { source, id, offset, len } => {
                let ask = Ask { source, id, offset, len };
                match self.client_of(&ask.source.0) {
                    Some(client) => self.ask(client, &ask),
                    None if self.awaited.contains_key(&ask.source.0) => self.asks.push(ask),
                    None => self.nobody_answers(&ask),
                }
            }
        }
    }

    pub(crate) fn client_of(&self, token: &str) -> Option<u64> {
        let has = |client: &Client| client.token.as_deref() == Some(token);
        self.clients.iter().find(|(_, client)| has(client)).map(|(&id, _)| id)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if now < self.stats_at {
            return;
        }
        self.stats_at = now + STATS_INTERVAL;
        for key in self.sources.sweep() {
            self.control.line.forget(source_key(&key));
        }
        for plan in self.plans.sweep() {
            self.control.line.forget(plan_key(plan));
        }
        self.stop_awaiting(now);
        let silent: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| client.token.is_none() && client.since.elapsed() > HELLO_TIMEOUT)
            .map(|(&id, _)| id)
            .collect();
        for id in silent {
            self.let_go(id, &Gone::HungUp);
        }
        let listening: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| client.token.is_some() && !client.is_behind())
            .map(|(&id, _)| id)
            .collect();
        if listening.is_empty() {
            return;
        }
        let told = self.changed();
        if told.is_empty() {
            return;
        }
        let message = json!({ "jsonrpc": "2.0", "method": "stats", "params": { "sessions": told } });
        for id in listening {
            self.tell(id, &message);
        }
    }

    /// The counters of sessions in which something has happened, some at a time.
    fn changed(&mut self) -> Vec<Value> {
        let from = self.stats_from;
        let order: Vec<u64> = self
            .sessions
            .alive
            .range(from..)
            .chain(self.sessions.alive.range(..from))
            .map(|(&n, _)| n)
            .collect();
        let mut told = Vec::new();
        for number in order {
            if told.len() >= STATS_AT_ONCE {
                self.stats_from = number;
                break;
            }
            let Some(alive) = self.sessions.alive.get_mut(&number) else { continue };
            let Some(info) = alive.info.clone() else { continue };
            let stats = info.stats.snapshot();
            let marks =
                [stats.faults, stats.busy_ns, stats.pages_removed, stats.replay_installed, stats.replay_done];
            let recorded = info.recording.as_ref().map_or(0, |recording| recording.bytes());
            let mark = marks.into_iter().fold(recorded, u64::wrapping_add);
            if mark != alive.told {
                alive.told = mark;
                told.push(json!({ "id": number, "stats": self.stats_of(&info) }));
            }
        }
        told
    }

    fn stopped(&self) -> bool {
        let Some(stopping) = &self.stopping else { return false };
        let done = self.sessions.alive.is_empty() && self.servers.is_empty() && !self.awaits_recordings();
        done || Instant::now() >= stopping.until
    }

    /// What an ordered stop begins with; the loop ends when nothing is left.
    pub(crate) fn begin_stop(&mut self, asked_by: Option<(u64, Value)>) {
        self.stopping = Some(Stopping { until: Instant::now() + STOPPING, asked_by });
    }

    /// Nobody will serve it any more: all of it meets its policy.
    fn abandon_all(&mut self) {
        self.begin_stop(None);
        for server in self.servers.values() {
            self.pager.abandon_server(server.internal);
        }
        for (&id, _) in self.sessions.alive.iter().filter(|(_, alive)| alive.server.is_none()) {
            self.pager.close_session(id, pager::Rest::Poison);
        }
    }

    /// Says to who asked for it that everything is over.
    pub(crate) fn farewell(&mut self) {
        for event in self.outbox.take() {
            self.take(event);
        }
        if let Some(Stopping { asked_by: Some((client, request)), .. }) = self.stopping.take() {
            self.tell(client, &json!({ "jsonrpc": "2.0", "id": request, "result": {} }));
        }
    }
}

fn push<'a>(fds: &mut Vec<PollFd<'a>>, fd: BorrowedFd<'a>, events: PollFlags) -> usize {
    fds.push(PollFd::new(fd, events));
    fds.len() - 1
}
