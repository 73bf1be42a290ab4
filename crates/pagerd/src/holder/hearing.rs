//! What daemons tell their holder, and what it tells those who wait for it.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde_json::json;
use uffd::liveness::PidFd;

use super::Holder;
use crate::channel::{ChannelError, Message};
use crate::kept::Kept;
use crate::running::Running;

/// How long a daemon's heir may take. What it does takes less than a millisecond; a machine that stalls stalls it, too.
const HEIR: Duration = Duration::from_secs(1);

/// What came of listening to a daemon.
#[derive(PartialEq, Eq)]
pub(super) enum Heard {
    Something,
    Nothing,
    /// Nothing can come any more.
    End,
}

impl Holder {
    /// Takes what the daemon that is dead has said, and what its heir says, which has its end of the line until it ends.
    pub(super) fn hear_the_last(&mut self, running: &mut Running) {
        let until = Instant::now() + HEIR;
        let mut late = false;
        loop {
            match self.hear(running) {
                Heard::Something => {}
                Heard::End => break,
                Heard::Nothing if late => break,
                Heard::Nothing => {
                    let left = until.saturating_duration_since(Instant::now()).as_millis();
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                    let mut fds = [PollFd::new(running.channel.as_fd(), PollFlags::POLLIN)];
                    late = matches!(poll(&mut fds, timeout), Ok(0));
                }
            }
        }
        let Some(heir) = running.heir.take() else { return };
        if late {
            crate::log(format_args!("the daemon's heir did nothing for {} ms", HEIR.as_millis()));
            let _ = heir.send_signal(libc::SIGKILL);
        }
        // It is this process's child since the daemon's end. Where it is not, another has waited for it; where that was before
        // it was told of here, it has no number, and -1 would be any child: the daemon.
        if heir.pid() > 0 {
            let _ = waitpid(Pid::from_raw(heir.pid()), None);
        }
    }

    /// Takes one message.
    pub(super) fn hear(&mut self, running: &mut Running) -> Heard {
        let (message, mut fds) = match running.channel.receive() {
            Ok(Some(came)) => came,
            Ok(None) => return Heard::Nothing,
            Err(ChannelError::Closed) => return Heard::End,
            Err(ChannelError::Failed(why)) => {
                crate::log(format_args!("a message of the daemon was not understood: {why}"));
                return Heard::Something;
            }
        };
        match message {
            Message::Keep { key, value } => self.custody.keep(Kept { key, value, fds }),
            Message::Forget { key } => self.custody.forget(&key),
            Message::Ended { key, end, value, still_open } => {
                self.custody.ended(&key, end, value, still_open);
            }
            Message::Serving => {
                running.serving = true;
                self.executables.serve();
                self.ready(running);
                self.keep_spare();
            }
            Message::Alive => running.alive_at = Some(Instant::now()),
            Message::Prove { executable } => self.prove(executable, running),
            Message::Upgrade { executable } => self.upgrade(executable, running),
            Message::Stopping => {
                self.stops();
                running.stopping = true;
            }
            Message::Heir => running.heir = fds.pop().and_then(|fd| PidFd::from_fd(fd).ok()),
            Message::Left { fds: numbers, all } => {
                self.custody.left(running.process.pid(), &numbers, fds, all);
            }
            Message::TakenOver => self.custody.left_is_taken_over(),
            // Of one that has waited for its turn.
            Message::Prepared => {}
            Message::Spilled { .. }
            | Message::Go(_)
            | Message::Prepare(_)
            | Message::Proved { .. }
            | Message::Stop => {}
        }
        Heard::Something
    }

    /// Says to a service manager that it ends, unless that was said.
    pub(super) fn stops(&mut self) {
        if !std::mem::replace(&mut self.told_stopping, true) {
            self.custody.notify().tell("STOPPING=1".to_owned(), None);
        }
    }

    /// Says once that clients can connect: to whoever started it, and to a service manager.
    fn ready(&mut self, running: &Running) {
        if std::mem::replace(&mut self.told_ready, true) {
            return;
        }
        let line = json!({
            "ready": true,
            "socket": self.listener.path(),
            "holder": std::process::id(),
            "daemon": running.process.pid(),
        });
        let mut stdout = std::io::stdout();
        let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        self.custody.notify().tell("READY=1".to_owned(), None);
    }
}
