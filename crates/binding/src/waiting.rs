//! Waiting for descriptors without holding up JavaScript, in slices: what was given up ends within one.

use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use uffd::fd_passing::{FdPassingError, peer_credentials, recv_exact, send_all};
use uffd::liveness::{LivenessError, PidFd};

use crate::environment::UFFDS;
use crate::failures;
use crate::jobs::{self, Product, WAITS};
use crate::operations::wait;
use crate::values::{NativeError, NativePeer};
use crate::views::View;

/// The longest that one job waits.
const SLICE: Duration = Duration::from_millis(100);

/// Whether there are events, after at most `milliseconds` (100 at most).
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn uffd_wait_async<'env>(env: &'env Env, handle: f64, milliseconds: u32) -> Result<Object<'env>> {
    jobs::run(env, &WAITS, move || {
        let uffd = UFFDS.get(handle).ok_or_else(|| failures::closed("userfaultfd"))?;
        match wait(&uffd, milliseconds) {
            ready @ 0.0.. => Ok(Product { ready: Some(ready > 0.0), ..Product::default() }),
            errno => Err(failures::system("poll", &std::io::Error::from_raw_os_error(-errno as i32))),
        }
    })
}

/// A process, whatever its number is reused for.
#[napi]
pub struct NativeProcess {
    pidfd: Arc<PidFd>,
}

#[napi(object, object_from_js = false)]
pub struct NativePeerResult {
    pub error: Option<NativeError>,
    pub peer: Option<NativePeer>,
    pub pidfd: Option<i32>,
}

/// Why there is no pidfd of a process: ESRCH where it is gone.
fn gone(error: &LivenessError) -> NativeError {
    match error {
        LivenessError::Gone => NativeError {
            code: "ERR_UFFD_CLOSED".to_owned(),
            message: "the process is gone".to_owned(),
            errno: Some(libc::ESRCH),
            syscall: Some("pidfd_open".to_owned()),
            hint: None,
            causes: None,
        },
        LivenessError::System { syscall, source } => failures::system(syscall, source),
        _ => failures::system("pidfd_open", &std::io::Error::from_raw_os_error(libc::EIO)),
    }
}

/// A process, or why there is none.
#[napi(object, object_from_js = false)]
pub struct NativePinned {
    pub error: Option<NativeError>,
    pub process: Option<NativeProcess>,
}

fn pinned(found: std::result::Result<PidFd, LivenessError>) -> NativePinned {
    match found {
        Ok(pidfd) => NativePinned { error: None, process: Some(NativeProcess { pidfd: Arc::new(pidfd) }) },
        Err(error) => NativePinned { error: Some(gone(&error)), process: None },
    }
}

#[napi]
impl NativeProcess {
    /// ESRCH where the process is gone already.
    #[napi(catch_unwind)]
    pub fn open(pid: i32) -> NativePinned {
        pinned(PidFd::open(pid))
    }

    /// By a pidfd of JavaScript's, which stays JavaScript's.
    #[napi(catch_unwind)]
    pub fn of_pidfd(pidfd: i32) -> NativePinned {
        match copy(pidfd) {
            Ok(fd) => pinned(PidFd::from_fd(fd)),
            Err(error) => NativePinned { error: Some(error), process: None },
        }
    }

    /// Whether it has exited, after at most 100 ms.
    #[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
    pub fn wait<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        let pidfd = Arc::clone(&self.pidfd);
        jobs::run(env, &WAITS, move || match pidfd.wait(SLICE) {
            Ok(exited) => Ok(Product { ready: Some(exited), ..Product::default() }),
            Err(error) => Err(failures::system("poll", &error)),
        })
    }
}

fn passing(error: &FdPassingError) -> NativeError {
    let failure = |code: &str, errno| NativeError {
        code: code.to_owned(),
        message: error.to_string(),
        errno,
        syscall: None,
        hint: None,
        causes: None,
    };
    match error {
        FdPassingError::TimedOut { .. } | FdPassingError::WouldBlock => {
            failure("ERR_UFFD_TIMEOUT", Some(libc::ETIMEDOUT))
        }
        FdPassingError::System(error) => failures::system("sendmsg or recvmsg", error),
        FdPassingError::Closed { .. } => failure("ERR_UFFD_PROTOCOL", Some(libc::EPIPE)),
        _ => failure("ERR_UFFD_PROTOCOL", Some(libc::EPROTO)),
    }
}

/// A copy of a descriptor of JavaScript's, so that closing it meanwhile reaches no other file.
pub(crate) fn copy(fd: i32) -> std::result::Result<OwnedFd, NativeError> {
    let failed = |error: std::io::Error| failures::system("fcntl", &error);
    if fd < 0 {
        return Err(failed(std::io::Error::from_raw_os_error(libc::EBADF)));
    }
    // SAFETY: only borrowed for the call below, which refuses a number that is no open descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(failed)
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn send_descriptors<'env>(
    env: &'env Env,
    socket: i32,
    fds: Vec<i32>,
    #[napi(ts_arg_type = "Uint8Array")] payload: View,
    milliseconds: u32,
) -> Result<Object<'env>> {
    let mut bytes = vec![0_u8; payload.len];
    // SAFETY: a view is valid for its length during the call; the copy is ours.
    unsafe { std::ptr::copy_nonoverlapping(payload.data, bytes.as_mut_ptr(), payload.len) };
    let copied: std::result::Result<Vec<_>, _> = fds.into_iter().map(copy).collect();
    let given = copy(socket).and_then(|socket| Ok((socket, copied?)));
    jobs::run(env, &WAITS, move || {
        let (socket, fds) = given?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let time = Duration::from_millis(u64::from(milliseconds));
        send_all(socket.as_fd(), &bytes, &borrowed, time).map_err(|error| passing(&error))?;
        Ok(Product::default())
    })
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn receive_descriptors<'env>(
    env: &'env Env,
    socket: i32,
    len: u32,
    most: u32,
    milliseconds: u32,
) -> Result<Object<'env>> {
    let socket = copy(socket);
    jobs::run(env, &WAITS, move || {
        let mut bytes = vec![0_u8; len as usize];
        let time = Duration::from_millis(u64::from(milliseconds));
        let received = recv_exact(socket?.as_fd(), &mut bytes, most as usize, time);
        let fds = received.map_err(|error| passing(&error))?;
        Ok(Product { bytes: Some(bytes), fds: Some(fds), ..Product::default() })
    })
}

/// Who connected a socket.
#[napi(catch_unwind)]
pub fn credentials_of_peer(socket: i32) -> NativePeerResult {
    let found = copy(socket).and_then(|socket| {
        let read = peer_credentials(socket.as_fd());
        read.map_err(|error| failures::system("SO_PEERCRED", &error))
    });
    match found {
        Ok(peer) => {
            let peer = NativePeer { pid: peer.pid, uid: peer.uid, gid: peer.gid };
            NativePeerResult { error: None, peer: Some(peer), pidfd: None }
        }
        Err(error) => NativePeerResult { error: Some(error), peer: None, pidfd: None },
    }
}

/// A pidfd of who connected a socket; JavaScript's from then on.
#[napi(catch_unwind)]
pub fn pidfd_of_peer(socket: i32) -> NativePeerResult {
    let found = copy(socket).and_then(|socket| PidFd::of_peer(socket.as_fd()).map_err(|error| gone(&error)));
    match found {
        Ok(pidfd) => {
            let fd = OwnedFd::from(pidfd).into_raw_fd();
            NativePeerResult { error: None, peer: None, pidfd: Some(fd) }
        }
        Err(error) => NativePeerResult { error: Some(error), peer: None, pidfd: None },
    }
}
