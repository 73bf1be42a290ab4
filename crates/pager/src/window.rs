//! How many pages an answer brings.
//!
//! Whether an installed page is ever touched cannot be seen; how densely memory faults can. A fault starts with
//! 64 KiB. Where an eighth of the windows of a 16 MiB block have faulted, the rest of the block is likely wanted too,
//! and windows of 256 KiB bring it with a quarter of the faults. Where half of the block was brought like that, the other
//! half is brought without faults, while nobody waits for anything else.

use std::ops::Range;

const FIRST: u64 = 64 << 10;
const DENSE: u64 = 256 << 10;
const BLOCK: u64 = 16 << 20;
/// An eighth of the windows of a block.
const MANY: u16 = (BLOCK / FIRST / 8) as u16;
/// Half of the windows of a block.
const MOST: u16 = (BLOCK / FIRST / 2) as u16;

/// The window of a session's faults.
#[derive(Debug)]
pub(crate) enum Window {
    /// Always this many pages.
    Fixed(usize),
    /// As dense as the faults are.
    Adaptive {
        /// Pages of [`FIRST`], [`DENSE`] and [`BLOCK`].
        first: usize,
        dense: usize,
        block: usize,
        /// Windows of [`FIRST`] that faults have brought of each block so far.
        brought: Vec<u16>,
    },
}

impl Window {
    /// `bytes` around every fault, or, where absent, what the faults suggest. For `pages` pages of `page_size` bytes.
    pub(crate) fn new(bytes: Option<u64>, pages: usize, page_size: u64) -> Self {
        // At least one page, where pages are larger than that.
        let count = |bytes: u64| (bytes / page_size).max(1) as usize;
        match bytes {
            Some(bytes) => Self::Fixed(count(bytes)),
            None => {
                let block = count(BLOCK);
                let brought = vec![0; pages.div_ceil(block)];
                Self::Adaptive { first: count(FIRST), dense: count(DENSE), block, brought }
            }
        }
    }

    /// Takes note of a fault on `page`; how many pages to bring.
    pub(crate) fn at(&mut self, page: usize) -> usize {
        match self {
            Self::Fixed(pages) => *pages,
            Self::Adaptive { first, dense, block, brought } => match brought.get_mut(page / *block) {
                Some(count) if *count >= MANY => {
                    *count = count.saturating_add((DENSE / FIRST) as u16);
                    *dense
                }
                Some(count) => {
                    *count += 1;
                    *first
                }
                None => *first,
            },
        }
    }

    /// The pages of the block of `page`, once, when so much of it has been wanted that all of it will be.
    pub(crate) fn rest_of_block(&mut self, page: usize) -> Option<Range<usize>> {
        let Self::Adaptive { block, brought, .. } = self else { return None };
        let count = brought.get_mut(page / *block)?;
        if !(MOST..u16::MAX).contains(count) {
            return None;
        }
        // Never asked for again: only the windows of faults that come meanwhile.
        *count = u16::MAX;
        let start = page / *block * *block;
        Some(start..start + *block)
    }

    /// The most pages that any fault brings.
    pub(crate) fn most(&self) -> usize {
        match self {
            Self::Fixed(pages) => *pages,
            Self::Adaptive { dense, .. } => *dense,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a_fixed_window_stays_as_it_is_and_has_at_least_a_page() {
        let mut window = Window::new(Some(64 << 10), 1 << 20, PAGE);

        assert!((0..1000).all(|page| window.at(page) == 16));
        assert_eq!(Window::new(Some(4096), 8, 2 << 20).at(0), 1);
    }

    #[test]
    fn windows_grow_where_faults_are_dense_and_only_there() {
        let mut window = Window::new(None, 8192, PAGE);

        let sizes: Vec<usize> = (0..34).map(|fault| window.at(fault * 16)).collect();

        assert_eq!(sizes[..32], [16; 32]);
        assert_eq!(sizes[32..], [64; 2]);
        assert_eq!(window.at(4096), 16, "the next block has not faulted yet");
        assert_eq!(window.at(8192), 16, "beyond the last block");
    }

    #[test]
    fn a_block_of_which_half_was_wanted_is_wanted_once_as_a_whole() {
        let mut window = Window::new(None, 8192, PAGE);

        let rests: Vec<_> = (0..100)
            .map(|fault| {
                window.at(4096 + fault * 16);
                window.rest_of_block(4096 + fault * 16)
            })
            .collect();

        let whole = rests.iter().position(Option::is_some);
        assert_eq!(whole, Some(32 + 24 - 1), "an eighth by 64 KiB, three eighths by 256 KiB");
        assert_eq!(rests[55], Some(4096..8192));
        assert!(rests[56..].iter().all(Option::is_none));
        assert_eq!(window.at(4096), 64, "faults that come meanwhile bring as much as before");
        assert_eq!(window.rest_of_block(0), None);
        assert_eq!(Window::new(Some(64 << 10), 8192, PAGE).rest_of_block(0), None);
    }
}
