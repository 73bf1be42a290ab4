//! Between the holder and the daemon: one JSON object a packet, with descriptors riding on it.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::args::Confinement;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uffd::fd_passing::{self, FdPassingError, MOST_FDS};

/// Bytes of a packet; what is longer rides in a memfd.
const LONGEST: usize = 32 << 10;
/// The other side does nothing but take packets: one that takes none for so long is stopped, or worse.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is said.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// Something that is to outlive the daemon; the holder gives it to each new one.
    Keep { key: String, value: Value },
    /// It is not needed any more.
    Forget { key: String },
    /// A session is over: `value` takes its place under the key `end`. With `still_open`, its descriptors stay until its process
    /// has ended.
    Ended { key: String, end: String, value: Value, still_open: bool },
    /// Start another executable beside the daemon, and say whether it could take its place.
    Prove { executable: String },
    /// What came of that: why it cannot, or nothing.
    Proved { unfit: Option<Unfit> },
    /// Have another executable take the daemon's place.
    Upgrade { executable: String },
    /// The value is in the last descriptor.
    Spilled { key: String },
    /// To a daemon that is to wait until it is needed: it gives up now what it will not need.
    Prepare(Confinement),
    /// It has, and waits.
    Prepared,
    /// The daemon's heir, whose pidfd comes along.
    Heir,
    /// What a daemon that is dead has had in its table, by the numbers there; `all` with the last of it.
    Left { fds: Vec<i32>, all: bool },
    /// What was left is kept otherwise, or over.
    TakenOver,
    /// That was all: begin.
    Go(Go),
    /// The daemon answers clients.
    Serving,
    /// The daemon's loop turns.
    Alive,
    /// End in order.
    Stop,
    /// The daemon ends in order: nothing of it is to be restarted.
    Stopping,
}

/// What the daemon needs to know.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Go {
    /// How many daemons there were before, from 1 on.
    pub(crate) epoch: u64,
    pub(crate) takeover: bool,
    pub(crate) holder: i32,
    /// Users beside the daemon's own that may connect.
    pub(crate) allow: Vec<u32>,
    pub(crate) confine: Confinement,
    /// What the holder keeps outlives it: in the service manager's store.
    #[serde(default)]
    pub(crate) stored: bool,
    /// How often it is to say that it is alive, in milliseconds; where it is to.
    #[serde(default)]
    pub(crate) alive_every: Option<u64>,
    /// For how long it stays without a holder and with nothing to do, in milliseconds; where it is not said, a minute.
    #[serde(default)]
    pub(crate) lonely_for: Option<u64>,
    /// How the last upgrades ended, of a holder that proves an executable before it ends the daemon.
    #[serde(default)]
    pub(crate) upgrades: Option<Vec<Upgraded>>,
}

/// Why an executable cannot take the daemon's place, in words; and which system call refused it, with what errno.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unfit {
    pub(crate) why: String,
    pub(crate) system: Option<(String, i32)>,
}

/// What came of replacing a daemon on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Upgraded {
    /// The epoch of the daemon that was replaced.
    pub(crate) from: u64,
    /// Why the new executable did not come to serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) failed: Option<String>,
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("the other side is gone")]
    Closed,
    #[error("{0}")]
    Failed(String),
}

impl From<FdPassingError> for ChannelError {
    fn from(error: FdPassingError) -> Self {
        match error {
            FdPassingError::Closed { .. } => Self::Closed,
            other => Self::Failed(other.to_string()),
        }
    }
}

impl Channel {
    /// Both ends, close-on-exec.
    pub(crate) fn pair() -> nix::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(one), Self(other)))
    }

    pub(crate) fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(crate) fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let text = serde_json::to_vec(message).map_err(|error| ChannelError::Failed(error.to_string()))?;
        if text.len() <= LONGEST {
            return Ok(fd_passing::send_all(self.0.as_fd(), &text, fds, PATIENCE)?);
        }
        let Message::Keep { key, value } = message else {
            return Err(ChannelError::Failed("a message is too long".to_owned()));
        };
        let failed = |error: std::io::Error| ChannelError::Failed(error.to_string());
        let memfd = fd_passing::in_memfd(c"uffd-kept", value.to_string().as_bytes()).map_err(failed)?;
        let fds: Vec<BorrowedFd<'_>> = fds.iter().copied().chain([memfd.as_fd()]).collect();
        self.send(&Message::Spilled { key: key.clone() }, &fds)
    }

    /// The next message; `None` when none has come yet.
    pub(crate) fn receive(&self) -> Result<Option<(Message, Vec<OwnedFd>)>, ChannelError> {
        let mut packet = vec![0; LONGEST];
        let received = match fd_passing::recv(self.0.as_fd(), &mut packet, MOST_FDS) {
            Ok(received) if received.len == 0 => return Err(ChannelError::Closed),
            Ok(received) => received,
            Err(FdPassingError::WouldBlock) => return Ok(None),
            // Said once, of another side that died with packets unread: what it has sent itself is still to come.
            Err(FdPassingError::System(error)) if error.kind() == ErrorKind::ConnectionReset => {
                return self.receive();
            }
            Err(error) => return Err(error.into()),
        };
        let text = packet.get(..received.len).unwrap_or_default();
        let failed = |error: &dyn std::fmt::Display| ChannelError::Failed(error.to_string());
        let mut fds = received.fds;
        let message = match serde_json::from_slice(text).map_err(|error| failed(&error))? {
            Message::Spilled { key } => {
                let file = File::from(fds.pop().ok_or_else(|| failed(&"a value did not come"))?);
                let len = file.metadata().map_err(|error| failed(&error))?.len();
                let mut text = vec![0; len as usize];
                file.read_exact_at(&mut text, 0).map_err(|error| failed(&error))?;
                Message::Keep { key, value: serde_json::from_slice(&text).map_err(|error| failed(&error))? }
            }
            message => message,
        };
        Ok(Some((message, fds)))
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_other_side_said_is_heard_although_it_died_with_packets_unread() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.send(&Message::Stop, &[]).unwrap();
        theirs.send(&Message::Serving, &[]).unwrap();

        drop(theirs);

        assert!(matches!(ours.receive(), Ok(Some((Message::Serving, _)))));
        assert!(matches!(ours.receive(), Err(ChannelError::Closed)));
    }
}
