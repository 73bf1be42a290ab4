//! The thread that calls.

/// Its id, as fault messages name it. By the bare system call: glibc has had `gettid` since 2.30 only.
pub(crate) fn current() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    let id = unsafe { libc::syscall(libc::SYS_gettid) };
    id as u32
}
