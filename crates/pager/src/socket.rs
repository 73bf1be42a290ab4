//! The socket that hands out memory: who may reach it, and whose path it may take.
//!
//! It is mode 0600 from the moment it exists and lies in a directory that only its owner or root can change, so
//! nobody else can connect, or put a socket of their own in its place. A path where something else lies is
//! never cleared, except for a socket of the same user that nobody listens on any more.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Uid, chown};

use crate::error::PagerError;

/// Bytes of `sun_path`, less the terminating NUL.
const LONGEST_PATH: usize = 107;
/// Written by anybody but the owner.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// A listening Unix stream socket. Dropping it closes it and removes its path, unless something else lies there
/// by now.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    identity: (u64, u64),
}

impl Listener {
    /// `socket(2)`, `bind(2)`, `listen(2)` at `path`, for connections of processes of `peer_uid`.
    ///
    /// # Errors
    ///
    /// [`PagerError::Socket`] with the call that failed, its errno, and what to do.
    pub(crate) fn bind(path: &Path, peer_uid: Uid) -> Result<Self, PagerError> {
        let failed =
            |syscall, hint| move |errno| PagerError::Socket { path: path.to_owned(), syscall, errno, hint };
        if path.as_os_str().len() > LONGEST_PATH {
            return Err(failed("bind", "a socket's path has at most 107 bytes")(Errno::ENAMETOOLONG));
        }
        check_directory(path)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(failed("socket", "raise the limit of open files"))?;
        // The mode of an unbound socket becomes the mode of its file: there is no moment at which it is wider.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(failed("fchmod", "the socket cannot be made private"))?;
        let address = UnixAddr::new(path).map_err(failed("bind", "the path is not usable for a socket"))?;
        match bind(socket.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => {
                clear_stale(path)?;
                bind(socket.as_raw_fd(), &address)
            }
            bound => bound,
        }
        .map_err(failed("bind", "the directory must exist and be writable"))?;
        let identity = fs::symlink_metadata(path)
            .map(|meta| (meta.dev(), meta.ino()))
            .map_err(|error| failed("stat", "the socket vanished while it was made")(errno_of(&error)))?;
        // From here on dropping it removes the path.
        let listener = Self { socket, path: path.to_owned(), identity };
        if peer_uid != Uid::effective() {
            chown(path, Some(peer_uid), None).map_err(failed(
                "chown",
                "only root can give the socket to another user; run as that user instead",
            ))?;
        }
        listen(&listener.socket, Backlog::MAXCONN)
            .map_err(failed("listen", "the socket cannot be listened on"))?;
        Ok(listener)
    }

    /// The next connection, nonblocking and close-on-exec; `None` when nobody waits.
    ///
    /// # Errors
    ///
    /// EMFILE, ENFILE and ENOMEM leave the connection waiting.
    pub(crate) fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        loop {
            return match accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                Ok(raw) => {
                    use std::os::fd::FromRawFd;
                    // SAFETY: accept4 has just returned this descriptor; nobody else knows of it.
                    Ok(Some(unsafe { OwnedFd::from_raw_fd(raw) }))
                }
                Err(Errno::EAGAIN) => Ok(None),
                // Interrupted, or a connection that was gone before it was accepted.
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(errno) => Err(errno),
            };
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            // Whoever removed it in between did what this was about to do.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// In a directory that others can change, the socket could be replaced by theirs.
fn check_directory(path: &Path) -> Result<(), PagerError> {
    let failed = |errno, hint| PagerError::Socket { path: path.to_owned(), syscall: "stat", errno, hint };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let meta = fs::metadata(parent).map_err(|error| failed(errno_of(&error), "its directory must exist"))?;
    if !meta.is_dir() {
        return Err(failed(Errno::ENOTDIR, "its directory must exist"));
    }
    let owned = meta.uid() == 0 || meta.uid() == Uid::effective().as_raw();
    let guarded = meta.mode() & WRITABLE_BY_OTHERS == 0 || meta.mode() & STICKY != 0;
    if owned && guarded {
        return Ok(());
    }
    Err(failed(
        Errno::EACCES,
        "its directory can be changed by other users; use one of your own that only you can write (mode 0700)",
    ))
}

/// Removes a socket of this user that nobody listens on. Everything else stays.
fn clear_stale(path: &Path) -> Result<(), PagerError> {
    let in_use =
        |hint| PagerError::Socket { path: path.to_owned(), syscall: "bind", errno: Errno::EADDRINUSE, hint };
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    if !meta.file_type().is_socket() {
        return Err(in_use("something that is no socket lies there; it was left alone, choose another path"));
    }
    match UnixStream::connect(path) {
        Err(error)
            if error.kind() == ErrorKind::ConnectionRefused && meta.uid() == Uid::effective().as_raw() =>
        {
            fs::remove_file(path)
                .map_err(|_| in_use("a socket nobody listens on lies there and cannot be removed"))
        }
        _ => Err(in_use("another server is listening there; close it or choose another path")),
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn refused(path: &Path) -> (&'static str, Errno) {
        match Listener::bind(path, Uid::effective()).unwrap_err() {
            PagerError::Socket { syscall, errno, .. } => (syscall, errno),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_socket_is_private_and_removed_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");

        let listener = Listener::bind(&path, Uid::effective()).unwrap();

        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_taken_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, socket) = (dir.path().join("file"), dir.path().join("socket"));
        fs::write(&file, "precious").unwrap();
        let _other = Listener::bind(&socket, Uid::effective()).unwrap();

        assert_eq!(refused(&file), ("bind", Errno::EADDRINUSE));
        assert_eq!(refused(&socket), ("bind", Errno::EADDRINUSE));

        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert!(UnixStream::connect(&socket).is_ok());
    }

    #[test]
    fn a_socket_left_behind_by_a_dead_server_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the path behind");

        let _listener = Listener::bind(&path, Uid::effective()).unwrap();

        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_listener_does_not_remove_what_took_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path, Uid::effective()).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();

        drop(listener);

        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }

    #[test]
    fn bad_paths_and_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).unwrap();

        assert_eq!(refused(&dir.path().join("x".repeat(108))), ("bind", Errno::ENAMETOOLONG));
        assert_eq!(refused(&dir.path().join("absent/s")), ("stat", Errno::ENOENT));
        assert_eq!(refused(&shared.join("s")), ("stat", Errno::EACCES));
    }
}
