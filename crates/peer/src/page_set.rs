//! Which pages have been discarded: one bit a page, because a guest has millions of them.

/// A set of page numbers below a fixed bound.
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// No page yet, of `pages` possible ones.
    pub(crate) fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(64)] }
    }

    /// Adds a page; whether it was new. A number beyond the bound changes nothing.
    pub(crate) fn insert(&mut self, page: usize) -> bool {
        let bit = 1 << (page % 64);
        match self.words.get_mut(page / 64) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    /// Whether the page was added.
    pub(crate) fn contains(&self, page: usize) -> bool {
        self.words.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }
}
