//! What the tests share: a driven peer, the receiving end of the handshake, a pager, and the reasons to skip.

pub(crate) mod pager;
pub(crate) mod peer;
pub(crate) mod receiver;

use std::fs::{self, OpenOptions};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// Longest wait for anything. Only a failing test comes near it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) const PAGE: usize = 4096;

/// Whether this process may make the userfaultfd that the peer makes by default; says why not.
pub(crate) fn may_make_uffd(test: &str) -> bool {
    let device = OpenOptions::new().read(true).open("/dev/userfaultfd");
    // SAFETY: userfaultfd(2) takes its flags by value and no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let syscall = std::io::Error::last_os_error();
    if fd >= 0 {
        // SAFETY: the kernel has just returned this descriptor, and nothing else knows it.
        drop(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) });
        return true;
    }
    match device {
        Ok(_) => true,
        Err(device) => {
            eprintln!("skipped: {test}: /dev/userfaultfd: {device}; userfaultfd(2): {syscall}");
            false
        }
    }
}

/// Ends the calling test, with the reason printed, where no userfaultfd can be made.
macro_rules! needs_uffd {
    () => {
        if !crate::support::may_make_uffd(concat!(module_path!(), ":", line!())) {
            return;
        }
    };
}
pub(crate) use needs_uffd;

/// The pool of 2 MiB pages with a number of free ones that a test has chosen; as it was before when dropped. One at
/// a time, because the pool is the machine's.
pub(crate) struct Pool {
    before: u64,
    _alone: MutexGuard<'static, ()>,
}

impl Pool {
    const DIRECTORY: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn figure(name: &str) -> Option<u64> {
        fs::read_to_string(format!("{}/{name}", Self::DIRECTORY)).ok()?.trim().parse().ok()
    }

    /// Those that somebody has reserved are free, but not to be had.
    fn free() -> Option<u64> {
        Some(Self::figure("free_hugepages")?.saturating_sub(Self::figure("resv_hugepages")?))
    }

    /// Makes exactly `free` pages free; `None`, with the reason printed, where that cannot be had.
    pub(crate) fn with(free: u64) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let figures = Self::figure("nr_hugepages").zip(Self::free());
        let Some((total, unused)) = figures else {
            eprintln!("skipped: this kernel has no pool of 2 MiB pages");
            return None;
        };
        let pool = Self { before: total, _alone: alone };
        let wanted = (total - unused + free).to_string();
        if let Err(error) = fs::write(format!("{}/nr_hugepages", Self::DIRECTORY), wanted)
            && unused != free
        {
            eprintln!(
                "skipped: {unused} huge pages are free where {free} are needed, and the pool may not be changed: {error}"
            );
            return None;
        }
        match Self::free() {
            Some(now) if now == free => Some(pool),
            now => {
                eprintln!("skipped: {now:?} huge pages are free where {free} were asked for");
                None
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Where it may not be written, it was not changed either.
        let _ = fs::write(format!("{}/nr_hugepages", Self::DIRECTORY), self.before.to_string());
    }
}

/// An image in which no two 8-byte words are alike and none is zero.
pub(crate) fn image(pages: usize) -> Vec<u8> {
    (1..=(pages * PAGE / 8) as u64).flat_map(|word| (word << 8 | 0xa5).to_le_bytes()).collect()
}

/// SHA-256 as the peer prints it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
