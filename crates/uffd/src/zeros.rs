//! Zeros for memory that `UFFDIO_ZEROPAGE` cannot fill: huge pages from the pool, which have no page of zeros to share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use crate::error::{Operation, UffdError};
use crate::fill::CopyOptions;
use crate::mapping::Mapping;
use crate::mapping_advice::Populate;
use crate::mapping_options::{AnonymousOptions, MappingError, Pages};
use crate::userfaultfd::Userfaultfd;

/// One source for each size of huge pages, kept: the kernel's own zeros mapped again and again, which cost page tables only.
static SOURCES: Mutex<Option<HashMap<usize, Arc<Mapping>>>> = Mutex::new(None);

/// A resident source: where a part of a source is not there, the kernel takes a second huge page to copy by.
fn zeros(len: usize) -> Result<Arc<Mapping>, MappingError> {
    // Only whole values are put in under this lock.
    let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(source) = sources.get_or_insert_default().get(&len) {
        return Ok(Arc::clone(source));
    }
    let source = Mapping::anonymous(len, AnonymousOptions { shared: false, pages: Pages::Small })?;
    source.populate(0, len, Populate::ForReading)?;
    let source = Arc::new(source);
    sources.get_or_insert_default().insert(len, Arc::clone(&source));
    Ok(source)
}

impl Userfaultfd {
    /// Fills missing huge pages of `page_size` bytes with zeros, by `UFFDIO_COPY`: [`Userfaultfd::zero`] for memory from
    /// the pool of huge pages.
    ///
    /// # Errors
    ///
    /// As [`Userfaultfd::copy`]; ENOMEM where the zeros to copy from cannot be mapped.
    pub fn zero_huge(&self, start: u64, len: u64, page_size: usize, wake: bool) -> Result<(), UffdError> {
        let size = page_size as u64;
        if size == 0 || len == 0 || !len.is_multiple_of(size) {
            return Err(UffdError::System { operation: Operation::Copy, errno: Errno::EINVAL });
        }
        let source = zeros(page_size).map_err(|error| UffdError::System {
            operation: Operation::Copy,
            errno: Errno::from_raw(error.errno()),
        })?;
        let options = CopyOptions { wake, write_protect: false };
        for done in (0..len).step_by(page_size) {
            // SAFETY: the source is a mapping of this module's, as long as a page and never written to. Only missing pages
            // are filled, so no memory that anybody has seen changes.
            let result = unsafe { self.copy(start + done, source.as_ptr(), page_size, options) };
            match result {
                Ok(()) => {}
                Err(_) if done > 0 => return Err(UffdError::PartiallyCopied { done }),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
