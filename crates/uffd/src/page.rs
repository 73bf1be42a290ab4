//! The system's page size, asked for once.

use std::sync::OnceLock;

/// Bytes of an ordinary page: `sysconf(_SC_PAGESIZE)`.
#[must_use]
pub fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf reads a constant of the system and touches no memory of ours.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        // POSIX requires the value to exist; no architecture has smaller pages than these.
        usize::try_from(size).unwrap_or(4096)
    })
}
