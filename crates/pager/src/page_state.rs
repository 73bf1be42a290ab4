//! What is known of every page of a session, in two dense bitmaps: two bits a page, no allocation per page.
//! The bitmaps come zeroed from the allocator, so the state of memory that nobody touches is never resident.
//!
//! | present | removed | the page |
//! | --- | --- | --- |
//! | 0 | 0 | missing: a fault gets the source's bytes |
//! | 1 | 0 | was installed once; if it faults again its owner has discarded it, and it reads zero |
//! | any | 1 | was discarded, or is not mapped any more: reads zero for ever, the source is never consulted again |
//!
//! The two meanings of a bit never weaken: nothing ever makes a page "missing" again.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use uffd::Words;

const BITS: usize = u64::BITS as usize;

/// The states of the pages `0..len` of a session.
#[derive(Debug, Clone)]
pub struct PageStates {
    len: usize,
    present: PageBits,
    removed: PageBits,
}

impl PageStates {
    /// All pages missing.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self { len, present: PageBits::new(len), removed: PageBits::new(len) }
    }

    /// The states in these words, whatever they say.
    pub(crate) fn in_words(len: usize, present: Words, removed: Words) -> Self {
        Self { len, present: PageBits::in_words(len, present), removed: PageBits::in_words(len, removed) }
    }

    /// Takes over everything that is known of the same pages.
    pub(crate) fn adopt(&mut self, other: &Self) {
        self.present.adopt(&other.present);
        self.removed.adopt(&other.removed);
    }

    /// Pages in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no pages at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a fault on `page` is to be answered from the source.
    #[must_use]
    pub fn is_missing(&self, page: usize) -> bool {
        page < self.len && !self.present.bit(page) && !self.removed.bit(page)
    }

    /// Whether `page` was discarded by its owner.
    #[must_use]
    pub fn is_removed(&self, page: usize) -> bool {
        self.removed.bit(page)
    }

    /// Records that the pages are there. A removed page stays removed: it is there as zeros.
    pub fn set_present(&mut self, pages: Range<usize>) {
        self.present.set(pages);
    }

    /// Records that the owner discarded the pages.
    pub fn set_removed(&mut self, pages: Range<usize>) {
        self.removed.set(pages);
    }

    /// Records that the pages are mapped nowhere any more: nothing is known or done about them from now on.
    pub fn set_gone(&mut self, pages: Range<usize>) {
        self.removed.set(pages.clone());
        self.present.set(pages);
    }

    /// The run of missing pages around `page` that lies within `limits`; empty when `page` is not missing.
    #[must_use]
    pub fn missing_run(&self, page: usize, limits: Range<usize>) -> Range<usize> {
        if !limits.contains(&page) || !self.is_missing(page) {
            return page..page;
        }
        let mut start = page;
        while start > limits.start && self.is_missing(start - 1) {
            start -= 1;
        }
        let mut end = page + 1;
        while end < limits.end && self.is_missing(end) {
            end += 1;
        }
        start..end
    }

    /// The first run of missing pages at or after `from`, at most `longest` pages long.
    #[must_use]
    pub fn next_missing(&self, from: usize, longest: usize) -> Option<Range<usize>> {
        let mut page = from;
        while page < self.len {
            let (word, offset) = (page / BITS, page % BITS);
            let taken = self.present.word(word) | self.removed.word(word);
            let free = !taken >> offset;
            if free == 0 {
                page = (word + 1) * BITS;
                continue;
            }
            let start = page + free.trailing_zeros() as usize;
            if start >= self.len {
                return None;
            }
            return Some(self.missing_run(start, start..self.len.min(start.saturating_add(longest))));
        }
        None
    }

    /// Whether all these pages were installed, and none was discarded.
    #[must_use]
    pub fn are_present(&self, mut pages: Range<usize>) -> bool {
        pages.all(|page| page < self.len && self.present.bit(page) && !self.removed.bit(page))
    }

    /// How many pages a fault on would be answered from the source.
    #[must_use]
    pub fn missing_count(&self) -> usize {
        let known = self.present.words().zip(self.removed.words());
        self.len - known.map(|(present, removed)| (present | removed).count_ones() as usize).sum::<usize>()
    }

    /// How many pages were discarded.
    #[must_use]
    pub fn removed_count(&self) -> usize {
        self.removed.words().map(|word| word.count_ones() as usize).sum()
    }
}

/// One thing that is known of each page. One thread writes; whoever has the same words mapped may read them.
#[derive(Debug)]
pub(crate) struct PageBits {
    len: usize,
    words: Words,
}

impl Clone for PageBits {
    fn clone(&self) -> Self {
        let mut copy = Self::new(self.len);
        copy.adopt(self);
        copy
    }
}

impl PageBits {
    /// No bit set.
    pub(crate) fn new(len: usize) -> Self {
        Self { len, words: Words::zeroed(len.div_ceil(BITS)) }
    }

    /// The bits in these words; those beyond the last page are taken off.
    pub(crate) fn in_words(len: usize, words: Words) -> Self {
        let mut used = (1_u64 << (len % BITS)) - 1;
        for word in words.iter().skip(len / BITS) {
            if word.load(Ordering::Relaxed) & !used != 0 {
                change_word(word, |bits| bits & used);
            }
            used = 0;
        }
        Self { len, words }
    }

