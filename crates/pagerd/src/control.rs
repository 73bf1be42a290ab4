//! What the daemon was given by its holder: the control socket, who may use it, and the line to the holder itself.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{SockFlag, accept4};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Uid;
use pager::PagerError;
use uffd::fd_passing::{self, Credentials};

use serde_json::Value;

use crate::args::Confinement;
use crate::channel::{Channel, ChannelError, Go, Message, Unfit, Upgraded};
use crate::confine::confine;
use crate::heir::Heir;
use crate::keeping::Line;
use crate::kept::Kept;
use crate::signals::Signals;

/// The listening socket's key among what is kept.
pub(crate) const LISTENER: &str = "listener";

/// Somebody may be about to connect to a daemon that nobody would start again.
const LONELY: Duration = Duration::from_secs(60);

/// Heirs of one daemon; whatever ends them would end others, too.
const MOST_HEIRS: usize = 32;

pub(crate) struct Control {
    pub(crate) listener: OwnedFd,
    pub(crate) epoch: u64,
    pub(crate) takeover: bool,
    pub(crate) line: Arc<Line>,
    signals: Signals,
    go: Go,
    told_lost: bool,
    heir: Option<Heir>,
    alive_at: Instant,
    heirs: usize,
    /// What was given up.
    pub(crate) confined: Value,
    /// CLOCK_MONOTONIC, in milliseconds.
    pub(crate) serving_since: Option<f64>,
}

/// What the holder says while the daemon runs.
pub(crate) enum FromHolder {
    Nothing,
    Stop,
    /// Whether another executable could take this daemon's place.
    Proved(Option<Unfit>),
    Lost,
}

impl Control {
    /// Takes everything that the holder has, until it says to begin, and gives up what it says.
    ///
    /// # Errors
    ///
    /// That the holder is gone; or what cannot be.
    pub(crate) fn receive(channel: Channel, signals: Signals) -> Result<(Self, Vec<Kept>), ChannelError> {
        let failed = |what: &dyn std::fmt::Display| ChannelError::Failed(what.to_string());
        let mut listener = None;
        let mut kept = Vec::new();
        let mut confined = None;
        let go = loop {
            match channel.receive()? {
                Some((Message::Prepare(level), _)) => {
                    confined = Some(give_up(level));
                    // One that does not hear it starts it all the same.
                    let _ = channel.send(&Message::Prepared, &[]);
                }
                None => wait_for(channel.as_fd()).map_err(|errno| failed(&errno))?,
                Some((Message::Go(go), _)) => break go,
                Some((Message::Keep { key, .. }, mut fds)) if key == LISTENER => listener = fds.pop(),
                Some((Message::Keep { key, value }, fds)) => kept.push(Kept { key, value, fds }),
                Some(_) => {}
            }
        };
        let listener = listener.ok_or_else(|| failed(&"the holder gave no listening socket"))?;
        // Before there is another thread.
        let confined = confined.unwrap_or_else(|| give_up(go.confine));
        let (epoch, takeover) = (go.epoch, go.takeover);
        Ok((
            Self {
                listener,
                epoch,
                takeover,
                line: Arc::new(Line::new(channel)),
                signals,
                go,
                told_lost: false,
                heir: None,
                alive_at: Instant::now(),
                heirs: 0,
                confined,
                serving_since: None,
            },
            kept,
        ))
    }

    pub(crate) fn holder(&self) -> Option<BorrowedFd<'_>> {
        (!self.line.is_lost() || !self.told_lost).then(|| self.line.channel().as_fd())
    }

    /// Readable when a signal says to stop.
    pub(crate) fn stop(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    pub(crate) fn signalled(&self) -> bool {
        self.signals.came()
    }

    /// Says that clients are answered from now on.
    ///
    /// # Errors
    ///
    /// A holder that takes nothing.
    pub(crate) fn serving(&mut self) -> Result<(), PagerError> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).ok();
        self.serving_since = now.map(|now| now.as_secs_f64() * 1000.0);
        self.line.say(&Message::Serving, &[])
    }

    /// The holder's process, while it lives.
    pub(crate) fn holder_pid(&self) -> Option<i32> {
        (!self.line.is_lost()).then_some(self.go.holder)
    }

    /// How the last upgrades ended; `None` of a holder that is too old to say, and starts whatever it is told.
    pub(crate) fn upgrades(&self) -> Option<&[Upgraded]> {
        self.go.upgrades.as_deref()
    }

    pub(crate) fn hear(&mut self) -> FromHolder {
        match self.line.channel().receive() {
            Ok(Some((Message::Stop, _))) => FromHolder::Stop,
            Ok(Some((Message::Proved { unfit }, _))) => FromHolder::Proved(unfit),
            Ok(_) => FromHolder::Nothing,
            Err(_) => {
                self.line.lose();
                self.told_lost = true;
                FromHolder::Lost
            }
        }
    }

    /// Says to a holder that wants to hear it that this process's loop turns; how long until it is to be said again.
    pub(crate) fn say_alive(&mut self) -> Option<Duration> {
        let every = self.go.alive_every.filter(|_| !self.line.is_lost()).map(Duration::from_millis)?;
        let left = self.alive_at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // One that takes nothing is no better off for it.
            let _ = self.line.say(&Message::Alive, &[]);
            self.alive_at = Instant::now() + every;
            return Some(every);
        }
        Some(left)
    }

    /// For how long this process stays once its holder is gone and there is nothing to do.
    pub(crate) fn lonely_for(&self) -> Duration {
        self.go.lonely_for.map_or(LONELY, Duration::from_millis)
    }

    /// Whether the holder is gone, and another will be started that finds everything.
    pub(crate) fn is_succeeded(&self) -> bool {
        self.line.is_lost() && self.go.stored
    }

    /// Starts who hands on what this process's table has when it dies, unless too many of those have died.
    pub(crate) fn start_heir(&mut self) {
        self.heir = None;
        if self.heirs >= MOST_HEIRS {
            return crate::log(format_args!(
                "{MOST_HEIRS} heirs of this daemon have died: there is no other"
            ));
        }
        self.heirs += 1;
        match Heir::start(self.line.channel().as_fd(), self.listener.as_fd()) {
            Ok(heir) => {
                let _ = self.line.say(&Message::Heir, &[heir.as_fd()]);
                self.heir = Some(heir);
            }
            Err(errno) => crate::log(format_args!(
                "no process could be started that shares this daemon's descriptors ({errno}): a child that is forked in \
                 the very moment in which the daemon dies would be lost"
            )),
        }
    }

    /// Readable when the heir has ended.
    pub(crate) fn heir(&self) -> Option<BorrowedFd<'_>> {
        self.heir.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn may_connect(&self, uid: u32) -> bool {
        uid == Uid::effective().as_raw() || self.go.allow.contains(&uid)
    }

    /// The next client, nonblocking; `None` when nobody waits.
    pub(crate) fn accept(&self) -> Option<(OwnedFd, Credentials)> {
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let raw = match accept4(self.listener.as_raw_fd(), flags) {
                Ok(raw) => raw,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                // EAGAIN; or no descriptor is free, and it waits.
                Err(_) => return None,
            };
            // SAFETY: accept4 has just returned this descriptor; nobody else knows of it.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            if let Ok(credentials) = fd_passing::peer_credentials(socket.as_fd()) {
                return Some((socket, credentials));
            }
        }
    }
}

fn give_up(level: Confinement) -> Value {
    // An heir that ends is nobody's to wait for.
    // SAFETY: no handler of this program is replaced, and none runs.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    confine(level)
}

fn wait_for(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}
