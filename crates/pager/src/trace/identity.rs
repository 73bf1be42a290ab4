//! What tells one image from another of the same size.
//!
//! A digest of a few of its pages: the same for every copy, on every machine, however it is opened and whatever its dates
//! are. Two images that differ in none of these pages are taken for the same. That does no harm: a recording has no bytes,
//! so that pages that are brought by it are right pages of the image there is, only perhaps not the ones that are wanted.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::PagerError;
use crate::source::{PageSource, panicked, waiting};

/// Pages that are looked at: the first, the last, and others evenly between them.
const SAMPLES: u64 = 16;
const SAMPLE: u64 = 4096;

/// Reads a few pages: may wait for a disk or a network. What lies over the image for one session alone is left out.
pub(super) fn identify(source: &Arc<dyn PageSource>) -> Result<[u8; 32], PagerError> {
    let mut image = Arc::clone(source);
    while let Some(below) = image.image() {
        image = below;
    }
    let size = image.size();
    let mut digest = Sha256::new();
    digest.update(size.to_le_bytes());
    let last = size.saturating_sub(1) / SAMPLE;
    let mut before = None;
    for sample in 0..SAMPLES {
        let page = (u128::from(last) * u128::from(sample) / u128::from(SAMPLES - 1)) as u64;
        if before.replace(page) == Some(page) {
            continue;
        }
        let offset = page * SAMPLE;
        let mut bytes = vec![0; SAMPLE.min(size - offset) as usize];
        // A source that panics is one that failed.
        let read = std::panic::AssertUnwindSafe(|| waiting::read(&image, offset, &mut bytes));
        std::panic::catch_unwind(read).unwrap_or_else(|_| Err(panicked()))?;
        digest.update(&bytes);
    }
    Ok(digest.finalize().into())
}
