//! What the pager reports: one variant per thing the caller does next, each with a stable code.
//!
//! The codes are the public ones (`ERR_UFFD_*`); the layers above carry them on unchanged.

use std::path::PathBuf;

use nix::errno::Errno;
use uffd::{AdoptError, UffdError, limit_behind};

/// Why a server did not start, a connection was turned away, or a session ended.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// A source could not be opened or read.
    #[error("{syscall} of {path}: {errno}: the memory image cannot be read")]
    Source {
        /// What was read.
        path: PathBuf,
        /// The system call that failed.
        syscall: &'static str,
        /// Its errno.
        #[source]
        errno: Errno,
    },
    /// A source holds fewer bytes than it did when it was opened, or than were asked for.
    #[error(
        "{path} has {actual} bytes, {expected} were expected: the image must not change while it is served"
    )]
    SourceTruncated {
        /// What was read.
        path: PathBuf,
        /// Bytes it had when it was opened.
        expected: u64,
        /// Bytes it has now.
        actual: u64,
    },
    /// A file was written to after it was opened as a source.
    #[error(
        "{path} was written to while it was served: the image must not change; write a new file beside it and rename that"
    )]
    SourceChanged {
        /// What was read.
        path: PathBuf,
    },
    /// A file of the wrong kind or size was given as a source.
    #[error("{path} cannot be a memory image: {reason}")]
    NotAnImage {
        /// The path given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A diff that cannot be laid over its base.
    #[error("diff {index} ({path}): {reason}")]
    Layer {
        /// Its position in the list of diffs.
        index: usize,
        /// The diff.
        path: PathBuf,
        /// What is wrong, with the values.
        reason: String,
        /// How opening it, or looking into it, has failed.
        #[source]
        cause: Option<Box<PagerError>>,
    },
    /// Bytes that cannot be laid over a source.
    #[error("overlay {index}: {reason}")]
    Overlay {
        /// Its position in the list of overlays.
        index: usize,
        /// What is wrong, with the values.
        reason: String,
    },
    /// An option of a source has a value it cannot have.
    #[error("{option} of {value}: {reason}")]
    SourceOption {
        /// The option.
        option: &'static str,
        /// The value given.
        value: u64,
        /// What it has to be.
        reason: &'static str,
    },
    /// A source went on failing for as long as it was to be tried again.
    #[error("the memory image could not be read in {attempts} attempts within {ms} ms; the last: {cause}")]
    GaveUp {
        /// How often it was read.
        attempts: u32,
        /// How long that took, in milliseconds.
        ms: u64,
        /// How the last attempt failed.
        #[source]
        cause: Box<PagerError>,
    },
    /// The listening socket could not be made.
    #[error("{syscall} of socket {path}: {errno}: {hint}")]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The system call that failed.
        syscall: &'static str,
        /// Its errno.
        #[source]
        errno: Errno,
        /// What to do.
        hint: &'static str,
    },
    /// A file is no recording of a working set, or a damaged one.
    #[error("{path} cannot be used as a recording: {reason}")]
    Trace {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A recording could not be read or written.
    #[error("{syscall} of recording {path}: {errno}")]
    TraceFile {
        /// The file.
        path: PathBuf,
        /// The system call that failed.
        syscall: &'static str,
        /// Its errno.
        #[source]
        errno: Errno,
    },
    /// A recording is of another image.
    #[error("{0}")]
    TraceImage(String),
    /// Which image a process gets could not be said.
    #[error("{0}")]
    NoImage(String),
    /// A region of the handshake is not acceptable.
    #[error("region {index}: {reason}")]
    Region {
        /// Position in the handshake's array.
        index: usize,
        /// What is wrong, with the values.
        reason: String,
    },
    /// The other side did not keep to the protocol.
    #[error("{0}")]
    Protocol(String),
    /// Well-formed, but not served by this version.
    #[error("{0}")]
    Unsupported(String),
    /// A process of another user connected.
    #[error(
        "process {pid} of uid {uid} connected, only uid {allowed} may; allow another with `peer: {{ uid }}`"
    )]
    PeerNotAllowed {
        /// The process.
        pid: i32,
        /// Its user.
        uid: u32,
        /// Who may connect.
        allowed: u32,
    },
    /// Something did not happen in time.
    #[error("{what} within {ms} ms")]
    Timeout {
        /// What did not happen.
        what: &'static str,
        /// The deadline, in milliseconds.
        ms: u64,
    },
    /// A limit was reached: sessions, descriptors, huge pages.
    #[error("{0}")]
    Exhausted(String),
    /// Whoever answers for a source failed, or answered wrongly.
    #[error("{0}")]
    Callback(String),
    /// A thread of the pager ended by a fault of its own.
    #[error("the pager's thread failed: {0}")]
    Internal(String),
    /// Whoever served this memory ended without closing the session.
    #[error("the program that served this memory ended without closing its sessions")]
    Abandoned,
    /// The server was closed before it could serve this process.
    #[error("the server was closed before the process was served")]
    Closed,
    /// This process may not do something to the one that is served.
    #[error("{what}: {errno}: it needs {needs}")]
    NoRight {
        /// What.
        what: &'static str,
        /// The right that it takes.
        needs: &'static str,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
    /// Not all of a session's memory is there.
    #[error("{pages} pages ({len} bytes) are missing")]
    PagesMissing {
        /// How many.
        pages: usize,
        /// Their bytes.
        len: u64,
    },
    /// The process exited before all of its memory was there that was to be before its session.
    #[error("the process exited before all of its memory was there")]
    PeerExited,
    /// The session that something was asked of is over, or never was.
    #[error("the session is over: ask before closing it, and not after its end was told")]
    SessionOver,
    /// The record of a session cannot be used, so that nobody can take the session over.
    #[error("the record of the session cannot be used: {0}")]
    Record(String),
    /// What another process says: why a session was ending when its pager was lost, as its successor found it written down; why a program has
    /// no image for a process.
    #[error("{message}")]
    Inherited {
        /// What had gone wrong.
        message: String,
        /// Its code.
        code: &'static str,
    },
    /// A system call of the pager's own failed.
    #[error("{syscall}: {errno}")]
    System {
        /// The system call.
        syscall: &'static str,
        /// Its errno.
        #[source]
        errno: Errno,
    },
    /// The kernel refused a userfaultfd operation on a range of the served process.
    #[error("{cause} at {address:#x} ({len} bytes)")]
    Kernel {
        /// Start of the range.
        address: u64,
        /// Its length in bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        cause: UffdError,
    },
    /// The descriptor that was handed over cannot be served.
    #[error("the descriptor handed over cannot be served: {0}")]
    Adopt(String),
    /// The same, as the kernel or a look at it has shown.
    #[error("the descriptor handed over cannot be served: {0}")]
    NotAdopted(#[source] AdoptError),
}

impl PagerError {
    /// The stable code of this error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Source { .. }
            | Self::SourceTruncated { .. }
            | Self::SourceChanged { .. }
            | Self::NotAnImage { .. }
            | Self::Callback(_)
            | Self::Layer { .. }
            | Self::Overlay { .. }
            | Self::SourceOption { .. }
            | Self::GaveUp { .. }
            | Self::NoImage(_) => "ERR_UFFD_SOURCE",
            Self::Trace { .. } | Self::TraceFile { .. } => "ERR_UFFD_TRACE",
            Self::TraceImage(_) => "ERR_UFFD_TRACE_IMAGE",
            Self::Socket { .. } => "ERR_UFFD_SOCKET",
            Self::Region { .. } => "ERR_UFFD_REGION",
            Self::Protocol(_) | Self::Adopt(_) | Self::NotAdopted(_) => "ERR_UFFD_PROTOCOL",
            Self::Unsupported(_) => "ERR_UFFD_UNSUPPORTED",
            Self::PeerNotAllowed { .. } => "ERR_UFFD_PEER_NOT_ALLOWED",
            Self::Timeout { .. } => "ERR_UFFD_TIMEOUT",
            Self::Exhausted(_) => "ERR_UFFD_EXHAUSTED",
            Self::Inherited { code, .. } => code,
            Self::Internal(_) | Self::Abandoned | Self::Record(_) => "ERR_UFFD_PAGER_LOST",
            Self::Closed | Self::SessionOver => "ERR_UFFD_USE_AFTER_CLOSE",
            Self::NoRight { .. } => "ERR_UFFD_NOT_PERMITTED",
            Self::PagesMissing { .. } => "ERR_UFFD_PAGES_MISSING",
            Self::PeerExited => "ERR_UFFD_CLOSED",
            Self::System { .. } => "ERR_UFFD_SYSTEM",
            Self::Kernel { cause, .. } => match cause {
                UffdError::System { errno: Errno::ENOMEM, .. } => "ERR_UFFD_EXHAUSTED",
                UffdError::UffdClosed => "ERR_UFFD_CLOSED",
                UffdError::NotRegistered => "ERR_UFFD_NOT_REGISTERED",
                _ => "ERR_UFFD_SYSTEM",
            },
        }
    }

    /// The errno behind it, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Source { errno, .. }
            | Self::Socket { errno, .. }
            | Self::TraceFile { errno, .. }
            | Self::System { errno, .. }
            | Self::NoRight { errno, .. } => Some(*errno as i32),
            Self::Kernel { cause, .. } => cause.errno(),
            Self::GaveUp { cause, .. } => cause.errno(),
            _ => None,
        }
    }

    /// The system call or ioctl behind it, where there is one.
    #[must_use]
    pub fn syscall(&self) -> Option<String> {
        match self {
            Self::Source { syscall, .. }
            | Self::Socket { syscall, .. }
            | Self::TraceFile { syscall, .. }
            | Self::System { syscall, .. } => Some((*syscall).to_owned()),
            Self::Kernel { cause, .. } => cause.operation().map(|operation| operation.to_string()),
            Self::GaveUp { cause, .. } => cause.syscall(),
            _ => None,
        }
    }
}

impl PagerError {
    /// What to do about it, where that is known: the limit that was reached.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Exhausted { .. } => None,
            _ => limit_behind(&self.syscall()?, self.errno()?),
        }
    }

    /// Whether the same read may well succeed a little later: EIO, EINTR, ETIMEDOUT, EAGAIN.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Source { errno: Errno::EIO | Errno::EINTR | Errno::ETIMEDOUT | Errno::EAGAIN, .. }
        )
    }
}

impl From<AdoptError> for PagerError {
    fn from(error: AdoptError) -> Self {
        Self::NotAdopted(error)
    }
}
