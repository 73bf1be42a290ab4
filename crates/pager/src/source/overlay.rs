//! A few bytes of one's own over a shared image: the identity of a clone, its network settings.

use std::sync::Arc;

use super::{Fetch, PageSource, ReadNow};
use crate::error::PagerError;

/// Overlays over one source.
const MOST_OVERLAYS: usize = 1024;
/// Bytes of all of them together: they are meant to be few, and every clone has its own.
const MOST_BYTES: usize = 16 << 20;

/// Bytes that take the place of a source's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Where the first of them is in the source.
    pub offset: u64,
    /// At least one.
    pub bytes: Vec<u8>,
}

impl Overlay {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes.len() as u64)
    }
}

/// A source with small ranges of bytes laid over it, which may begin and end anywhere.
#[derive(Debug)]
pub struct OverlaySource {
    base: Arc<dyn PageSource>,
    /// Disjoint, in order.
    overlays: Arc<[Overlay]>,
}

impl OverlaySource {
    /// `base` with `overlays`, in any order: disjoint, inside it, at most 1024 of them and 16 MiB together.
    ///
    /// # Errors
    ///
    /// [`PagerError::Overlay`] names the one that cannot be, by its position in `overlays`.
    pub fn new(base: Arc<dyn PageSource>, overlays: Vec<Overlay>) -> Result<Self, PagerError> {
        let refused = |index, reason| Err(PagerError::Overlay { index, reason });
        let size = base.size();
        let mut total = 0;
        for (index, overlay) in overlays.iter().enumerate() {
            let (offset, len) = (overlay.offset, overlay.bytes.len());
            if index >= MOST_OVERLAYS {
                return refused(index, format!("{} overlays are more than {MOST_OVERLAYS}", overlays.len()));
            }
            if len == 0 {
                return refused(index, format!("it has no bytes (at {offset:#x}): leave it out"));
            }
            if offset.checked_add(len as u64).is_none_or(|end| end > size) {
                return refused(index, format!("{offset:#x}+{len} leaves the memory image of {size} bytes"));
            }
            total += len;
            if total > MOST_BYTES {
                return refused(
                    index,
                    format!("with it there are {total} bytes of overlays, at most {MOST_BYTES} may be"),
                );
            }
        }
        let mut overlays: Vec<(usize, Overlay)> = overlays.into_iter().enumerate().collect();
        overlays.sort_by_key(|(_, overlay)| overlay.offset);
        for ((before, low), (index, high)) in overlays.iter().zip(overlays.iter().skip(1)) {
            if low.end() > high.offset {
                let (at, len) = (high.offset, high.bytes.len());
                let (other, end) = (low.offset, low.bytes.len());
                return refused(
                    *index,
                    format!("{at:#x}+{len} overlaps overlay {before} ({other:#x}+{end})"),
                );
            }
        }
        Ok(Self { base, overlays: overlays.into_iter().map(|(_, overlay)| overlay).collect() })
    }
}

/// The overlays that reach into `offset..offset + len`.
fn within(overlays: &[Overlay], offset: u64, len: u64) -> impl Iterator<Item = &Overlay> {
    let first = overlays.partition_point(|overlay| overlay.end() <= offset);
    let end = offset.saturating_add(len);
    overlays.iter().skip(first).take_while(move |overlay| overlay.offset < end)
}

fn lay_over(overlays: &[Overlay], offset: u64, buffer: &mut [u8]) {
    for overlay in within(overlays, offset, buffer.len() as u64) {
        let cut = offset.saturating_sub(overlay.offset) as usize;
        let start = overlay.offset.saturating_sub(offset) as usize;
        let (Some(bytes), Some(to)) = (overlay.bytes.get(cut..), buffer.get_mut(start..)) else {
            continue;
        };
        let count = bytes.len().min(to.len());
        if let (Some(to), Some(bytes)) = (to.get_mut(..count), bytes.get(..count)) {
            to.copy_from_slice(bytes);
        }
    }
}

