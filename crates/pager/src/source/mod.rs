//! Where the bytes of missing pages come from.

mod file;

pub use file::FileSource;

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
}
