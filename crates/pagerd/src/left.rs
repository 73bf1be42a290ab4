//! What a daemon's table had that nobody else has: kept by the holder until the next daemon has made something of it.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{UnixAddr, getsockname};
use nix::sys::stat::fstat;
use pager::{FailurePolicy, LeftBehind};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::holder::same_open_file;
use crate::kept::{Kept, take};

/// Begins its key.
pub(crate) const LEFT: &str = "left:";

/// One descriptor; or, without a number, that this is all.
#[derive(Debug, Serialize, Deserialize)]
struct LeftValue {
    process: i32,
    number: Option<i32>,
}

/// All of it.
#[derive(Default)]
pub(crate) struct Left {
    pub(crate) children: LeftBehind,
    /// Connections that were accepted, and no more.
    sockets: Vec<OwnedFd>,
}

impl Left {
    /// Takes it out of what was kept.
    pub(crate) fn take(kept: &mut Vec<Kept>) -> Self {
        let mut all = Self::default();
        for Kept { value, mut fds, .. } in take(kept, LEFT) {
            let Ok(LeftValue { process, number }) = serde_json::from_value(value) else { continue };
            match (number, fds.pop()) {
                (Some(_), Some(fd)) if getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok() => {
                    all.sockets.push(fd)
                }
                (Some(number), Some(fd)) => all.children.add(process, number, fd),
                _ => all.children.is_whole(process),
            }
        }
        all
    }

    /// Each connection, with the one server among those kept that is bound to its name, and the policy of that.
    pub(crate) fn servers(&self, kept: &[Kept]) -> Vec<(OwnedFd, Option<(u64, FailurePolicy)>)> {
        let named: Vec<_> = kept.iter().filter_map(server_of).collect();
        let bound_to = |name: Option<UnixAddr>| {
            let mut these = named.iter().filter(|(_, of, _)| name.is_some_and(|name| name == *of));
            // With two of them nobody knows which image it is.
            these.next().filter(|_| these.next().is_none()).map(|&(server, _, policy)| (server, policy))
        };
        let sockets = self.sockets.iter().filter_map(|socket| socket.try_clone().ok());
        sockets
            .map(|socket| {
                let server = bound_to(getsockname(socket.as_raw_fd()).ok());
                (socket, server)
            })
            .collect()
    }
}

fn server_of(kept: &Kept) -> Option<(u64, UnixAddr, FailurePolicy)> {
    let (number, policy) = kept.server()?;
    let name = getsockname(kept.fds.first()?.as_raw_fd()).ok()?;
    Some((number, name, policy))
}

/// Keeps what the table of a process had, unless it is kept already.
pub(crate) fn keep(kept: &mut Vec<Kept>, process: i32, numbers: &[i32], fds: Vec<OwnedFd>, all: bool) {
    let one = |number: Option<i32>, fds| Kept {
        key: format!("{LEFT}{process}:{}", number.unwrap_or(-1)),
        value: json!(LeftValue { process, number }),
        fds,
    };
    for (&number, fd) in numbers.iter().zip(fds) {
        if !is_kept(&fd, kept) {
            kept.push(one(Some(number), vec![fd]));
        }
    }
    if all {
        kept.push(one(None, Vec::new()));
    }
}

/// Whether `fd` is the same open file as one of those that are kept.
fn is_kept(fd: &OwnedFd, kept: &[Kept]) -> bool {
    let Ok(of) = fstat(fd) else { return false };
    kept.iter().flat_map(|kept| &kept.fds).any(|other| {
        let alike = fstat(other).is_ok_and(|other| (other.st_dev, other.st_ino) == (of.st_dev, of.st_ino));
        // On older kernels all of their kind have one inode. Where the kernel does not say, that has to do.
        alike && same_open_file(fd, other).unwrap_or(true)
    })
}
