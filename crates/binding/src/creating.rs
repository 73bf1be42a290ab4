//! Userfaultfds come to be and go: the factory, adoption, clones, release, closing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use napi::{Env, Result};
use napi_derive::napi;
use uffd::{Backend, CreateOptions, Factory, Faults, Features, Userfaultfd};

use crate::environment::{self, UFFDS};
use crate::failures;
use crate::values::NativeError;

#[napi(object, object_to_js = false)]
pub struct NativeCreateOptions {
    pub non_blocking: bool,
    pub close_on_exec: bool,
    #[napi(ts_type = "'permitted' | 'all' | 'user'")]
    pub faults: String,
    pub require: Vec<String>,
    pub prefer: Vec<String>,
}

/// A userfaultfd, or why there is none.
#[napi(object, object_from_js = false)]
#[derive(Default)]
pub struct NativeUserfaultfd {
    pub error: Option<NativeError>,
    pub handle: f64,
    pub backend: Option<String>,
    pub user_mode_only: Option<bool>,
    pub enabled: Option<Vec<String>>,
    pub supported: Option<Vec<String>>,
}

impl NativeUserfaultfd {
    fn failed(error: impl Into<NativeError>) -> Self {
        Self { error: Some(error.into()), ..Self::default() }
    }

    fn of(handle: f64, uffd: &Userfaultfd) -> Self {
        let origin = uffd.origin();
        Self {
            error: None,
            handle,
            backend: origin.map(|origin| name(origin.backend).to_owned()),
            user_mode_only: origin.map(|origin| origin.user_mode_only),
            enabled: uffd.enabled_features().map(Features::names),
            supported: uffd.supported_features().map(Features::names),
        }
    }
}

fn name(backend: Backend) -> &'static str {
    match backend {
        Backend::Device => "device",
        Backend::Syscall => "syscall",
    }
}

fn features(names: &[String]) -> Features {
    names.iter().filter_map(|name| Features::of_name(name)).collect()
}

#[napi(object, object_from_js = false)]
pub struct NativeProbe {
    pub error: Option<NativeError>,
    pub features: Vec<String>,
    pub ioctls: Vec<String>,
}

#[napi]
pub struct NativeFactory {
    factory: Factory,
}

#[napi]
impl NativeFactory {
    #[napi(factory, catch_unwind)]
    pub fn open() -> Self {
        Self { factory: Factory::open() }
    }

    #[napi(factory, catch_unwind)]
    pub fn syscall_only() -> Self {
        Self { factory: Factory::syscall_only() }
    }

    /// Takes the descriptor over.
    #[napi(factory, catch_unwind)]
    pub fn from_device(fd: i32) -> Result<Self> {
        Ok(Self { factory: Factory::from_device(take_over(fd)?) })
    }

    #[napi(getter, catch_unwind)]
    pub fn backend(&self) -> String {
        name(self.factory.backend()).to_owned()
    }

    /// Why the device could not be opened.
    #[napi(getter, catch_unwind)]
    pub fn device_errno(&self) -> Option<i32> {
        self.factory.device_error().map(|errno| errno as i32)
    }

    #[napi(getter, catch_unwind)]
    pub fn device_fd(&self) -> Option<i32> {
        self.factory.device().map(|fd| fd.as_raw_fd())
    }

    #[napi(catch_unwind)]
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { factory: self.factory.try_clone()? })
    }

    /// Gives the device up; from here on only the system call is left.
    #[napi(catch_unwind)]
    pub fn close(&mut self) {
        self.factory = Factory::syscall_only();
    }

    #[napi(catch_unwind)]
    pub fn probe(&self) -> NativeProbe {
        match self.factory.probe() {
            Ok(supported) => NativeProbe {
                error: None,
                features: supported.features.names(),
                ioctls: supported.ioctls.names(),
            },
            Err(error) => NativeProbe { error: Some(error.into()), features: Vec::new(), ioctls: Vec::new() },
        }
    }

    #[napi(catch_unwind)]
    pub fn create(&self, env: &Env, options: NativeCreateOptions) -> Result<NativeUserfaultfd> {
        created(&self.factory, env, options)
    }
}

/// With a factory of its own, which needs no object that the collector would have to free.
#[napi(catch_unwind)]
pub fn create_userfaultfd(env: &Env, options: NativeCreateOptions) -> Result<NativeUserfaultfd> {
    created(&Factory::open(), env, options)
}

fn created(factory: &Factory, env: &Env, options: NativeCreateOptions) -> Result<NativeUserfaultfd> {
    let options = CreateOptions {
        non_blocking: options.non_blocking,
        close_on_exec: options.close_on_exec,
        faults: match options.faults.as_str() {
            "all" => Faults::All,
            "user" => Faults::User,
            _ => Faults::Permitted,
        },
        require: features(&options.require),
        prefer: features(&options.prefer),
    };
    match factory.create(&options) {
        Ok(uffd) => kept(env, uffd),
        Err(error) => Ok(NativeUserfaultfd::failed(error)),
    }
}

