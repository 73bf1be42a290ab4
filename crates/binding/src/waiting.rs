//! Waiting for descriptors without holding up JavaScript, in slices: what was given up ends within one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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
use crate::operations::uffd_wait;
use crate::values::{NativeError, NativePeer};
use crate::views::View;

/// The longest that one job waits.
const SLICE: Duration = Duration::from_millis(100);

/// Whether there are events, after at most `milliseconds` (100 at most).
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn uffd_wait_async<'env>(env: &'env Env, handle: f64, milliseconds: u32) -> Result<Object<'env>> {
    jobs::run(env, &WAITS, move || match uffd_wait(handle, milliseconds) {
        ready @ 0.0.. => Ok(Product { ready: Some(ready > 0.0), ..Product::default() }),
        _ if UFFDS.get(handle).is_none() => Err(failures::closed("userfaultfd")),
        errno => {
            let error = std::io::Error::from_raw_os_error(-errno as i32);
            Err(failures::system("poll", &error))
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
}

/// Why there is no pidfd of a process: ESRCH where it is gone.
fn gone(error: &LivenessError) -> NativeError {
    match error {
        LivenessError::Gone => NativeError {
            code: "ERR_UFFD_CLOSED".to_owned(),
            message: "the process is gone".to_owned(),
            errno: Some(libc::ESRCH),
            syscall: Some("pidfd_open".to_owned()),
        },
        LivenessError::System { syscall, source } => failures::system(syscall, source),
        _ => failures::system("pidfd_open", &std::io::Error::from_raw_os_error(libc::EIO)),
    }
}

#[napi]
impl NativeProcess {
    /// `null` where the process is gone already.
    #[napi(catch_unwind)]
    pub fn open(pid: i32) -> Result<Option<NativeProcess>> {
        match PidFd::open(pid) {
            Ok(pidfd) => Ok(Some(Self { pidfd: Arc::new(pidfd) })),
            Err(LivenessError::Gone) => Ok(None),
            Err(error) => Err(napi::Error::from_reason(gone(&error).message)),
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

/// Copies of descriptors of JavaScript's, so that closing one meanwhile reaches no other file.
fn copies(fds: &[i32]) -> std::result::Result<Vec<OwnedFd>, NativeError> {
    let copy = |&fd: &i32| {
        if fd < 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: only borrowed for the call below, which refuses a number that is no open descriptor.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        borrowed.try_clone_to_owned()
    };
    fds.iter().map(copy).collect::<std::io::Result<_>>().map_err(|error| failures::system("fcntl", &error))
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
    let given = copies(&[socket]).and_then(|socket| Ok((socket, copies(&fds)?)));
    jobs::run(env, &WAITS, move || {
        let (socket, fds) = given?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        for socket in &socket {
            let time = Duration::from_millis(u64::from(milliseconds));
            send_all(socket.as_fd(), &bytes, &borrowed, time).map_err(|error| passing(&error))?;
        }
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
    let given = copies(&[socket]);
    jobs::run(env, &WAITS, move || {
        let mut bytes = vec![0_u8; len as usize];
        let mut fds = Vec::new();
        for socket in &given? {
            let time = Duration::from_millis(u64::from(milliseconds));
            let received = recv_exact(socket.as_fd(), &mut bytes, most as usize, time);
            fds = received.map_err(|error| passing(&error))?;
        }
        Ok(Product { bytes: Some(bytes), fds: Some(fds), ..Product::default() })
    })
}

/// Who connected a socket.
#[napi(catch_unwind)]
pub fn credentials_of_peer(socket: i32) -> NativePeerResult {
    let copied = copies(&[socket]);
    let failed = |error| NativePeerResult { error: Some(error), peer: None };
    match copied.as_deref() {
        Ok([socket, ..]) => match peer_credentials(socket.as_fd()) {
            Ok(peer) => {
                let peer = NativePeer { pid: peer.pid, uid: peer.uid, gid: peer.gid };
                NativePeerResult { error: None, peer: Some(peer) }
            }
            Err(error) => failed(failures::system("SO_PEERCRED", &error)),
        },
        _ => failed(failures::system("fcntl", &std::io::Error::from_raw_os_error(libc::EBADF))),
    }
}
