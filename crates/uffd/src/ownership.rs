//! Whose memory a userfaultfd is about, which the kernel does not tell.

use std::ptr::NonNull;

use nix::errno::Errno;

use crate::error::UffdError;
use crate::factory::{CreateOptions, Factory};
use crate::features::Modes;
use crate::fill::CopyOptions;
use crate::mapping::Mapping;
use crate::mapping_options::{AnonymousOptions, MappingError, Pages};
use crate::mapping_place::Place;
use crate::page::page_size;
use crate::userfaultfd::Userfaultfd;

/// Pages that are asked for. Another process may by chance have memory that is registered at the address of one.
const PROBES: usize = 3;

impl Userfaultfd {
    /// Whether its memory is this process's, also where it came from elsewhere (another thread of this process may have sent it).
    ///
    /// Without side effects: it is asked to copy bytes that cannot be read to pages that another userfaultfd has registered here.
    /// The kernel looks for registered memory at the destination first (ENOENT), and reads the source then (EFAULT).
    /// `false` where this process may not make a userfaultfd, or has no memory left.
    #[must_use]
    pub fn is_of_this_process(&self) -> bool {
        self.origin().is_some() || self.finds_memory_of_this_process().unwrap_or(false)
    }

    fn finds_memory_of_this_process(&self) -> Result<bool, MappingError> {
        let Ok(other) = Factory::open().create(&CreateOptions::default()) else { return Ok(false) };
        let unreadable = Unreadable::new()?;
        for _ in 0..PROBES {
            let page = Mapping::anonymous(page_size(), AnonymousOptions::default())?;
            // SAFETY: nobody has a reference to the page, nor a way to get one.
            if unsafe { other.register(page.address(), page.len() as u64, Modes::MISSING) }.is_err() {
                return Ok(false);
            }
            // SAFETY: the kernel reads nothing there, and so writes nothing.
            let copied = unsafe {
                self.copy(page.address(), unreadable.0.as_ptr(), page_size(), CopyOptions::default())
            };
            if !matches!(copied, Err(UffdError::System { errno: Errno::EFAULT, .. })) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A page that nobody can read.
struct Unreadable(NonNull<u8>);

impl Unreadable {
    fn new() -> Result<Self, MappingError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let place = Place { len: page_size(), protection: libc::PROT_NONE, flags, fd: None, offset: 0 };
        place.map(Pages::Ordinary).map(Self)
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        // SAFETY: this object's own mapping, of this length; nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), page_size()) };
    }
}
