//! Recordings of sessions. The daemon opens no file: it records to memory, which the holder keeps, too, and clients write what has come
//! to its end to the file that was asked for.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pager::{
    PageSource, PagerError, RecordTo, RecordedBytes, Recording, RecordingKeeper, RecordingState, Room,
    SessionInfo, TraceHeader,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::channel::Message;
use crate::daemon::Daemon;
use crate::keeping::{Line, recording_key};
use crate::outbox::{Event, Outbox};
use crate::protocol::{OfSession, ReadRecording, Record, RecordingDone};
use crate::requests::{Answer, Outcome, done, params};
use crate::wire;

/// Bytes of all recordings together.
const MOST_BYTES: u64 = 256 << 20;
/// Recordings that are over and that nobody has written to their files yet; bytes of all of these.
const MOST_FINISHED: usize = 256;
const MOST_FINISHED_BYTES: u64 = 128 << 20;
/// Recordings of which it is remembered that they were written, or lost.
const MOST_REMEMBERED: usize = 1024;
/// Bytes of one answer.
const CHUNK: usize = 512 << 10;

/// A recording as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RecordingValue {
    pub(crate) session: u64,
    /// Its file, as clients see it.
    pub(crate) path: String,
    /// The client that has asked for it.
    pub(crate) owner: String,
    /// Whose program that is. What it says is no reason for another user's to write anywhere.
    pub(crate) uid: Option<u32>,
    pub(crate) server: Option<u64>,
    /// Nothing of it is missing.
    pub(crate) whole: bool,
}

/// Has the recordings of what was asked for by one request.
#[derive(Debug)]
struct Recorder {
    line: Arc<Line>,
    outbox: Arc<Outbox>,
    /// Whatever session it is.
    value: RecordingValue,
}

impl RecordingKeeper for Recorder {
    fn keep(&self, session: u64, memfd: BorrowedFd<'_>) -> Result<(), PagerError> {
        let value = RecordingValue { session, ..self.value.clone() };
        keep(&self.line, &value, memfd)
    }

    fn over(&self, session: u64, recording: &Arc<Recording>, bytes: RecordedBytes) {
        let value = RecordingValue { session, whole: true, ..self.value.clone() };
        let recording = Arc::clone(recording);
        self.outbox.push(Event::Recorded { value, recording, bytes });
    }
}

fn keep(line: &Line, value: &RecordingValue, memfd: BorrowedFd<'_>) -> Result<(), PagerError> {
    let key = recording_key(value.session);
    let value = serde_json::to_value(value).map_err(|error| PagerError::Internal(error.to_string()))?;
    line.say(&Message::Keep { key, value }, &[memfd])
}

/// One that is over.
struct Finished {
    value: RecordingValue,
    bytes: RecordedBytes,
    /// What its session's counters say of it; not known of one that an earlier daemon has left.
    counters: Value,
    /// Somebody is to be waited for who writes it, where the daemon ends.
    awaited: bool,
}

/// Those that are over.
pub(crate) struct Recordings {
    room: Arc<Room>,
    /// In the order in which they came to their end.
    finished: VecDeque<Finished>,
    /// Sessions whose recordings are written.
    written: VecDeque<u64>,
    /// Those that had to go before anybody had written them.
    lost: VecDeque<RecordingValue>,
}

impl Default for Recordings {
    fn default() -> Self {
        Self {
            room: Room::new(MOST_BYTES),
            finished: VecDeque::new(),
            written: VecDeque::new(),
            lost: VecDeque::new(),
        }
    }
}

fn remember<T>(those: &mut VecDeque<T>, one: T) {
    if those.len() >= MOST_REMEMBERED {
        those.pop_front();
    }
    those.push_back(one);
}

impl Recordings {
    fn find(&self, session: u64) -> Option<&Finished> {
        self.finished.iter().find(|finished| finished.value.session == session)
    }

    fn find_mut(&mut self, session: u64) -> Option<&mut Finished> {
        self.finished.iter_mut().find(|finished| finished.value.session == session)
    }

    fn remove(&mut self, session: u64) -> Option<Finished> {
        let at = self.finished.iter().position(|finished| finished.value.session == session)?;
        self.finished.remove(at)
    }

    /// Those for which there is no place any more, the oldest first.
    fn displaced(&mut self) -> Vec<RecordingValue> {
        let mut displaced = Vec::new();
        while self.finished.len() > MOST_FINISHED
            || self.finished.iter().map(|finished| finished.bytes.len()).sum::<u64>() > MOST_FINISHED_BYTES
        {
            let Some(oldest) = self.finished.pop_front() else { break };
            remember(&mut self.lost, oldest.value.clone());
            displaced.push(oldest.value);
        }
        displaced
    }
}