    /// Sets every bit that is set in `other`.
    pub(crate) fn adopt(&mut self, other: &Self) {
        for (word, more) in self.words.iter().zip(other.words()).filter(|&(_, more)| more != 0) {
            word.store(word.load(Ordering::Relaxed) | more, Ordering::Relaxed);
        }
    }

    /// Clears all bits.
    pub(crate) fn clear_all(&mut self) {
        for word in self.words.iter().filter(|word| word.load(Ordering::Relaxed) != 0) {
            word.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn set(&mut self, pages: Range<usize>) {
        self.change(pages, |word, mask| word | mask);
    }

    pub(crate) fn clear(&mut self, pages: Range<usize>) {
        self.change(pages, |word, mask| word & !mask);
    }

    pub(crate) fn is_set(&self, page: usize) -> bool {
        page < self.len && self.bit(page)
    }

    /// The first run of set bits in `pages`, at most `longest` long.
    pub(crate) fn next_set(&self, pages: Range<usize>, longest: usize) -> Option<Range<usize>> {
        let end = pages.end.min(self.len);
        let mut page = pages.start;
        while page < end {
            let rest = self.word(page / BITS) >> (page % BITS);
            if rest == 0 {
                page = (page / BITS + 1) * BITS;
                continue;
            }
            let start = page + rest.trailing_zeros() as usize;
            let limit = end.min(start.saturating_add(longest));
            let run = (start..limit).find(|&page| !self.is_set(page)).unwrap_or(limit);
            return (start < limit).then_some(start..run);
        }
        None
    }

    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().map(|word| word.load(Ordering::Relaxed))
    }

    /// All ones beyond the end.
    fn word(&self, word: usize) -> u64 {
        self.words.get(word).map_or(u64::MAX, |word| word.load(Ordering::Relaxed))
    }

    fn bit(&self, page: usize) -> bool {
        self.word(page / BITS) >> (page % BITS) & 1 != 0
    }

    /// Changes each word that has bits of `pages`, by the mask of those.
    fn change(&mut self, pages: Range<usize>, how: impl Fn(u64, u64) -> u64) {
        let end = pages.end.min(self.len);
        let mut page = pages.start;
        while page < end {
            let offset = page % BITS;
            let count = (BITS - offset).min(end - page);
            if let Some(word) = self.words.get(page / BITS) {
                // `count` is 1..=64: a shift by 64 - count never overflows.
                let mask = u64::MAX >> (BITS - count) << offset;
                change_word(word, |bits| how(bits, mask));
            }
            page += count;
        }
    }
}

/// One thread alone writes: there is nothing to be done at once.
fn change_word(word: &AtomicU64, how: impl FnOnce(u64) -> u64) {
    word.store(how(word.load(Ordering::Relaxed)), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_page_is_missing_and_stays_out_of_range_beyond_the_end() {
        let states = PageStates::new(70);

        assert!(states.is_missing(0));
        assert!(states.is_missing(69));
        assert!(!states.is_missing(70));
    }

    #[test]
    fn setting_a_run_across_words_sets_exactly_that_run() {
        let mut states = PageStates::new(300);

        states.set_present(60..200);

        let present: Vec<usize> = (0..300).filter(|&page| !states.is_missing(page)).collect();
        assert_eq!(present, (60..200).collect::<Vec<_>>());
    }

    #[test]
    fn a_removed_page_never_becomes_missing_again() {
        let mut states = PageStates::new(4);

        states.set_removed(1..2);
        states.set_present(1..2);

        assert!(states.is_removed(1));
        assert!(!states.is_missing(1));
        assert_eq!(states.removed_count(), 1);
    }

    #[test]
    fn a_missing_run_stops_at_present_and_removed_pages_and_at_its_limits() {
        let mut states = PageStates::new(64);
        states.set_present(10..11);
        states.set_removed(20..21);

        assert_eq!(states.missing_run(15, 0..64), 11..20);
        assert_eq!(states.missing_run(15, 12..18), 12..18);
        assert_eq!(states.missing_run(10, 0..64), 10..10);
    }

    #[test]
    fn runs_of_bits_are_found_in_order_and_within_their_limits() {
        let mut bits = PageBits::new(300);
        bits.set(60..200);
        bits.clear(100..101);

        assert_eq!(bits.next_set(0..300, 1000), Some(60..100));
        assert_eq!(bits.next_set(100..300, 10), Some(101..111));
        assert_eq!(bits.next_set(150..160, 1000), Some(150..160));
        assert_eq!(bits.next_set(0..60, 1000), None);
        assert_eq!(bits.next_set(200..300, 1000), None);
        assert!(bits.is_set(99) && !bits.is_set(100) && !bits.is_set(300));
    }

    #[test]
    fn walking_the_missing_runs_visits_every_missing_page_once() {
        let mut states = PageStates::new(500);
        states.set_present(0..130);
        states.set_removed(200..201);
        states.set_present(499..500);

        let mut seen = Vec::new();
        let mut from = 0;
        while let Some(run) = states.next_missing(from, 16) {
            from = run.end;
            seen.extend(run);
        }

        assert_eq!(seen, (130..200).chain(201..499).collect::<Vec<_>>());
    }
}
