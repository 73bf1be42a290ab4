//! What the tests share: a driven peer, the receiving end of the handshake, a pager, and the reasons to skip.

pub(crate) mod pager;
pub(crate) mod peer;
pub(crate) mod receiver;

use std::fs::{self, OpenOptions};
use std::os::fd::{FromRawFd, OwnedFd};
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

/// Free huge pages of 2 MiB.
pub(crate) fn free_huge_pages() -> u64 {
    fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .map_or(0, |text| text.trim().parse().unwrap())
}

/// An image in which no two 8-byte words are alike and none is zero.
pub(crate) fn image(pages: usize) -> Vec<u8> {
    (1..=(pages * PAGE / 8) as u64).flat_map(|word| (word << 8 | 0xa5).to_le_bytes()).collect()
}

/// SHA-256 as the peer prints it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
