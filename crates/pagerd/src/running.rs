//! A daemon as its holder knows it: the child process, and the line to it.

use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use uffd::liveness::PidFd;

use crate::channel::Channel;

/// What a service manager says to the holder alone.
const OF_THE_HOLDER: [&str; 8] = [
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "FDSTORE",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// The child, and the line to it. Killed, where it lives, and reaped when dropped.
pub(crate) struct Running {
    pub(crate) child: Reaped,
    pub(crate) process: PidFd,
    pub(crate) channel: Channel,
    pub(crate) since: Instant,
    /// It serves.
    pub(crate) serving: bool,
    /// It has said that it ends in order.
    pub(crate) stopping: bool,
    pub(crate) upgrading: bool,
    /// When it has last said that it is alive, if it ever has.
    pub(crate) alive_at: Option<Instant>,
    /// Who hands on what its table has.
    pub(crate) heir: Option<PidFd>,
}

/// A process that could not be started.
#[derive(Debug, thiserror::Error)]
#[error("a daemon cannot be started: {what}: {error}")]
pub(crate) struct NotStarted {
    /// The system call.
    pub(crate) what: &'static str,
    pub(crate) error: std::io::Error,
}

/// A child that leaves no zombie.
pub(crate) struct Reaped(pub(crate) Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both do nothing for one that was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts one: another executable, or this very one.
    ///
    /// # Errors
    ///
    /// What the system has refused.
    pub(crate) fn start(executable: Option<&str>) -> Result<Self, NotStarted> {
        let of = |what| move |errno: Errno| NotStarted { what, error: errno.into() };
        let (ours, theirs) = Channel::pair().map_err(of("socketpair"))?;
        let theirs = theirs.into_fd();
        // Only this one thread starts processes: no other child can inherit it.
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).map_err(of("fcntl"))?;
        let mut command = Command::new(executable.unwrap_or("/proc/self/exe"));
        for name in OF_THE_HOLDER {
            command.env_remove(name);
        }
        let child = command
            .args(["--daemon", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map(Reaped)
            .map_err(|error| NotStarted { what: "execve", error })?;
        drop(theirs);
        let process = PidFd::open(child.0.id() as i32)
            .map_err(|error| NotStarted { what: "pidfd_open", error: std::io::Error::other(error) })?;
        Ok(Self {
            child,
            process,
            channel: ours,
            since: Instant::now(),
            serving: false,
            stopping: false,
            upgrading: false,
            alive_at: None,
            heir: None,
        })
    }
}
