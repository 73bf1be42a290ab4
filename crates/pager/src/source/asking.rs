//! Asking a source on the event loop: a source that panics is a source that failed, and ends its session only.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Fetch, PageSource, ReadNow};
use crate::error::PagerError;

/// As many bytes as `buffer` has: the source's own ([`PageSource::bytes`]), or read into `buffer`; `None` where
/// that could take waiting.
pub(crate) fn at_hand<'a>(
    source: &'a dyn PageSource,
    offset: u64,
    buffer: &'a mut [u8],
) -> Result<Option<&'a [u8]>, PagerError> {
    if let Some(bytes) = bytes(source, offset, buffer.len() as u64) {
        return Ok(Some(bytes));
    }
    match read_now(source, offset, buffer)? {
        ReadNow::Done => Ok(Some(buffer)),
        ReadNow::WouldBlock => Ok(None),
    }
}

/// [`PageSource::read_now`], panics included.
pub(crate) fn read_now(
    source: &dyn PageSource,
    offset: u64,
    buffer: &mut [u8],
) -> Result<ReadNow, PagerError> {
    catch_unwind(AssertUnwindSafe(|| source.read_now(offset, buffer))).unwrap_or_else(|_| Err(panicked()))
}

/// [`PageSource::zeros`]; where it panics, reading has to show.
pub(crate) fn known_zeros(source: &dyn PageSource, offset: u64, len: u64) -> bool {
    catch_unwind(AssertUnwindSafe(|| source.zeros(offset, len))).unwrap_or(false)
}

/// [`PageSource::bytes`]; where it panics, reading has to show.
fn bytes(source: &dyn PageSource, offset: u64, len: u64) -> Option<&[u8]> {
    let bytes = catch_unwind(AssertUnwindSafe(|| source.bytes(offset, len))).unwrap_or(None)?;
    (bytes.len() as u64 == len).then_some(bytes)
}

/// [`PageSource::fetch`]. Where it panics, the read is dropped on the way, which completes it with an error.
pub(crate) fn fetch(source: &dyn PageSource, fetch: Fetch) -> Result<(), Fetch> {
    catch_unwind(AssertUnwindSafe(|| source.fetch(fetch))).unwrap_or(Ok(()))
}

/// [`PageSource::answered_by`]; where it panics, reading has to show.
pub(crate) fn answered_by(source: &dyn PageSource) -> Option<u32> {
    catch_unwind(AssertUnwindSafe(|| source.answered_by())).unwrap_or(None)
}

/// What is said of a source that panicked.
pub(crate) fn panicked() -> PagerError {
    PagerError::Internal("a source panicked while reading".to_owned())
}
