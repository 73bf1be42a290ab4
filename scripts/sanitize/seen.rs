//! For ThreadSanitizer where the standard library was not compiled with it: tells it what the library's locks order.
//!
//! Most of the library is generic or inlined, so it is compiled with the code that uses it, and seen. What is not: the
//! functions that a lock falls back on when somebody else holds it, waiting for a condition, initialising once. The linker
//! calls the functions below in their stead (`--wrap`); each does the same, and says what has been waited for. They say no
//! more than what these functions promise, so races that no lock is in the way of are still found.
//!
//! `scripts/sanitize.sh` puts in the mangled names, which change with every compiler.
#![no_std]

use core::time::Duration;

unsafe extern "C" {
    fn __tsan_acquire(address: *const u32);
    fn __tsan_release(address: *const u32);
    #[link_name = "__real___tsan_atomic64_fetch_sub"]
    fn fetch_sub(address: *mut u64, value: u64, order: i32) -> u64;
}

unsafe extern "Rust" {
    #[link_name = "__real_MUTEX_LOCK"]
    fn lock(mutex: *const u32);
    #[link_name = "__real_RWLOCK_READ"]
    fn read(lock: *const u32);
    #[link_name = "__real_RWLOCK_WRITE"]
    fn write(lock: *const u32);
    #[link_name = "__real_CONDVAR_WAIT"]
    fn wait(condvar: *const u32, mutex: *const u32);
    #[link_name = "__real_CONDVAR_WAIT_TIMEOUT"]
    fn wait_timeout(condvar: *const u32, mutex: *const u32, timeout: Duration) -> bool;
    #[link_name = "__real_ONCE_CALL"]
    fn call(once: *const u32, ignore_poisoning: bool, act: *mut (), vtable: *const ());
}

#[unsafe(export_name = "__wrap_MUTEX_LOCK")]
unsafe fn seen_lock(mutex: *const u32) {
    // SAFETY: what the caller asked for, and as below.
    unsafe { lock(mutex) };
    // SAFETY: an address only.
    unsafe { __tsan_acquire(mutex) };
}

#[unsafe(export_name = "__wrap_RWLOCK_READ")]
unsafe fn seen_read(state: *const u32) {
    // SAFETY: as above.
    unsafe { read(state) };
    // SAFETY: as above.
    unsafe { __tsan_acquire(state) };
}

#[unsafe(export_name = "__wrap_RWLOCK_WRITE")]
unsafe fn seen_write(state: *const u32) {
    // SAFETY: as above.
    unsafe { write(state) };
    // SAFETY: as above.
    unsafe { __tsan_acquire(state) };
}

#[unsafe(export_name = "__wrap_CONDVAR_WAIT")]
unsafe fn seen_wait(condvar: *const u32, mutex: *const u32) {
    // SAFETY: as above.
    unsafe { __tsan_release(mutex) };
    // SAFETY: as above.
    unsafe { wait(condvar, mutex) };
    // SAFETY: as above.
    unsafe { __tsan_acquire(mutex) };
}

#[unsafe(export_name = "__wrap_CONDVAR_WAIT_TIMEOUT")]
unsafe fn seen_wait_timeout(condvar: *const u32, mutex: *const u32, timeout: Duration) -> bool {
    // SAFETY: as above.
    unsafe { __tsan_release(mutex) };
    // SAFETY: as above.
    let notified = unsafe { wait_timeout(condvar, mutex, timeout) };
    // SAFETY: as above.
    unsafe { __tsan_acquire(mutex) };
    notified
}

#[unsafe(export_name = "__wrap_ONCE_CALL")]
unsafe fn seen_call(once: *const u32, ignore_poisoning: bool, act: *mut (), vtable: *const ()) {
    // SAFETY: as above.
    unsafe { call(once, ignore_poisoning, act, vtable) };
    // SAFETY: as above.
    unsafe { __tsan_release(once) };
    // SAFETY: as above.
    unsafe { __tsan_acquire(once) };
}

/// Dropping an `Arc` is a decrement that releases, and a fence before the last one frees: fences are not seen. The
/// library itself, compiled with the sanitizer, reads the counter once more instead, which is the same as this.
#[unsafe(export_name = "__wrap___tsan_atomic64_fetch_sub")]
unsafe extern "C" fn seen_fetch_sub(address: *mut u64, value: u64, order: i32) -> u64 {
    const RELEASE: i32 = 3;
    const ACQUIRE_RELEASE: i32 = 4;
    let order = if order == RELEASE { ACQUIRE_RELEASE } else { order };
    // SAFETY: as above.
    unsafe { fetch_sub(address, value, order) }
}
