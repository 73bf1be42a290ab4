//! One pager for all servers of a process that do not ask for a CPU of their own. It starts with the first and
//! ends with the last: an idle process has no thread of this package.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use pager::{Pager, PagerError, PagerOptions};

static SHARED: Mutex<Weak<Pager>> = Mutex::new(Weak::new());

/// The shared pager, or one of its own pinned to `cpu`.
pub(crate) fn acquire(cpu: Option<usize>) -> Result<Arc<Pager>, PagerError> {
    if cpu.is_some() {
        return Pager::start(&PagerOptions { cpu, ..PagerOptions::default() }).map(Arc::new);
    }
    // Only a reference is guarded; a panic elsewhere does not spoil it.
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pager) = shared.upgrade() {
        return Ok(pager);
    }
    let pager = Arc::new(Pager::start(&PagerOptions::default())?);
    *shared = Arc::downgrade(&pager);
    Ok(pager)
}
