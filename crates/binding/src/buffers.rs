//! Mappings as JavaScript buffers, without copying.
//!
//! Made by Node-API itself: what napi-rs wraps it with copies the bytes where a runtime forbids external buffers, which
//! would touch every page. A mapping stays mapped as long as a buffer can reach it.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use napi::bindgen_prelude::Unknown;
use napi::{Env, JsValue, Result, sys};
use napi_derive::napi;
use pager::Guarded;
use uffd::Mapping;

use crate::environment::{MAPPINGS, UFFDS};

/// `napi_no_external_buffers_allowed`: the runtime has none (Electron).
const FORBIDDEN: i32 = 22;

/// A mapping that JavaScript has a number for, and its buffer.
#[derive(Debug)]
pub(crate) struct Mapped {
    mapping: Arc<Mapping>,
    lease: Mutex<Weak<Lease>>,
}

impl Mapped {
    pub(crate) fn new(mapping: Mapping) -> Self {
        Self { mapping: Arc::new(mapping), lease: Mutex::new(Weak::new()) }
    }

    /// Only whole values are put in under this lock.
    fn lease(&self) -> Option<Arc<Lease>> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }
}

impl std::ops::Deref for Mapped {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

/// What a buffer holds. It ends when the buffer was collected: in every thread, where it is shared.
#[derive(Debug)]
pub(crate) struct Lease {
    mapping: Mutex<Option<Arc<Mapping>>>,
    /// Whose registrations end with it: the mapping was closed while a shared buffer could still be read.
    registered: Mutex<Vec<Weak<Guarded>>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mapping = self.mapping.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let registered = self.registered.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(mapping) = mapping else { return };
        // Before it is unmapped: the userfaultfd must not have addresses on record that become somebody else's.
        for uffd in registered.drain(..).filter_map(|uffd| uffd.upgrade()) {
            let _ = uffd.unregister(mapping.address(), mapping.len() as u64);
        }
    }
}

/// Of an `ArrayBuffer`, on the thread of its environment.
unsafe extern "C" fn collected(_: sys::napi_env, _: *mut c_void, hint: *mut c_void) {
    // SAFETY: the pointer came from `Arc::into_raw`, and the runtime calls this once for it.
    drop(unsafe { Arc::from_raw(hint.cast_const().cast::<Lease>()) });
}

/// Of a `SharedArrayBuffer`, on any thread.
unsafe extern "C" fn shared_collected(_: *mut c_void, hint: *mut c_void) {
    // SAFETY: as in `collected`.
    drop(unsafe { Arc::from_raw(hint.cast_const().cast::<Lease>()) });
}

type CreateShared = unsafe extern "C" fn(
    sys::napi_env,
    *mut c_void,
    usize,
    unsafe extern "C" fn(*mut c_void, *mut c_void),
    *mut c_void,
    *mut sys::napi_value,
) -> sys::napi_status;

/// `node_api_create_external_sharedarraybuffer`, where the runtime has it (Node 22.23, 24, 26).
fn create_shared() -> Option<CreateShared> {
    // SAFETY: looks a name up among what the process has loaded.
    let found =
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"node_api_create_external_sharedarraybuffer".as_ptr()) };
    if found.is_null() {
        return None;
    }
    // SAFETY: the function of this name has this type in every version that has it.
    Some(unsafe { std::mem::transmute::<*mut c_void, CreateShared>(found) })
}

/// A buffer over the whole mapping; or -errno: EOPNOTSUPP (the runtime has none), ENOSYS (none that is shared), E2BIG
/// (none so large), EBADF.
#[napi(catch_unwind, ts_return_type = "ArrayBuffer | SharedArrayBuffer | number")]
pub fn memory_buffer<'env>(env: &'env Env, handle: f64, shared: bool) -> Result<Unknown<'env>> {
    match try_buffer(env, handle, shared) {
        // SAFETY: a value of this call's scope, just made by the environment.
        Ok(value) => Ok(unsafe { Unknown::from_raw_unchecked(env.raw(), value) }),
        Err(errno) => Ok(env.create_int32(-errno)?.to_unknown()),
    }
}

fn try_buffer(env: &Env, handle: f64, shared: bool) -> std::result::Result<sys::napi_value, i32> {
    let mapped = MAPPINGS.get(handle).ok_or(libc::EBADF)?;
    let lease = Arc::new(Lease {
        mapping: Mutex::new(Some(Arc::clone(&mapped.mapping))),
        registered: Mutex::default(),
    });
    let (data, len) = (mapped.as_ptr().cast::<c_void>(), mapped.len());
    let mut value = std::ptr::null_mut();
    let status = if shared {
        let create = create_shared().ok_or(libc::ENOSYS)?;
        let hint = Arc::into_raw(Arc::clone(&lease)).cast_mut().cast();
        // SAFETY: the memory stays mapped until the finalizer has run, because the lease in the hint holds it.
        unsafe { create(env.raw(), data, len, shared_collected, hint, &raw mut value) }
    } else {
        let hint = Arc::into_raw(Arc::clone(&lease)).cast_mut().cast();
        // SAFETY: as above.
        unsafe {
            sys::napi_create_external_arraybuffer(env.raw(), data, len, Some(collected), hint, &raw mut value)
        }
    };
    if status == sys::Status::napi_ok {
        *mapped.lease.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&lease);
        return Ok(value);
    }
    // Node 20 runs the finalizer of what it then refuses as too large; others that refuse do not.
    if Arc::strong_count(&lease) > 1 {
        // SAFETY: the finalizer has not run and never will, so the reference in the hint is still to be given back.
        unsafe { Arc::decrement_strong_count(Arc::as_ptr(&lease)) };
    }
    let mut exception = std::ptr::null_mut();
    // SAFETY: the output lives across the call. What was thrown is told as an error number instead.
    unsafe { sys::napi_get_and_clear_last_exception(env.raw(), &raw mut exception) };
    Err(if status == FORBIDDEN { libc::EOPNOTSUPP } else { libc::E2BIG })
}

/// Empties an `ArrayBuffer` and all views of it, so that the mapping can go. Whether that could be done.
#[napi(catch_unwind)]
pub fn detach_memory(
    env: &Env,
    handle: f64,
    #[napi(ts_arg_type = "ArrayBuffer")] buffer: Unknown<'_>,
) -> bool {
    let Some(mapped) = MAPPINGS.get(handle) else { return true };
    // SAFETY: the environment and the value are those of the call in progress.
    let status = unsafe { sys::napi_detach_arraybuffer(env.raw(), buffer.raw()) };
    if status == sys::Status::napi_ok
        && let Some(lease) = mapped.lease()
    {
        // Nothing reaches it any more: the collector need not be waited for.
        drop(lease.mapping.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
    status == sys::Status::napi_ok
}

/// Whether a buffer can still reach the memory. If so, these registrations end with the last buffer.
#[napi(catch_unwind)]
pub fn memory_outlives(handle: f64, registered: Vec<f64>) -> bool {
    let Some(lease) = MAPPINGS.get(handle).and_then(|mapped| mapped.lease()) else { return false };
    let uffds = registered.into_iter().filter_map(|handle| UFFDS.get(handle));
    let weak = uffds.map(|uffd| Arc::downgrade(&uffd));
    lease.registered.lock().unwrap_or_else(PoisonError::into_inner).extend(weak);
    true
}
