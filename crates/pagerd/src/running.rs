//! A daemon as its holder knows it: the child process, and the line to it.

use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

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
    /// What is missing for it, in words.
    pub(crate) fn start(executable: Option<&str>) -> Result<Self, String> {
        let words = |error: &dyn std::fmt::Display| format!("the daemon cannot be started: {error}");
        let (ours, theirs) = Channel::pair().map_err(|errno| words(&errno))?;
        let theirs = theirs.into_fd();
        // Only this one thread starts processes: no other child can inherit it.
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|errno| words(&errno))?;
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
            .map_err(|error| words(&error))?;
        drop(theirs);
        let process = PidFd::open(child.0.id() as i32).map_err(|error| words(&error))?;
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