impl Daemon {
    /// Where sessions of this source are recorded to.
    pub(crate) fn record_to(
        &self,
        Record { path, identity }: &Record,
        (owner, uid): (&str, Option<u32>),
        server: Option<u64>,
        source: &Arc<dyn PageSource>,
    ) -> Result<RecordTo, PagerError> {
        let wrong = || PagerError::Protocol(format!("{identity:?} is no identity of an image: 64 digits"));
        let digits = identity.as_bytes().as_chunks::<2>().0;
        let byte = |digits: &[u8; 2]| {
            std::str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 16).ok())
        };
        let bytes: Vec<u8> = digits.iter().map_while(byte).collect();
        let identity = bytes.try_into().ok().filter(|_| identity.len() == 64).ok_or_else(wrong)?;
        let header = TraceHeader { page_size: 4096, image_size: source.size(), identity, started_ms: 0 };
        let value = RecordingValue {
            session: 0,
            path: path.clone(),
            owner: owner.to_owned(),
            uid,
            server,
            whole: false,
        };
        let (line, outbox) = (Arc::clone(&self.control.line), Arc::clone(&self.outbox));
        let keeper = Arc::new(Recorder { line, outbox, value });
        Ok(RecordTo::in_memory(Path::new(path), header, &self.recordings.room, keeper))
    }

    /// One has come to its end: its client is told, and until that has written it, it stays.
    pub(crate) fn recorded(&mut self, value: RecordingValue, recording: &Recording, bytes: RecordedBytes) {
        let session = value.session;
        if matches!(recording.state(), RecordingState::Failed(_)) {
            self.control.line.forget(recording_key(session));
            return;
        }
        // A holder that takes nothing has it still, as one that ends in the middle.
        let _ = keep(&self.control.line, &value, bytes.as_fd());
        let counters = wire::recording(recording);
        self.add_recording(Finished { value, bytes, counters, awaited: false });
        self.tell_recorded(session);
    }

    /// One that an earlier daemon has left. Its session goes on without.
    pub(crate) fn resume_recording(
        &mut self,
        value: RecordingValue,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), PagerError> {
        let memfd = fds.pop().ok_or_else(|| PagerError::Internal("its memory did not come".to_owned()))?;
        let bytes = RecordedBytes::of_memfd(memfd, &self.recordings.room)?;
        self.add_recording(Finished { value, bytes, counters: json!({}), awaited: false });
        Ok(())
    }

    fn add_recording(&mut self, finished: Finished) {
        self.recordings.finished.push_back(finished);
        for RecordingValue { session, path, .. } in self.recordings.displaced() {
            self.control.line.forget(recording_key(session));
            crate::log(format_args!(
                "the recording of session {session} is lost: nobody has written it to {path}, and there are too many others"
            ));
        }
    }

    /// Clients hear of one that is over and not written; whoever it belongs to is waited for.
    pub(crate) fn tell_recorded(&mut self, session: u64) {
        let Some(finished) = self.recordings.find(session) else { return };
        let params = self.recording_told(finished);
        let attended = params["attended"] == true;
        let brings = |client: &crate::client::Client| client.brings_recordings;
        let awaited = match self.client_of(&finished.value.owner) {
            Some(owner) => self.clients.get(&owner).is_some_and(brings),
            None => !attended && self.clients.values().any(brings),
        };
        if let Some(finished) = self.recordings.find_mut(session) {
            finished.awaited = awaited;
        }
        self.tell_all(&json!({ "jsonrpc": "2.0", "method": "recorded", "params": params }));
    }

    /// Whether a client that is there is about to write one.
    pub(crate) fn awaits_recordings(&self) -> bool {
        let brings = self.clients.values().any(|client| client.brings_recordings);
        brings && self.recordings.finished.iter().any(|finished| finished.awaited)
    }

    /// The counters of a session, as clients are told.
    pub(crate) fn stats_of(&self, info: &SessionInfo) -> Value {
        let mut stats = wire::stats(info);
        if let Some(recording) = stats.get_mut("recording")
            && recording["state"] == "recording"
            && self.recordings.written.contains(&info.id)
        {
            recording["state"] = "written".into();
        }
        stats
    }

    fn recording_told(&self, Finished { value, bytes, counters, .. }: &Finished) -> Value {
        let mut told = recording_named(value, self.is_there(&value.owner));
        told["size"] = bytes.len().into();
        told["whole"] = value.whole.into();
        told["counters"] = counters.clone();
        told
    }

    /// Those that are over and not written, and those that are lost.
    pub(crate) fn recordings_told(&self) -> Vec<Value> {
        let lost = self.recordings.lost.iter().map(|value| {
            let mut told = recording_named(value, self.is_there(&value.owner));
            told["lost"] = true.into();
            told
        });
        let finished = self.recordings.finished.iter().map(|finished| self.recording_told(finished));
        finished.chain(lost).collect()
    }

    pub(crate) fn read_recording(&self, value: Value) -> Outcome {
        let ReadRecording { session, offset } = params(value)?;
        if self.recordings.written.contains(&session) {
            return Ok(Answer::Now(json!({ "written": true })));
        }
        let none = || PagerError::Unsupported(format!("there is no recording of session {session}"));
        let finished = self.recordings.find(session).ok_or_else(none)?;
        let bytes = finished.bytes.read(offset, CHUNK)?;
        Ok(Answer::Now(json!({ "bytes": STANDARD.encode(&bytes), "size": finished.bytes.len() })))
    }

    /// A client has written one; or cannot, and others may.
    pub(crate) fn recording_done(&mut self, value: Value) -> Outcome {
        let RecordingDone { session, written } = params(value)?;
        if written {
            if self.recordings.remove(session).is_some() {
                self.control.line.forget(recording_key(session));
                remember(&mut self.recordings.written, session);
            }
        } else if let Some(finished) = self.recordings.find_mut(session) {
            finished.awaited = false;
        }
        done()
    }

    /// Ends one, unless an earlier daemon has had it.
    pub(crate) fn stop_recording(&mut self, client: u64, id: Option<Value>, value: Value) -> Outcome {
        let OfSession { session } = params(value)?;
        if !self.sessions.alive.contains_key(&session) {
            return Err(PagerError::SessionOver.into());
        }
        if let Some(finished) = self.recordings.find(session) {
            return Ok(Answer::Now(json!({ "recording": self.recording_told(finished) })));
        }
        if self.recordings.written.contains(&session) {
            return done();
        }
        let (outbox, request) = (Arc::clone(&self.outbox), id.unwrap_or_default());
        let deliver = move |outcome: Result<(), PagerError>| {
            outbox.push(Event::Stopped { client, request, session, outcome });
        };
        self.pager.stop_recording(session, Box::new(deliver));
        Ok(Answer::Later)
    }

    /// It was told before what has come of it.
    pub(crate) fn recording_stopped(
        &mut self,
        client: u64,
        request: &Value,
        session: u64,
        outcome: Result<(), PagerError>,
    ) {
        let recording = self.recordings.find(session).map(|finished| self.recording_told(finished));
        self.answered(client, request, outcome.map(|()| json!({ "recording": recording })));
    }
}

