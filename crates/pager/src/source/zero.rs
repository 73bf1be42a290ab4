//! Zeros as the source of pages: memory that has no image.

use super::{PageSource, ReadNow};
use crate::error::PagerError;

/// An image of nothing but zeros. Its pages are installed without a byte being read or copied.
#[derive(Debug, Clone, Copy)]
pub struct ZeroSource {
    size: u64,
}

impl ZeroSource {
    /// `size` bytes of zeros.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size }
    }
}

impl PageSource for ZeroSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, _: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        buffer.fill(0);
        Ok(())
    }

    fn zeros(&self, _: u64, _: u64) -> bool {
        true
    }
}
