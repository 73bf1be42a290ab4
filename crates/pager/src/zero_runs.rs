//! Which pages of what was read are all zero, so that the kernel's zeros are installed instead of copies of them.
//!
//! A run of fewer than [`FEWEST`] zero pages between others is copied with them. In private memory each page that is not
//! copied saves 0.7 us, two more ioctls included, and 4 KiB; but the first write to it then costs 2.3 us, and a few zero
//! pages inside data are likely to be written. In shared memory it is the same either way. Measured on two virtual CPUs of
//! a shared machine: `cargo run --release -p uffd --example zero_runs`.

use std::ops::Range;

/// The shortest run of zero pages with an ioctl of its own, unless it is all there is.
const FEWEST: usize = 4;
/// Bytes looked at together.
const STRIDE: usize = 16 * size_of::<usize>();

/// A stretch of pages, all of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// Counted from the first page of the buffer.
    pub(crate) pages: Range<usize>,
    /// Whether all of them are zero.
    pub(crate) zero: bool,
}

/// The pages of `bytes` as runs of zero pages and of pages to copy, in order. On huge pages (`huge`) every zero page counts.
pub(crate) fn runs(bytes: &[u8], page_size: usize, huge: bool) -> Runs<'_> {
    Runs { bytes, page_size, fewest: if huge { 1 } else { FEWEST }, next: 0, found: None }
}

/// See [`runs`].
#[derive(Debug)]
pub(crate) struct Runs<'a> {
    bytes: &'a [u8],
    page_size: usize,
    fewest: usize,
    next: usize,
    /// Zero pages found behind the run that was given last.
    found: Option<Range<usize>>,
}

impl Runs<'_> {
    fn pages(&self) -> usize {
        self.bytes.len() / self.page_size
    }

    fn is_zero(&self, page: usize) -> bool {
        let start = page * self.page_size;
        self.bytes.get(start..start + self.page_size).is_some_and(all_zero)
    }

    /// The run of zero pages from `page` on.
    fn zeros_from(&self, page: usize) -> Range<usize> {
        let end = (page..self.pages()).find(|&page| !self.is_zero(page)).unwrap_or(self.pages());
        page..end
    }

    /// Whether a run of zero pages is worth an ioctl.
    fn counts(&self, zeros: &Range<usize>) -> bool {
        zeros.len() >= self.fewest || zeros.len() == self.pages()
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if let Some(pages) = self.found.take() {
            self.next = pages.end;
            return Some(Run { pages, zero: true });
        }
        let (start, end) = (self.next, self.pages());
        let mut page = start;
        while page < end {
            let zeros = self.zeros_from(page);
            if zeros.is_empty() {
                page += 1;
                continue;
            }
            page = zeros.end;
            if !self.counts(&zeros) {
                continue;
            }
            self.next = zeros.end;
            if zeros.start == start {
                return Some(Run { pages: zeros, zero: true });
            }
            let data = start..zeros.start;
            self.found = Some(zeros);
            return Some(Run { pages: data, zero: false });
        }
        self.next = end;
        (start < end).then_some(Run { pages: start..end, zero: false })
    }
}

/// Looks at words; a page of data is told by its first stretch that is not zero.
fn all_zero(bytes: &[u8]) -> bool {
    let mut strides = bytes.chunks_exact(STRIDE);
    let whole = strides.by_ref().all(|stride| {
        let words = stride.chunks_exact(size_of::<usize>());
        words.fold(0, |any, word| any | word.try_into().map_or(usize::MAX, usize::from_ne_bytes)) == 0
    });
    whole && strides.remainder().iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    /// Pages as letters: `d` for data, `-` for zero; the data is one byte somewhere in the page.
    fn runs_of(pages: &str, huge: bool) -> Vec<(Range<usize>, bool)> {
        let mut bytes = vec![0; pages.len() * PAGE];
        for (page, letter) in pages.chars().enumerate() {
            if letter == 'd' {
                bytes[page * PAGE + page * 1237 % PAGE] = 1;
            }
        }
        runs(&bytes, PAGE, huge).map(|run| (run.pages, run.zero)).collect()
    }

    #[test]
    fn long_runs_of_zero_pages_are_told_from_data_and_short_ones_are_data() {
        for (pages, expected) in [
            ("dddd", vec![(0..4, false)]),
            ("----", vec![(0..4, true)]),
            ("-", vec![(0..1, true)]),
            ("d-dd", vec![(0..4, false)]),
            ("---d", vec![(0..4, false)]),
            ("d---", vec![(0..4, false)]),
            ("----d", vec![(0..4, true), (4..5, false)]),
            ("d----", vec![(0..1, false), (1..5, true)]),
            ("d-d----dd-----", vec![(0..3, false), (3..7, true), (7..9, false), (9..14, true)]),
            ("-----dd---dd----d", vec![(0..5, true), (5..12, false), (12..16, true), (16..17, false)]),
            ("", vec![]),
        ] {
            assert_eq!(runs_of(pages, false), expected, "{pages}");
        }
    }

    #[test]
    fn every_zero_page_counts_where_pages_are_huge() {
        assert_eq!(runs_of("d-d", true), [(0..1, false), (1..2, true), (2..3, false)]);
    }

    #[test]
    fn one_bit_anywhere_in_a_page_makes_it_data() {
        let mut page = vec![0; PAGE];
        assert!(all_zero(&page));
        for at in [0, 7, 8, 127, 128, 2047, PAGE - 1] {
            page[at] = 0x80;
            assert!(!all_zero(&page), "byte {at}");
            page[at] = 0;
        }
        assert!(all_zero(&[0; 131]));
        assert!(!all_zero(&[&[0; 130][..], &[1]].concat()));
    }
}
