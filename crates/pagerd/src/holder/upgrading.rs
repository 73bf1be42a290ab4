//! Other executables than this one. One is started beside the daemon, and has to have come as far as a daemon that waits before the daemon
//! ends for it; one that then does not come to serve gives its place back.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::{Holder, ending};
use crate::channel::{ChannelError, Message, Unfit, Upgraded};
use crate::running::{NotStarted, Running};

/// How long one may take until it is as far as a daemon that waits.
const PROVING: Duration = Duration::from_secs(5);
/// What has hung up ends, or is ended.
const HUNG_UP: Duration = Duration::from_millis(100);
/// Outcomes that daemons are told.
const MOST_OUTCOMES: usize = 16;

#[derive(Default)]
pub(super) struct Executables {
    /// In the place of this very executable.
    current: Option<String>,
    /// What it has replaced, until it serves.
    before: Option<Option<String>>,
    /// To take the daemon's place.
    pub(super) candidate: Option<Candidate>,
}

pub(super) struct Candidate {
    executable: String,
    running: Running,
    proved: bool,
}

impl Executables {
    pub(super) fn current(&self) -> Option<&str> {
        self.current.as_deref()
    }

    /// What is to be waited for.
    pub(super) fn candidate(&self) -> Option<PollFd<'_>> {
        self.candidate.as_ref().map(|one| PollFd::new(one.running.channel.as_fd(), PollFlags::POLLIN))
    }

    /// How long the candidate still has.
    pub(super) fn left(&self) -> Option<Duration> {
        let candidate = self.candidate.as_ref().filter(|candidate| !candidate.proved)?;
        Some(PROVING.saturating_sub(candidate.running.since.elapsed()).max(Duration::from_millis(1)))
    }

    /// The current one serves: it is not what it has replaced that is started when it dies.
    pub(super) fn serve(&mut self) {
        self.before = None;
    }
}

impl Candidate {
    /// Whether it has said that it waits; or why it never will.
    fn look(&mut self) -> Result<bool, String> {
        loop {
            match self.running.channel.receive() {
                Ok(Some((Message::Prepared, _))) => self.proved = true,
                Ok(Some(_)) => {}
                Ok(None) if self.proved => return Ok(true),
                Ok(None) if self.running.since.elapsed() < PROVING => return Ok(false),
                Ok(None) => return Err(format!("it was not ready within {} s", PROVING.as_secs())),
                Err(ChannelError::Closed) => {
                    let _ = self.running.process.wait(HUNG_UP);
                    return Err(match self.running.child.0.try_wait() {
                        Ok(Some(status)) => format!("it ended before it was ready ({})", ending(status)),
                        _ => "it hung up before it was ready".to_owned(),
                    });
                }
                Err(ChannelError::Failed(why)) => return Err(format!("it is not understood: {why}")),
            }
        }
    }
}

impl Holder {
    /// Starts what is to take the daemon's place, and says to the daemon why it could not.
    pub(super) fn prove(&mut self, executable: String, running: &Running) {
        // Another has the daemon's place already.
        if running.upgrading {
            return;
        }
        self.executables.candidate = None;
        match self.start_waiting(Some(&executable)) {
            Ok(waiting) => {
                self.executables.candidate = Some(Candidate { executable, running: waiting, proved: false });
            }
            Err(NotStarted { what, error }) => {
                let errno = error.raw_os_error();
                let why = errno.map_or_else(|| error.to_string(), |errno| Errno::from_raw(errno).to_string());
                let system = errno.map(|errno| (what.to_owned(), errno));
                tell(running, Some(Unfit { why: format!("{what}: {why}"), system }));
            }
        }
    }

    /// Says to the daemon what has come of it.
    pub(super) fn look_at_candidate(&mut self, running: &Running) {
        let Some(candidate) = &mut self.executables.candidate else { return };
        let known = candidate.proved;
        match candidate.look() {
            Ok(true) if !known => tell(running, None),
            Ok(_) => {}
            Err(why) => {
                self.executables.candidate = None;
                // One that was proved is missed when it is its turn.
                if !known {
                    tell(running, Some(Unfit { why, system: None }));
                }
            }
        }
    }

    /// Ends the daemon for another executable; not for one that cannot be started.
    pub(super) fn upgrade(&mut self, executable: String, running: &mut Running) {
        if self.stopping {
            return;
        }
        let proved = self.executables.candidate.take();
        let proved = proved.filter(|candidate| candidate.proved && candidate.executable == executable);
        let next = match proved.map_or_else(|| self.start_waiting(Some(&executable)), |one| Ok(one.running)) {
            Ok(next) => next,
            Err(error) => {
                return crate::log(format_args!("{executable}: {error}: the daemon that is there goes on"));
            }
        };
        self.spare = Some(next);
        self.executables.before = Some(self.executables.current.replace(executable));
        let outcomes = self.go.upgrades.get_or_insert_default();
        outcomes.drain(..(outcomes.len() + 1).saturating_sub(MOST_OUTCOMES));
        outcomes.push(Upgraded { from: self.go.epoch, failed: None });
        running.upgrading = true;
        // The same path as any other death, on purpose: there is no second way that could be wrong.
        let _ = running.process.send_signal(libc::SIGKILL);
    }

    /// The one before the current takes its place again, because that did not come to serve; which that was, where there was one.
    pub(super) fn gives_up_executable(&mut self, how: &str) -> Option<String> {
        let executable = self.executables.current.take()?;
        let Some(before) = self.executables.before.take() else { return Some(executable) };
        self.executables.current = before;
        if let Some(outcome) = self.go.upgrades.as_mut().and_then(|outcomes| outcomes.last_mut()) {
            outcome.failed = Some(format!("it ended before it served ({how})"));
        }
        Some(executable)
    }

    /// Starts a daemon: of the current executable, or of this very one where that is not there any more.
    pub(super) fn start_any(&mut self) -> Result<Running, NotStarted> {
        let started = Running::start(self.executables.current());
        let (Err(error), Some(executable)) = (&started, self.executables.current()) else { return started };
        // What hinders this one, too, is not the executable.
        let own = Running::start(None)?;
        crate::log(format_args!("{executable}: {error}: the holder's own executable serves again"));
        self.gives_up_executable("it could not be started");
        self.executables.current = None;
        Ok(own)
    }

    /// Starts one that does everything that does not depend on what it will be given, and waits for that.
    pub(super) fn start_waiting(&self, executable: Option<&str>) -> Result<Running, NotStarted> {
        let waiting = Running::start(executable)?;
        // One that is dead by now is noticed by its end.
        let _ = waiting.channel.send(&Message::Prepare(self.go.confine), &[]);
        Ok(waiting)
    }
}

/// One that does not hear it has ended, or is to.
fn tell(running: &Running, unfit: Option<Unfit>) {
    let _ = running.channel.send(&Message::Proved { unfit }, &[]);
}