fn kept(env: &Env, uffd: Userfaultfd) -> Result<NativeUserfaultfd> {
    let handle = environment::keep(env, uffd)?;
    Ok(describe_userfaultfd(handle))
}

/// Names of all features and ioctls, in the order of their bits.
#[napi(catch_unwind)]
pub fn feature_names() -> Vec<String> {
    Features::NAMES.iter().map(|(name, _)| (*name).to_owned()).collect()
}

/// What is known of one, for those that came with a FORK event.
#[napi(catch_unwind)]
pub fn describe_userfaultfd(handle: f64) -> NativeUserfaultfd {
    match UFFDS.get(handle) {
        Some(uffd) => NativeUserfaultfd::of(handle, &uffd),
        None => NativeUserfaultfd::failed(failures::closed("userfaultfd")),
    }
}

/// Takes a descriptor over, if it is a userfaultfd that can be served; else it stays the caller's.
#[napi(catch_unwind)]
pub fn adopt_userfaultfd(env: &Env, fd: i32) -> Result<NativeUserfaultfd> {
    let copy = match duplicate(fd) {
        Ok(copy) => copy,
        Err(error) => return Ok(NativeUserfaultfd::failed(failures::system("fcntl", &error))),
    };
    match Userfaultfd::adopt(copy) {
        Ok(uffd) => {
            drop(take_over(fd));
            kept(env, uffd)
        }
        Err(error) => Ok(NativeUserfaultfd::failed(error)),
    }
}

fn duplicate(fd: i32) -> std::io::Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: only borrowed for the call below, which refuses a number that is no open descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned()
}

fn take_over(fd: i32) -> Result<OwnedFd> {
    if duplicate(fd).is_err() {
        return Err(napi::Error::from_reason(format!("{fd} is no open descriptor")));
    }
    // SAFETY: it is open, and the caller's contract is that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another name for the same userfaultfd, with what it has registered.
#[napi(catch_unwind)]
pub fn clone_userfaultfd(env: &Env, handle: f64) -> Result<f64> {
    match UFFDS.get(handle) {
        Some(uffd) => Ok(UFFDS.insert(uffd, environment::of(env)?)),
        None => Ok(-1.0),
    }
}

#[napi(catch_unwind)]
pub fn userfaultfd_fd(handle: f64) -> i32 {
    UFFDS.get(handle).map_or(-1, |uffd| uffd.as_fd().as_raw_fd())
}

/// Gives the descriptor up: the caller closes it. -errno where it has another name and no descriptor is free for this one;
/// then it is as before.
#[napi(catch_unwind)]
pub fn release_userfaultfd(handle: f64) -> i32 {
    match UFFDS.take(handle) {
        None => -libc::EBADF,
        Some(Ok(guarded)) => match guarded.into_userfaultfd() {
            Ok(uffd) => uffd.into_owned_fd().into_raw_fd(),
            Err(shared) => duplicate_of(&shared),
        },
        Some(Err(shared)) => {
            let fd = duplicate_of(&shared);
            if fd >= 0 {
                drop(UFFDS.remove(handle));
            }
            fd
        }
    }
}

fn duplicate_of(uffd: &Userfaultfd) -> i32 {
    match uffd.as_fd().try_clone_to_owned() {
        Ok(fd) => fd.into_raw_fd(),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Threads that would get zeros if this were closed now: those that wait, if it is the last name; -errno.
#[napi(catch_unwind)]
pub fn userfaultfd_waiting(handle: f64, of_last_only: bool) -> f64 {
    let Some(uffd) = UFFDS.get(handle) else { return -f64::from(libc::EBADF) };
    // This one, and that of the slot.
    if of_last_only && Arc::strong_count(&uffd) > 2 {
        return 0.0;
    }
    match uffd.waiting() {
        Ok(waiting) => waiting.total as f64,
        Err(error) => -f64::from(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// Closes it; events nobody has read are read first, so that no descriptor of a FORK event is left behind.
#[napi(catch_unwind)]
pub fn close_userfaultfd(handle: f64, poison: bool) -> Option<NativeError> {
    let uffd = UFFDS.get(handle)?;
    if poison && let Err(error) = uffd.poison_missing() {
        return Some(error.into());
    }
    drop(UFFDS.remove(handle));
    if Arc::strong_count(&uffd) == 1 {
        uffd.end_guard();
        let mut buffer = uffd::EventBuffer::new(16);
        while uffd.read_events(&mut buffer).is_ok_and(|count| count > 0) {}
    }
    None
}

/// It was collected without having been closed. Closed here unless it has registrations; whether it has.
#[napi(catch_unwind)]
pub fn forget_userfaultfd(handle: f64) -> bool {
    let Some(uffd) = UFFDS.get(handle) else { return false };
    if uffd.has_registrations() {
        return true;
    }
    drop(UFFDS.remove(handle));
    false
}
