//! What the daemon gives its holder to keep, and under which key.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pager::{EndReason, Keeper, KeptConnection, KeptDescriptors, KeptSession, PagerError, SessionEnd};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::channel::{Channel, ChannelError, Message};
use crate::outbox::SourceKey;
use crate::wire;

/// Begins the key of a session, of how one ended, of a source, of a server.
pub(crate) const SESSION: &str = "session:";
pub(crate) const END: &str = "end:";
pub(crate) const SOURCE: &str = "source:";
pub(crate) const FEED: &str = "feed:";
pub(crate) const SERVER: &str = "server:";
/// Of the recording of a session, and of what sessions replay.
pub(crate) const RECORDING: &str = "recording:";
pub(crate) const PLAN: &str = "plan:";
/// Of a connection whose process is not served yet.
pub(crate) const CONNECTION: &str = "connection:";

pub(crate) fn session_key(id: u64) -> String {
    format!("{SESSION}{id}")
}

/// Another source than the one that a session's label names: it was resumed with it.
pub(crate) fn feed_key(id: u64) -> String {
    format!("{FEED}{id}")
}

pub(crate) fn recording_key(session: u64) -> String {
    format!("{RECORDING}{session}")
}

pub(crate) fn plan_key(id: u64) -> String {
    format!("{PLAN}{id}")
}

fn connection_key(id: u64) -> String {
    format!("{CONNECTION}{id}")
}

pub(crate) fn source_key((owner, id): &SourceKey) -> String {
    format!("{SOURCE}{owner}:{id}")
}

pub(crate) fn server_key(id: u64) -> String {
    format!("{SERVER}{id}")
}

/// What a session's label says: where its bytes come from, and on which server it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Label {
    /// Absent where that is still asked for.
    pub(crate) source: Option<SourceKey>,
    pub(crate) server: Option<u64>,
    /// What it replays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) plan: Option<u64>,
}

impl Label {
    pub(crate) fn text(source: Option<SourceKey>, server: Option<u64>, plan: Option<u64>) -> String {
        serde_json::to_string(&Self { source, server, plan }).unwrap_or_default()
    }

    pub(crate) fn of(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// A session as it is kept, and which descriptors ride with it: userfaultfd and record always, these where they are there.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SessionValue {
    pub(crate) session: KeptSession,
    pub(crate) process: bool,
    pub(crate) connection: bool,
}

/// A source as it is kept.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SourceValue {
    pub(crate) key: SourceKey,
    pub(crate) description: Value,
}

/// A server as it is kept.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ServerValue {
    pub(crate) server: u64,
    pub(crate) owner: String,
    /// The parameters of the request that it was made by.
    pub(crate) listen: Value,
}

/// The line to the holder, which any thread may speak on.
#[derive(Debug)]
pub(crate) struct Line {
    channel: Channel,
    lost: AtomicBool,
}

impl Line {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel, lost: AtomicBool::new(false) }
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Says something. Without a holder everything goes on as it is: nothing is kept, and its loss was told.
    ///
    /// # Errors
    ///
    /// A holder that is there and takes nothing.
    pub(crate) fn say(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), PagerError> {
        if self.is_lost() {
            return Ok(());
        }
        match self.channel.send(message, fds) {
            Ok(()) => Ok(()),
            Err(ChannelError::Closed) => {
                self.lose();
                Ok(())
            }
            Err(ChannelError::Failed(why)) => {
                Err(PagerError::Exhausted(format!("the holder of the daemon takes nothing any more: {why}")))
            }
        }
    }

    /// A session is over: how takes the place of what was kept of it.
    pub(crate) fn ended(&self, id: u64, end: &SessionEnd) {
        self.tell_end(id, end, false);
    }

    fn tell_end(&self, id: u64, end: &SessionEnd, still_open: bool) {
        let message = Message::Ended {
            key: session_key(id),
            end: format!("{END}{id}"),
            value: ended(id, end),
            still_open,
        };
        let _ = self.say(&message, &[]);
        self.forget(feed_key(id));
    }

    pub(crate) fn forget(&self, key: String) {
        // One that does not hear it keeps a descriptor too long.
        let _ = self.say(&Message::Forget { key }, &[]);
    }
}

/// Hands sessions to the holder.
#[derive(Debug)]
pub(crate) struct HolderKeeper(pub(crate) Arc<Line>);

impl Keeper for HolderKeeper {
    fn keep(&self, session: &KeptSession, descriptors: KeptDescriptors<'_>) -> Result<(), PagerError> {
        let KeptDescriptors { uffd, record, process, connection } = descriptors;
        let value = SessionValue {
            session: session.clone(),
            process: process.is_some(),
            connection: connection.is_some(),
        };
        let value = serde_json::to_value(value).map_err(|error| PagerError::Internal(error.to_string()))?;
        let fds: Vec<BorrowedFd<'_>> = [uffd, record].into_iter().chain(process).chain(connection).collect();
        self.0.say(&Message::Keep { key: session_key(session.id), value }, &fds)
    }

    fn forget(&self, id: u64, end: &SessionEnd, still_open: bool) {
        self.0.tell_end(id, end, still_open);
    }

    fn keep_connection(&self, connection: &KeptConnection, socket: BorrowedFd<'_>) -> Result<(), PagerError> {
        let value =
            serde_json::to_value(connection).map_err(|error| PagerError::Internal(error.to_string()))?;
        self.0.say(&Message::Keep { key: connection_key(connection.id), value }, &[socket])
    }

    fn forget_connection(&self, id: u64) {
        self.0.forget(connection_key(id));
    }
}

/// How a session ended, as clients are told.
pub(crate) fn ended(id: u64, end: &SessionEnd) -> Value {
    let mut told = json!({ "kind": "ended", "at": wire::now(), "id": id, "reason": end.reason.as_str() });
    if let Some(error) = &end.error {
        told["error"] = wire::error(error);
    }
    told
}

/// The descriptors of a kept session, as they came.
pub(crate) fn descriptors<'a>(
    value: &SessionValue,
    fds: &'a [std::os::fd::OwnedFd],
) -> Result<KeptDescriptors<'a>, PagerError> {
    use std::os::fd::AsFd;
    let mut fds = fds.iter().map(AsFd::as_fd);
    let mut next = || {
        fds.next().ok_or_else(|| PagerError::Internal("a kept session has too few descriptors".to_owned()))
    };
    Ok(KeptDescriptors {
        uffd: next()?,
        record: next()?,
        process: value.process.then(&mut next).transpose()?,
        connection: value.connection.then(&mut next).transpose()?,
    })
}

/// How a session ended that nobody could resume, nor put through its policy.
pub(crate) fn never_resumed(error: PagerError) -> SessionEnd {
    match error {
        PagerError::PeerExited => SessionEnd { reason: EndReason::PeerExited, error: None },
        error => SessionEnd { reason: EndReason::PagerLost, error: Some(error) },
    }
}
