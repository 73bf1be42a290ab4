//! A base and diffs over it: what each diff has data for is read from it, what it has holes for from what lies below.
//!
//! Who wins where is worked out once, when the source is made: one sorted list of stretches, whatever the number of
//! diffs. Copying a diff with a tool that fills its holes makes zeros of them that hide the base; nothing can tell that
//! from a diff that says so.

use std::collections::BinaryHeap;
use std::path::PathBuf;
use std::sync::Arc;

use super::file::FileSource;
use super::{Fetch, PageSource, ReadNow, waiting};
use crate::error::PagerError;

/// Diffs over one base.
const MOST_DIFFS: usize = 4096;
/// Stretches of data in all diffs together (24 MiB of memory).
const MOST_EXTENTS: usize = 1 << 20;

/// A source with sparse files laid over it; later ones hide earlier ones.
#[derive(Debug)]
pub struct LayeredSource {
    base: Arc<dyn PageSource>,
    /// `None` where later diffs hide everything of one.
    diffs: Vec<Option<FileSource>>,
    stretches: Vec<Stretch>,
}

/// Bytes that come from one diff.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    start: u64,
    end: u64,
    diff: usize,
}

impl LayeredSource {
    /// Opens the diffs and finds where they have data (`SEEK_DATA`). May wait for a disk. None of the files may change
    /// from then on.
    ///
    /// # Errors
    ///
    /// [`PagerError::Layer`] names the diff that has another size than the base, whose file system cannot tell holes, or
    /// with which there are too many stretches or diffs; otherwise as [`FileSource::open`].
    pub fn new(base: Arc<dyn PageSource>, diffs: &[PathBuf]) -> Result<Self, PagerError> {
        let paths = diffs.iter().map(PathBuf::as_path);
        Self::lay(base, diffs.len(), paths.map(|path| Ok((path.to_owned(), FileSource::open(path)?))))
    }

    /// Diffs that are open already.
    ///
    /// # Errors
    ///
    /// As [`LayeredSource::new`].
    pub fn of_files(base: Arc<dyn PageSource>, diffs: Vec<FileSource>) -> Result<Self, PagerError> {
        Self::lay(base, diffs.len(), diffs.into_iter().map(|diff| Ok((diff.path().to_owned(), diff))))
    }

    fn lay(
        base: Arc<dyn PageSource>,
        count: usize,
        diffs: impl Iterator<Item = Result<(PathBuf, FileSource), PagerError>>,
    ) -> Result<Self, PagerError> {
        let size = base.size();
        let mut opened = Vec::new();
        let mut found = Vec::new();
        for (index, diff) in diffs.enumerate() {
            let (path, diff) = diff?;
            let refused = |reason| PagerError::Layer { index, path: path.clone(), reason, cause: None };
            if index >= MOST_DIFFS {
                return Err(refused(format!("{count} diffs are more than the {MOST_DIFFS} there may be")));
            }
            if diff.size() != size {
                let actual = diff.size();
                return Err(refused(format!(
                    "it has {actual} bytes, its base {size}: they have to be the same"
                )));
            }
            let most = MOST_EXTENTS - found.len();
            let data = diff
                .data(most)
                .map_err(|errno| PagerError::Layer {
                    index,
                    path: path.clone(),
                    reason: format!("where it has holes cannot be found (SEEK_DATA: {errno})"),
                    cause: Some(Box::new(PagerError::System { syscall: "lseek", errno })),
                })?
                .ok_or_else(|| {
                    refused(format!(
                        "with it there are more than {MOST_EXTENTS} stretches of data: merge diffs"
                    ))
                })?;
            // Where it has data is known of what it is now.
            diff.check()?;
            found.extend(data.into_iter().map(|data| Stretch {
                start: data.start,
                end: data.end,
                diff: index,
            }));
            opened.push(Some(diff));
        }
        let stretches = flatten(found);
        let mut seen = vec![false; opened.len()];
        for stretch in &stretches {
            if let Some(seen) = seen.get_mut(stretch.diff) {
                *seen = true;
            }
        }
        for (diff, _) in opened.iter_mut().zip(seen).filter(|(_, seen)| !seen) {
            // Its descriptor is not needed.
            *diff = None;
        }
        Ok(Self { base, diffs: opened, stretches })
    }

    /// Goes through `offset..offset + len` in parts that come from one diff each, or (`None`) from the base, until `act` says
    /// that it is enough.
    fn each(
        &self,
        offset: u64,
        len: u64,
        mut act: impl FnMut(Option<&FileSource>, u64, u64) -> Result<ReadNow, PagerError>,
    ) -> Result<ReadNow, PagerError> {
        let end = offset.saturating_add(len);
        let mut from = offset;
        let mut next = self.stretches.partition_point(|stretch| stretch.end <= offset);
        while from < end {
            let stretch = self.stretches.get(next).filter(|stretch| stretch.start < end);
            let (diff, to) = match stretch {
                Some(stretch) if stretch.start <= from => {
                    next += 1;
                    let Some(Some(diff)) = self.diffs.get(stretch.diff) else {
                        return Err(PagerError::Internal("a diff that is read was closed".to_owned()));
                    };
                    (Some(diff), stretch.end.min(end))
                }
                Some(stretch) => (None, stretch.start),
                None => (None, end),
            };
            if act(diff, from, to - from)? == ReadNow::WouldBlock {
                return Ok(ReadNow::WouldBlock);
            }
            from = to;
        }
        Ok(ReadNow::Done)
    }

