//! `userfaultfd-pagerd`: the pager in a process of its own, which its clients may come to and go from.
//!
//! The **holder** keeps descriptors and does nothing else; the **daemon**, its child, serves. Beside them wait the next daemon, and the
//! **heir** of this one, which shares its descriptors. When the daemon dies, the next goes on with everything that was kept.

mod args;
mod channel;
mod client;
mod confine;
mod control;
mod daemon;
mod feeds;
mod heir;
mod holder;
mod keeping;
mod kept;
mod left;
mod outbox;
mod plans;
mod policy;
mod protocol;
mod recordings;
mod requests;
mod resuming;
mod running;
mod serving;
mod sessions;
mod signals;
mod sources;
mod telling;
mod upgrades;
mod wire;

use std::fmt::Arguments;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_name;

use crate::args::Role;
use crate::channel::{Channel, ChannelError, Message};
use crate::control::Control;
use crate::daemon::Daemon;
use crate::signals::Signals;

/// Says something on standard error. Nobody may read it any more; that is no reason to end, nor to wait.
pub(crate) fn log(what: Arguments<'_>) {
    let stderr = std::io::stderr();
    let mut room = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if !matches!(poll(&mut room, PollTimeout::ZERO), Ok(1)) {
        return;
    }
    // In one piece, beside what others write.
    let line = format!("userfaultfd-pagerd[{}]: {what}\n", std::process::id());
    let _ = stderr.lock().write_all(line.as_bytes());
}

fn main() -> ExitCode {
    let outcome = match args::parse(std::env::args().skip(1)) {
        Ok(Role::Holder(options)) => holder::run(&options).inspect_err(|error| {
            // Who started it reads this line, whichever it is.
            let _ = writeln!(std::io::stdout(), "{}", serde_json::json!({ "error": error }));
        }),
        Ok(Role::Daemon(fd)) => serve(fd),
        Ok(Role::TryConfinement(level)) => {
            let _ = writeln!(std::io::stdout(), "{}", confine::try_out(level));
            return ExitCode::SUCCESS;
        }
        Ok(Role::Version) => {
            let _ = writeln!(std::io::stdout(), "userfaultfd-pagerd {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Role::Help) => {
            let _ = write!(std::io::stdout(), "{}", args::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            let _ = write!(std::io::stderr(), "userfaultfd-pagerd: {wrong}\n\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

/// The daemon's life.
fn serve(fd: i32) -> Result<(), String> {
    let words = |errno: nix::Error| errno.to_string();
    // What it was started as says nothing.
    let _ = set_name(c"uffd-daemon");
    let signals = Signals::take().map_err(words)?;
    // SAFETY: only borrowed for the call below, which fails for what is no open descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(words)?;
    // SAFETY: it is open, and nobody else in this new process knows of it: the holder passed it for this.
    let channel = Channel::of(unsafe { OwnedFd::from_raw_fd(fd) });
    let (mut control, kept) = match Control::receive(channel, signals) {
        Ok(received) => received,
        // It was to wait until it is needed, and never was.
        Err(ChannelError::Closed) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    // Before there is anything that only this table has.
    control.start_heir();
    let mut daemon = Daemon::new(control).map_err(|error| error.to_string())?;
    daemon.resume(kept);
    daemon.control.serving().map_err(|error| error.to_string())?;
    daemon.run().map_err(words)?;
    let said = daemon.control.line.say(&Message::Stopping, &[]);
    daemon.farewell();
    said.map_err(|error| error.to_string())
}
