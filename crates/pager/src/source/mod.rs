//! Where the bytes of missing pages come from.

mod asking;
mod cached;
mod callback;
mod chunk_cache;
mod direct;
mod extents;
mod fetch;
mod file;
mod layered;
mod lost;
mod memory;
mod overlay;
mod retry;
mod sealed;
mod stamp;
pub(crate) mod waiting;
mod zero;

pub(crate) use asking::{answered_by, at_hand, fetch, known_zeros, panicked, read_now};
pub use cached::{CacheOptions, CachedSource};
pub use callback::{CallbackOptions, CallbackSource, Fetcher};
pub use fetch::Fetch;
pub use file::{FileOptions, FileSource};
pub use layered::LayeredSource;
pub use lost::LostSource;
pub use memory::{MappingSource, MemorySource};
pub use overlay::{Overlay, OverlaySource};
pub use retry::{RetryOptions, RetrySource};
pub use waiting::read as read_source;
pub use zero::ZeroSource;

use std::sync::Arc;

use crate::error::PagerError;

/// Whether bytes were at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadNow {
    /// The buffer is filled.
    Done,
    /// Reading could block: ask again through [`PageSource::read`] on a worker. The buffer's contents mean
    /// nothing.
    WouldBlock,
}

/// The bytes behind a session's memory.
///
/// A source is shared by any number of sessions and threads. It fills the whole buffer or fails: a short read
/// is an error, never padded with zeros.
pub trait PageSource: Send + Sync + std::fmt::Debug {
    /// Bytes of the image; nothing at or beyond is ever asked for.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset` if that needs no waiting. Called on the event loop.
    ///
    /// # Errors
    ///
    /// Whatever makes these bytes unobtainable; the session then meets its failure policy.
    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError>;

    /// Fills `buffer` from `offset`, waiting as long as it takes. Called on workers only.
    ///
    /// # Errors
    ///
    /// As [`PageSource::read_now`].
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError>;

    /// Begins to get bytes that are not at hand without holding up a worker, or gives the read back: then a worker calls
    /// [`PageSource::read`], which is the default. Called on the event loop: it must not wait.
    ///
    /// # Errors
    ///
    /// The read itself.
    fn fetch(&self, fetch: Fetch) -> Result<(), Fetch> {
        Err(fetch)
    }

    /// Some reads that were fetched are not wanted any more ([`Fetch::is_wanted`]). Called on the event loop: it must not wait.
    fn given_up(&self) {}

    /// The thread without which bytes that are not at hand never come, by its kernel id. If that very thread waits for them,
    /// it waits for itself. Default: none.
    fn answered_by(&self) -> Option<u32> {
        None
    }

    /// The bytes themselves, where they lie in ordinary memory of this process and never change: they are then installed from
    /// there. Called on the event loop: it must not wait. Default: none.
    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let _ = (offset, len);
        None
    }

    /// The image that this source lays something over which belongs to one session alone; `None` where it is the image.
    fn image(&self) -> Option<Arc<dyn PageSource>> {
        None
    }

    /// Somebody who goes on with a session that was held says that its image is right now, whatever has happened to it. Default: nothing
    /// is to be done.
    fn put_right(&self) {}

    /// Whether these bytes are known to be all zero without reading them. Called on the event loop: it must not wait.
    /// `false` means only that they have to be read.
    fn zeros(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        false
    }
}