fn recording_named(value: &RecordingValue, attended: bool) -> Value {
    let RecordingValue { session, path, owner, uid, server, .. } = value;
    json!({
        "session": session,
        "path": path,
        "owner": owner,
        "uid": uid,
        "server": server,
        "attended": attended,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(session: u64, bytes: &[u8], room: &Arc<Room>) -> Finished {
        let memfd = uffd::fd_passing::in_memfd(c"uffd-recording", bytes).unwrap();
        let value = RecordingValue {
            session,
            path: "/run.trace".to_owned(),
            owner: "somebody".to_owned(),
            uid: None,
            server: None,
            whole: true,
        };
        let bytes = RecordedBytes::of_memfd(memfd, room).unwrap();
        Finished { value, bytes, counters: json!({}), awaited: false }
    }

    /// Which had to go when these came, one after the other.
    fn gone(recordings: &mut Recordings, coming: impl Iterator<Item = (u64, Vec<u8>)>) -> Vec<u64> {
        let mut gone = Vec::new();
        for (session, bytes) in coming {
            let finished = finished(session, &bytes, &recordings.room);
            recordings.finished.push_back(finished);
            gone.extend(recordings.displaced().into_iter().map(|value| value.session));
        }
        gone
    }

    #[test]
    fn of_too_many_the_oldest_go_and_are_remembered() {
        let mut recordings = Recordings::default();
        let coming = (0..MOST_FINISHED as u64 + 3).map(|session| (session, vec![7; 100]));

        assert_eq!(gone(&mut recordings, coming), [0, 1, 2]);

        assert_eq!(recordings.finished.len(), MOST_FINISHED);
        let lost: Vec<u64> = recordings.lost.iter().map(|value| value.session).collect();
        assert_eq!(lost, [0, 1, 2]);
        assert!(recordings.find(2).is_none() && recordings.find(3).is_some());
    }

    #[test]
    fn of_too_many_bytes_the_oldest_go() {
        let mut recordings = Recordings::default();
        let most = MOST_FINISHED_BYTES >> 24;
        let coming = (0..=most).map(|session| (session, vec![7; 1 << 24]));

        assert_eq!(gone(&mut recordings, coming), [0]);
        assert_eq!(gone(&mut recordings, [(100, vec![7])].into_iter()), [1]);
    }
}
