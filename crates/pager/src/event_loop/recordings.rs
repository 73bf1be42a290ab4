//! Recordings that come to their end. The disk is a thread's to wait for; whoever is to hear that a session is over hears it
//! when its recording is whole, or that has taken too long.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{EventLoop, earlier};
use crate::error::PagerError;
use crate::notice::{Notice, Observer};
use crate::owed::Owed;
use crate::pager::Message;
use crate::session::Session;
use crate::session_info::SessionInfo;
use crate::trace::{Recorder, Recording, RecordingState};

/// How long a disk may take for what is left of a recording.
const DEADLINE: Duration = Duration::from_secs(5);

/// The end of a session, to be told.
pub(super) struct Burial {
    pub(super) server: u64,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) notice: Notice,
    /// It never was a session.
    pub(super) refused: bool,
}

/// A recording of which no more faults come, and who waits for it.
pub(super) struct Unwritten {
    recording: Arc<Recording>,
    deadline: Instant,
    answers: Vec<Owed<()>>,
    burial: Option<Burial>,
}

impl EventLoop {
    pub(super) fn start_recording(&self, session: &mut Session) {
        let (id, mailbox) = (session.info.id, self.mailbox.clone());
        session.start_recording(move || mailbox.send(Message::Recorded { id }));
    }

    /// Tells that a session is over: at once, or when its recording is.
    pub(super) fn announce_when_recorded(
        &mut self,
        id: u64,
        burial: Burial,
        recorder: Option<Box<Recorder>>,
        info: &SessionInfo,
    ) {
        match self.finish_recording(id, recorder, info) {
            Some(unwritten) => unwritten.burial = Some(burial),
            None => self.tell_end(burial),
        }
    }

    fn tell_end(&mut self, burial: Burial) {
        let Burial { server, observer, notice, refused } = burial;
        observer.notice(notice);
        if let Some(server) = self.servers.get_mut(&server) {
            server.alive -= 1;
            server.refused -= usize::from(refused);
        }
    }

    /// Ends the recording of a session that goes on.
    pub(super) fn stop_recording(&mut self, id: u64, mut answer: Owed<()>) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let (recorder, info) = (entry.session.recorder.take(), Arc::clone(&entry.session.info));
        let Some(recording) = &info.recording else {
            let error = PagerError::Unsupported("this session is not recorded (`record`)".to_owned());
            return answer.give(Err(error));
        };
        match self.finish_recording(id, recorder, &info) {
            Some(unwritten) => unwritten.answers.push(answer),
            None => answer.give(outcome(recording)),
        }
    }

    /// No more faults come; `None` where the recording has ended.
    fn finish_recording(
        &mut self,
        id: u64,
        recorder: Option<Box<Recorder>>,
        info: &SessionInfo,
    ) -> Option<&mut Unwritten> {
        if let Some(recorder) = recorder {
            recorder.finish();
        }
        // If it ends right after this, that is told by a message.
        let recording = info.recording.as_ref().filter(|recording| !recording.is_over())?;
        Some(self.unwritten.entry(id).or_insert_with(|| Unwritten {
            recording: Arc::clone(recording),
            deadline: Instant::now() + DEADLINE,
            answers: Vec::new(),
            burial: None,
        }))
    }

    /// A recording has come to its end.
    pub(super) fn recording_over(&mut self, id: u64) {
        let Some(Unwritten { recording, answers, burial, .. }) = self.unwritten.remove(&id) else { return };
        for mut answer in answers {
            answer.give(outcome(&recording));
        }
        if let Some(burial) = burial {
            self.tell_end(burial);
        }
    }

    /// Leaves the threads to themselves that wait for a disk for too long.
    pub(super) fn give_up_recordings(&mut self, now: Instant, soonest: &mut Option<Instant>) {
        let late: Vec<u64> = self
            .unwritten
            .iter()
            .filter(|(_, unwritten)| unwritten.deadline <= now)
            .map(|(&id, unwritten)| {
                let ms = DEADLINE.as_millis() as u64;
                unwritten
                    .recording
                    .ended(Err(PagerError::Timeout { what: "the recording was not written", ms }));
                id
            })
            .collect();
        for id in late {
            self.recording_over(id);
        }
        for unwritten in self.unwritten.values() {
            *soonest = earlier(*soonest, unwritten.deadline);
        }
    }
}

fn outcome(recording: &Recording) -> Result<(), PagerError> {
    match recording.state() {
        RecordingState::Failed(error) => Err(error),
        RecordingState::Running | RecordingState::Written => Ok(()),
    }
}
