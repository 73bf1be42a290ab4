//! Which descriptors are the same open file: kcmp(2), which orders them, too.

use std::cmp::Ordering;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

/// How two open files are ordered for as long as both are open; `None` where the kernel does not say.
pub(crate) fn order(one: &OwnedFd, other: &OwnedFd) -> Option<Ordering> {
    const KCMP_FILE: i32 = 0;
    let pid = std::process::id();
    let (one, other) = (one.as_raw_fd() as u64, other.as_raw_fd() as u64);
    // SAFETY: takes numbers, and compares.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) };
    match Errno::result(order) {
        Ok(0) => Some(Ordering::Equal),
        Ok(1) => Some(Ordering::Less),
        Ok(2) => Some(Ordering::Greater),
        _ => None,
    }
}

/// Whether both are the same; `None` where the kernel does not say.
pub(crate) fn same_open_file(one: &OwnedFd, other: &OwnedFd) -> Option<bool> {
    order(one, other).map(Ordering::is_eq)
}
