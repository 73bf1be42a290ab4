//! The socket that clients connect to, and what else a service manager passes when it starts this process: what an earlier one
//! has stored there.

use std::fs::{self, Permissions};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use pager::Listener;

use super::store;
use crate::args::Options;

/// `SD_LISTEN_FDS_START`.
const FIRST: i32 = 3;

/// What this process was started with.
pub(crate) struct Passed {
    pub(crate) listener: Listener,
    /// By the names under which it was stored.
    pub(crate) stored: Vec<(String, OwnedFd)>,
}

impl Passed {
    /// Binds the socket that the command line names, or takes the one that was passed.
    ///
    /// # Errors
    ///
    /// Why there is none, in words.
    pub(crate) fn take(options: &Options) -> Result<Self, String> {
        let (stored, mut sockets): (Vec<_>, Vec<_>) =
            passed().into_iter().partition(|(name, _)| store::is_ours(name));
        if let Some(path) = &options.socket {
            return Ok(Self { listener: bind(path, options)?, stored });
        }
        let words = |error: pager::PagerError| error.to_string();
        let (_, socket) = match (sockets.pop(), sockets.len()) {
            (Some(one), 0) => one,
            (None, _) => {
                return Err("no socket: say --socket PATH, or start it by socket activation".to_owned());
            }
            (Some(_), others) => {
                return Err(format!("{} sockets were passed (LISTEN_FDS); there can be one", others + 1));
            }
        };
        Listener::check(socket.as_fd()).map_err(words)?;
        Ok(Self { listener: Listener::inherit(socket).map_err(words)?, stored })
    }
}

fn bind(path: &Path, options: &Options) -> Result<Listener, String> {
    let listener = Listener::bind(path, None).map_err(|error| error.to_string())?;
    if !options.allow.is_empty() {
        // Who may reach it is said by its directory then, and who connects is asked.
        let mode = Permissions::from_mode(0o666);
        fs::set_permissions(path, mode).map_err(|error| format!("chmod of {}: {error}", path.display()))?;
    }
    Ok(listener)
}

/// `sd_listen_fds_with_names(3)`: each descriptor with its name, close-on-exec.
fn passed() -> Vec<(String, OwnedFd)> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let count = number("LISTEN_FDS").filter(|_| number("LISTEN_PID") == Some(std::process::id() as i32));
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut all = Vec::new();
    for raw in (FIRST..).take(count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0)) {
        let name = names.next().unwrap_or_default().to_owned();
        // SAFETY: only borrowed for the call below, which fails for what is no open descriptor.
        let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
        if fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
            continue;
        }
        // SAFETY: it is open, and by the protocol of socket activation it is this process's.
        all.push((name, unsafe { OwnedFd::from_raw_fd(raw) }));
    }
    all
}