    fn fill(
        &self,
        offset: u64,
        buffer: &mut [u8],
        read: impl Fn(Option<&FileSource>, u64, &mut [u8]) -> Result<ReadNow, PagerError>,
    ) -> Result<ReadNow, PagerError> {
        let len = buffer.len() as u64;
        self.each(offset, len, |diff, from, part| {
            let start = (from - offset) as usize;
            match buffer.get_mut(start..start + part as usize) {
                Some(part) => read(diff, from, part),
                None => Err(PagerError::Internal("a part outside of what is read".to_owned())),
            }
        })
    }
}

impl PageSource for LayeredSource {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.fill(offset, buffer, |diff, offset, part| match diff {
            Some(diff) => diff.read_now(offset, part),
            None => self.base.read_now(offset, part),
        })
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let read = |diff: Option<&FileSource>, offset, part: &mut [u8]| {
            match diff {
                Some(diff) => diff.read(offset, part)?,
                None => waiting::read(&self.base, offset, part)?,
            }
            Ok(ReadNow::Done)
        };
        self.fill(offset, buffer, read).map(|_| ())
    }

    /// What no diff has a part in is the base's business.
    fn fetch(&self, fetch: Fetch) -> Result<(), Fetch> {
        let (offset, len) = (fetch.offset(), fetch.len() as u64);
        let first = self.stretches.partition_point(|stretch| stretch.end <= offset);
        match self.stretches.get(first) {
            Some(stretch) if stretch.start < offset.saturating_add(len) => Err(fetch),
            _ => self.base.fetch(fetch),
        }
    }

    fn given_up(&self) {
        self.base.given_up();
    }

    fn answered_by(&self) -> Option<u32> {
        self.base.answered_by()
    }

    fn put_right(&self) {
        // Where diffs have data was found before: one that has changed stays refused.
        self.base.put_right();
    }

    fn zeros(&self, offset: u64, len: u64) -> bool {
        let known = |diff: Option<&FileSource>, from, part| {
            let zeros = match diff {
                Some(diff) => diff.zeros(from, part),
                None => self.base.zeros(from, part),
            };
            Ok(if zeros { ReadNow::Done } else { ReadNow::WouldBlock })
        };
        matches!(self.each(offset, len, known), Ok(ReadNow::Done))
    }
}

/// What is seen of overlapping stretches from above: disjoint, in order, of the latest diff each.
fn flatten(mut found: Vec<Stretch>) -> Vec<Stretch> {
    found.sort_unstable_by_key(|stretch| stretch.start);
    let mut seen: Vec<Stretch> = Vec::new();
    // Diffs with data at `from`, and until where; some may have ended before.
    let mut open: BinaryHeap<(usize, u64)> = BinaryHeap::new();
    let mut from = 0;
    let mut rest = found.iter().peekable();
    loop {
        while let Some(stretch) = rest.next_if(|stretch| stretch.start <= from) {
            open.push((stretch.diff, stretch.end));
        }
        match open.peek() {
            Some(&(_, end)) if end <= from => {
                open.pop();
            }
            Some(&(diff, end)) => {
                let to = rest.peek().map_or(end, |next| next.start.min(end));
                match seen.last_mut().filter(|last| last.diff == diff && last.end == from) {
                    Some(last) => last.end = to,
                    None => seen.push(Stretch { start: from, end: to, diff }),
                }
                from = to;
            }
            None => match rest.peek() {
                Some(next) => from = next.start,
                None => return seen,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(start: u64, end: u64, diff: usize) -> Stretch {
        Stretch { start, end, diff }
    }

    #[test]
    fn the_latest_diff_is_seen_wherever_it_has_data() {
        for (found, seen) in [
            (vec![], vec![]),
            (vec![stretch(0, 10, 0)], vec![stretch(0, 10, 0)]),
            (
                vec![stretch(0, 10, 0), stretch(3, 5, 1)],
                vec![stretch(0, 3, 0), stretch(3, 5, 1), stretch(5, 10, 0)],
            ),
            (vec![stretch(0, 10, 1), stretch(3, 5, 0)], vec![stretch(0, 10, 1)]),
            (
                vec![stretch(0, 4, 2), stretch(2, 8, 1), stretch(6, 12, 0), stretch(20, 21, 0)],
                vec![stretch(0, 4, 2), stretch(4, 8, 1), stretch(8, 12, 0), stretch(20, 21, 0)],
            ),
            (vec![stretch(5, 9, 0), stretch(5, 9, 1), stretch(5, 9, 2)], vec![stretch(5, 9, 2)]),
        ] {
            assert_eq!(flatten(found), seen);
        }
    }

    #[test]
    fn any_pile_of_diffs_is_flattened_as_painting_them_in_order_would() {
        let mut state = 12345_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let mut painted = [usize::MAX; 100];
            let mut found = Vec::new();
            for diff in 0..random(6) as usize {
                let mut at = 0;
                loop {
                    let start = at + random(30);
                    let end = start + 1 + random(20);
                    if end > 100 {
                        break;
                    }
                    found.push(stretch(start, end, diff));
                    painted[start as usize..end as usize].fill(diff);
                    at = end;
                }
            }
            let seen = flatten(found);
            let mut repainted = [usize::MAX; 100];
            for stretch in &seen {
                repainted[stretch.start as usize..stretch.end as usize].fill(stretch.diff);
            }
            assert_eq!(repainted, painted);
            assert!(seen.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }
}
