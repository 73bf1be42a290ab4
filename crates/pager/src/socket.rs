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
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, accept4, bind,
    getsockname, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Uid, fchownat};
use uffd::errno_of;

use crate::error::PagerError;

/// Bytes of `sun_path`, less the terminating NUL.
const LONGEST_PATH: usize = 107;
/// Written by anybody but the owner.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// A listening Unix stream socket. Dropping it closes it and, if it was made here, removes its path, unless something
/// else lies there by now.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// Empty where it has none.
    path: PathBuf,
    /// Device and inode of the path, if that is this listener's to remove.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// `socket(2)`, `bind(2)`, `listen(2)` at `path`, for connections of processes of `peer_uid`; of the caller's own
    /// user where absent.
    ///
    /// # Errors
    ///
    /// [`PagerError::Socket`] with the call that failed, its errno, and what to do.
    pub fn bind(path: &Path, peer_uid: Option<u32>) -> Result<Self, PagerError> {
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
        let listener = Self { socket, path: path.to_owned(), identity: Some(identity) };
        if let Some(uid) = peer_uid.map(Uid::from_raw).filter(|&uid| uid != Uid::effective()) {
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(AT_FDCWD, path, Some(uid), None, flags).map_err(failed(
                "chown",
                "only root can give the socket to another user; run as that user instead",
            ))?;
        }
        listen(&listener.socket, Backlog::MAXCONN)
            .map_err(failed("listen", "the socket cannot be listened on"))?;
        Ok(listener)
    }

    /// Checks that `socket`, which somebody else has made, can be served: a listening Unix stream socket.
    ///
    /// # Errors
    ///
    /// [`PagerError::Socket`] with what it is not.
    pub fn check(socket: BorrowedFd<'_>) -> Result<(), PagerError> {
        let refused = |syscall| {
            move |errno| PagerError::Socket {
                path: named(socket),
                syscall,
                errno,
                hint: "pass a listening Unix stream socket",
            }
        };
        let address: SockaddrStorage = getsockname(socket.as_raw_fd()).map_err(refused("getsockname"))?;
        if address.family() != Some(AddressFamily::Unix) {
            return Err(refused("getsockname")(Errno::EAFNOSUPPORT));
        }
        if getsockopt(&socket, sockopt::SockType).map_err(refused("getsockopt"))? != SockType::Stream {
            return Err(refused("getsockopt")(Errno::EPROTOTYPE));
        }
        if !getsockopt(&socket, sockopt::AcceptConn).map_err(refused("getsockopt"))? {
            return Err(refused("accept")(Errno::EINVAL));
        }
        Ok(())
    }

    /// Serves a socket that somebody else has made ([`Listener::check`]). It is made nonblocking, which whoever else has
    /// it sees, and close-on-exec. Who may reach it was decided by its maker; its path stays when it is dropped.
    ///
    /// # Errors
    ///
    /// As [`Listener::check`]. The socket is closed then.
    pub fn inherit(socket: OwnedFd) -> Result<Self, PagerError> {
        Self::check(socket.as_fd())?;
        let failed = |errno| PagerError::Socket {
            path: named(socket.as_fd()),
            syscall: "fcntl",
            errno,
            hint: "the socket cannot be made nonblocking",
        };
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL).map_err(failed)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(failed)?;
        fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(failed)?;
        let address: Option<UnixAddr> = getsockname(socket.as_raw_fd()).ok();
        let path = address.as_ref().and_then(UnixAddr::path).map(Path::to_owned).unwrap_or_default();
        Ok(Self { socket, path, identity: None })
    }

    /// The socket for another process to serve. Its path stays: who made it removes it.
    ///
    /// # Errors
    ///
    /// When no descriptor is free; the path is removed then.
    pub fn into_fd(mut self) -> std::io::Result<OwnedFd> {
        let socket = self.socket.try_clone()?;
        self.identity = None;
        Ok(socket)
    }

    /// Where it listens; empty for an inherited socket without a path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
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
        let Some(identity) = self.identity else { return };
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == identity);
        if ours {
            // Whoever removed it in between did what this was about to do.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What an inherited socket is called in errors.
fn named(socket: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("(descriptor {})", socket.as_raw_fd()))
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn refused(path: &Path) -> (&'static str, Errno) {
        match Listener::bind(path, None).unwrap_err() {
            PagerError::Socket { syscall, errno, .. } => (syscall, errno),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_socket_is_private_and_removed_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");

        let listener = Listener::bind(&path, None).unwrap();

        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_taken_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, socket) = (dir.path().join("file"), dir.path().join("socket"));
        fs::write(&file, "precious").unwrap();
        let _other = Listener::bind(&socket, None).unwrap();

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

        let _listener = Listener::bind(&path, None).unwrap();

        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_listener_does_not_remove_what_took_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();

        drop(listener);

        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }

    #[test]
    fn an_inherited_socket_is_closed_but_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let made = std::os::unix::net::UnixListener::bind(&path).unwrap();

        let listener = Listener::inherit(made.into()).unwrap();

        assert_eq!(listener.path(), path);
        assert!(listener.accept().unwrap().is_none(), "nobody waits, and neither does this");
        let _connection = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(path.exists());
        assert!(UnixStream::connect(&path).is_err(), "nobody listens any more");
    }

    #[test]
    fn what_is_no_listening_unix_stream_socket_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |fd: OwnedFd| match Listener::check(fd.as_fd()).unwrap_err() {
            PagerError::Socket { syscall, errno, path, .. } => {
                assert_eq!(path, named(fd.as_fd()));
                (syscall, errno)
            }
            other => panic!("{other}"),
        };
        let datagram = std::os::unix::net::UnixDatagram::bind(dir.path().join("d")).unwrap();

        assert_eq!(refused(fs::File::open("/dev/null").unwrap().into()), ("getsockname", Errno::ENOTSOCK));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(refused(tcp.into()), ("getsockname", Errno::EAFNOSUPPORT));
        assert_eq!(refused(datagram.into()), ("getsockopt", Errno::EPROTOTYPE));
        assert_eq!(refused(UnixStream::pair().unwrap().0.into()), ("accept", Errno::EINVAL));
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
