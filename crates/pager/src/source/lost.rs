//! What is left of a source that cannot be had any more.

use super::{PageSource, ReadNow};
use crate::error::PagerError;

/// A source of which every read fails in the same way, so that what is served from it meets its failure policy when it wants more.
#[derive(Debug, Clone)]
pub struct LostSource(PagerError);

impl LostSource {
    /// `why` is how each read fails.
    #[must_use]
    pub fn new(why: PagerError) -> Self {
        Self(why)
    }
}

impl PageSource for LostSource {
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Err(self.0.clone())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), PagerError> {
        Err(self.0.clone())
    }
}