impl PageSource for OverlaySource {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        let read = self.base.read_now(offset, buffer)?;
        if read == ReadNow::Done {
            lay_over(&self.overlays, offset, buffer);
        }
        Ok(read)
    }

    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let none = within(&self.overlays, offset, len).next().is_none();
        if none { self.base.bytes(offset, len) } else { None }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.base.read(offset, buffer)?;
        lay_over(&self.overlays, offset, buffer);
        Ok(())
    }

    fn fetch(&self, fetch: Fetch) -> Result<(), Fetch> {
        let overlays = Arc::clone(&self.overlays);
        self.base.fetch(fetch.then(move |offset, buffer| lay_over(&overlays, offset, buffer)))
    }

    fn image(&self) -> Option<Arc<dyn PageSource>> {
        Some(Arc::clone(&self.base))
    }

    fn given_up(&self) {
        self.base.given_up();
    }

    fn answered_by(&self) -> Option<u32> {
        self.base.answered_by()
    }

    fn put_right(&self) {
        self.base.put_right();
    }

    fn zeros(&self, offset: u64, len: u64) -> bool {
        within(&self.overlays, offset, len).next().is_none() && self.base.zeros(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MemorySource, ZeroSource};
    use super::*;

    fn overlay(offset: u64, bytes: &[u8]) -> Overlay {
        Overlay { offset, bytes: bytes.to_vec() }
    }

    #[test]
    fn every_window_over_overlays_reads_as_the_patched_image() {
        let mut patched: Vec<u8> = (0..64).collect();
        let overlays =
            vec![overlay(40, &[200; 10]), overlay(0, &[201]), overlay(50, &[202; 14]), overlay(7, &[203; 5])];
        let base = Arc::new(MemorySource::new(patched.clone()));
        for overlay in &overlays {
            patched[overlay.offset as usize..overlay.end() as usize].copy_from_slice(&overlay.bytes);
        }
        let source = OverlaySource::new(base, overlays).unwrap();

        for start in 0..64 {
            for end in start..=64 {
                let mut buffer = vec![0; end - start];
                assert_eq!(source.read_now(start as u64, &mut buffer).unwrap(), ReadNow::Done);
                assert_eq!(buffer, patched[start..end], "{start}..{end}");
                source.read(start as u64, &mut buffer).unwrap();
                assert_eq!(buffer, patched[start..end], "{start}..{end}");
                let bytes = source.bytes(start as u64, (end - start) as u64);
                assert!(bytes.is_none_or(|bytes| *bytes == patched[start..end]), "{start}..{end}");
                assert_eq!(
                    bytes.is_some(),
                    within(&source.overlays, start as u64, (end - start) as u64).count() == 0
                );
            }
        }
    }

    #[test]
    fn zeros_are_known_only_where_nothing_is_laid_over_them() {
        let source = OverlaySource::new(Arc::new(ZeroSource::new(100)), vec![overlay(50, &[1; 10])]).unwrap();

        assert!(source.zeros(0, 50) && source.zeros(60, 40));
        assert!(!source.zeros(0, 51) && !source.zeros(59, 1) && !source.zeros(0, 100));
    }

    #[test]
    fn overlays_that_cannot_be_are_refused_by_their_position() {
        let base: Arc<dyn PageSource> = Arc::new(ZeroSource::new(64 << 20));
        let size = 64 << 20;
        for (overlays, bad) in [
            (vec![overlay(0, &[1]), overlay(8, &[])], 1),
            (vec![overlay(size - 3, &[1; 4])], 0),
            (vec![overlay(size, &[1])], 0),
            (vec![overlay(u64::MAX, &[1; 4])], 0),
            (vec![overlay(100, &[1; 10]), overlay(0, &[1]), overlay(109, &[1])], 2),
            (vec![overlay(100, &[1; 10]), overlay(99, &[1; 2])], 0),
            (vec![overlay(0, &vec![1; MOST_BYTES]), overlay(32 << 20, &[1])], 1),
            ((0..=MOST_OVERLAYS as u64).map(|at| overlay(at, &[1])).collect(), MOST_OVERLAYS),
        ] {
            let error = OverlaySource::new(Arc::clone(&base), overlays).unwrap_err();
            assert!(matches!(error, PagerError::Overlay { index, .. } if index == bad), "{bad}: {error}");
        }
        OverlaySource::new(base, vec![overlay(100, &[1; 10]), overlay(110, &[1]), overlay(size - 1, &[1])])
            .unwrap();
    }
}
