//! How many pages an answer brings.
//!
//! Whether an installed page is ever touched cannot be seen; where memory faults can, and that alone decides.
//!
//! - A fault starts with 64 KiB.
//! - A fault right behind the last window is a stream: each doubles what the one before it brought, to 2 MiB. What goes beyond
//!   256 KiB comes while nobody waits for anything else.
//! - Where an eighth of the windows of a 16 MiB block have faulted, the rest of the block is likely wanted too, and windows of
//!   256 KiB bring it with a quarter of the faults. Where half of the block was brought like that, the other half is brought
//!   without faults.
//! - A block that hardly ever faults, while the others do, gets 16 KiB.

use std::ops::Range;

use crate::page_state::PageStates;

const SPARSE: u64 = 16 << 10;
const FIRST: u64 = 64 << 10;
const DENSE: u64 = 256 << 10;
const LONGEST: u64 = 2 << 20;
const BLOCK: u64 = 16 << 20;
/// An eighth of the windows of a block.
const MANY: u16 = (BLOCK / FIRST / 8) as u16;
/// Half of the windows of a block.
const MOST: u16 = (BLOCK / FIRST / 2) as u16;
/// A block is sparse where no more windows have faulted than this, a sixty-fourth of them, ...
const FEW: u16 = (BLOCK / FIRST / 64) as u16;
/// ... since it was first wanted and the session took so many faults: as many as the block has windows.
const LONG: u32 = (BLOCK / FIRST) as u32;
/// Streams that are told apart: as many threads may read at once, each its own stretch.
const STREAMS: usize = 8;

/// The window of a session's faults.
#[derive(Debug)]
pub(crate) enum Window {
    /// Always this many pages.
    Fixed(usize),
    /// As the faults are.
    Adaptive(Box<Adaptive>),
}

#[derive(Debug)]
pub(crate) struct Adaptive {
    /// Pages of [`SPARSE`], [`FIRST`], [`DENSE`], [`LONGEST`] and [`BLOCK`].
    sparse: usize,
    first: usize,
    dense: usize,
    longest: usize,
    block: usize,
    blocks: Vec<Block>,
    /// Faults so far.
    faults: u32,
    streams: [Stream; STREAMS],
    /// The one that was begun or went on last.
    stream: usize,
    /// To be brought while nobody waits.
    wish: Option<Range<usize>>,
    /// Faults of streams since that was asked.
    went_on: usize,
}

/// What is known of 16 MiB.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Windows of [`FIRST`] that faults have brought so far.
    brought: u16,
    /// The number of the fault that brought the first.
    since: u32,
}

/// Windows one behind the other.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// Behind what the last fault brought.
    from: usize,
    /// Behind what is to be brought without a fault.
    end: usize,
    /// Pages of the last window; 0: none yet.
    pages: usize,
    /// Which fault this was.
    last: u32,
}

impl Window {
    /// `bytes` around every fault, or, where absent, what the faults suggest. For `pages` pages of `page_size` bytes.
    pub(crate) fn new(bytes: Option<u64>, pages: usize, page_size: u64) -> Self {
        // At least one page, where pages are larger than that.
        let count = |bytes: u64| (bytes / page_size).max(1) as usize;
        if let Some(bytes) = bytes {
            return Self::Fixed(count(bytes));
        }
        let block = count(BLOCK);
        Self::Adaptive(Box::new(Adaptive {
            sparse: count(SPARSE),
            first: count(FIRST),
            dense: count(DENSE),
            longest: count(LONGEST),
            block,
            blocks: vec![Block::default(); pages.div_ceil(block)],
            faults: 0,
            streams: [Stream::default(); STREAMS],
            stream: 0,
            wish: None,
            went_on: 0,
        }))
    }

    /// Takes note of a fault on `page`, which is missing; how many pages to bring.
    pub(crate) fn at(&mut self, page: usize, states: &PageStates) -> usize {
        match self {
            Self::Fixed(pages) => *pages,
            Self::Adaptive(adaptive) => adaptive.at(page, states),
        }
    }

    /// Takes note of what the last fault brings, which may be less.
    pub(crate) fn brings(&mut self, run: &Range<usize>) {
        if let Self::Adaptive(adaptive) = self {
            adaptive.brings(run);
        }
    }

    /// Pages that the last fault wants to be brought while nobody waits. Each is asked for once.
    pub(crate) fn wish(&mut self) -> Option<Range<usize>> {
        match self {
            Self::Fixed(_) => None,
            Self::Adaptive(adaptive) => adaptive.wish.take(),
        }
    }

    /// How many faults a stream has foreseen since that was asked last.
    pub(crate) fn foreseen(&mut self) -> usize {
        match self {
            Self::Fixed(_) => 0,
            Self::Adaptive(adaptive) => std::mem::take(&mut adaptive.went_on),
        }
    }

    /// The most pages that are brought at once.
    pub(crate) fn most(&self) -> usize {
        match self {
            Self::Fixed(pages) => *pages,
            Self::Adaptive(adaptive) => adaptive.dense,
        }
    }
}

impl Adaptive {
    fn at(&mut self, page: usize, states: &PageStates) -> usize {
        self.faults = self.faults.wrapping_add(1);
        self.wish = None;
        let by_density = self.by_density(page);
        let pages = match self.streams.iter().position(|stream| stream.goes_on_at(page, self.block, states)) {
            Some(stream) => {
                self.stream = stream;
                self.went_on += 1;
                let last = self.streams.get(stream).map_or(0, |stream| stream.pages);
                (last * 2).clamp(by_density, self.longest.max(by_density))
            }
            None => {
                // In the place of the one that has not gone on for longest.
                let age = |stream: &Stream| match stream.pages {
                    0 => u32::MAX,
                    _ => self.faults.wrapping_sub(stream.last),
                };
                self.stream = (0..STREAMS).max_by_key(|&at| self.streams.get(at).map_or(0, age)).unwrap_or(0);
                if let Some(stream) = self.streams.get_mut(self.stream) {
                    stream.end = page;
                }
                by_density
            }
        };
        if let Some(stream) = self.streams.get_mut(self.stream) {
            *stream = Stream { from: page, pages, last: self.faults, ..*stream };
        }
        pages.min(self.dense)
    }

    fn by_density(&mut self, page: usize) -> usize {
        let number = page / self.block;
        let Some(block) = self.blocks.get_mut(number) else { return self.first };
        if block.brought == 0 {
            block.since = self.faults;
        }
        if block.brought >= MANY {
            block.brought = block.brought.saturating_add((DENSE / FIRST) as u16);
            if (MOST..u16::MAX).contains(&block.brought) {
                // Never asked for again: only the windows of faults that come meanwhile.
                block.brought = u16::MAX;
                let start = number * self.block;
                self.wish = Some(start..start + self.block);
            }
            return self.dense;
        }
        let sparse = (1..=FEW).contains(&block.brought) && self.faults.wrapping_sub(block.since) >= LONG;
        block.brought += 1;
        if sparse { self.sparse } else { self.first }
    }

    fn brings(&mut self, run: &Range<usize>) {
        let Some(stream) = self.streams.get_mut(self.stream) else { return };
        stream.from = run.end;
        let ahead = stream.end.max(run.end)..run.start + stream.pages;
        stream.end = stream.end.max(run.end);
        if stream.pages > self.dense && !ahead.is_empty() && self.wish.is_none() {
            stream.end = ahead.end;
            self.wish = Some(ahead);
        }
    }
}

impl Stream {
    /// Whether a fault on `page` is right behind it, or where it has not come to yet: nothing is missing in between, which may
    /// have come otherwise.
    fn goes_on_at(&self, page: usize, most: usize, states: &PageStates) -> bool {
        if self.pages == 0 || page < self.from || page > self.end.saturating_add(most) {
            return false;
        }
        page <= self.end || states.next_missing(self.end, 1).is_some_and(|next| next.start == page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    /// Memory of so many pages, and how it is asked for.
    struct Memory {
        window: Window,
        states: PageStates,
    }

    impl Memory {
        fn new(pages: usize) -> Self {
            Self { window: Window::new(None, pages, PAGE), states: PageStates::new(pages) }
        }

        /// How many pages a fault asks for; they are there afterwards.
        fn fault(&mut self, page: usize) -> usize {
            let pages = self.window.at(page, &self.states);
            let start = page / pages * pages;
            let run = self.states.missing_run(page, start..start + pages);
            self.window.brings(&run);
            self.states.set_present(run);
            pages
        }

        fn wish(&mut self) -> Option<Range<usize>> {
            self.window.wish()
        }
    }

    #[test]
    fn a_fixed_window_stays_as_it_is_and_has_at_least_a_page() {
        let (mut window, states) = (Window::new(Some(64 << 10), 1 << 20, PAGE), PageStates::new(1 << 20));

        assert!((0..1000).all(|page| window.at(page * 16, &states) == 16));
        assert_eq!(window.wish(), None);
        assert_eq!(Window::new(Some(4096), 8, 2 << 20).at(0, &states), 1);
    }

    #[test]
    fn windows_grow_where_faults_are_dense_and_only_there() {
        let mut memory = Memory::new(8192);

        let sizes: Vec<usize> = (0..34).map(|fault| memory.fault(fault * 112 + 5)).collect();

        assert_eq!(sizes[..32], [16; 32]);
        assert_eq!(sizes[32..], [64; 2]);
        assert_eq!(memory.fault(4096), 16, "the next block has not faulted yet");
        assert_eq!(memory.fault(8192), 16, "beyond the last block");
    }

    #[test]
    fn a_block_of_which_half_was_wanted_is_wanted_once_as_a_whole() {
        let mut memory = Memory::new(8192);

        // From the last to the first: no stream.
        let wishes: Vec<_> = (0..100)
            .map(|fault| {
                memory.fault(8192 - 16 - fault * 32);
                memory.wish()
            })
            .collect();

        let whole = wishes.iter().position(Option::is_some);
        assert_eq!(whole, Some(32 + 24 - 1), "an eighth by 64 KiB, three eighths by 256 KiB");
        assert_eq!(wishes[55], Some(4096..8192));
        assert!(wishes[56..].iter().all(Option::is_none));
        assert_eq!(memory.fault(4100), 64, "faults that come meanwhile bring as much as before");
        assert_eq!(memory.wish(), None);
    }

    #[test]
    fn a_stream_doubles_and_what_exceeds_a_dense_window_is_wanted_once_while_nobody_waits() {
        let mut memory = Memory::new(4096);
        let (mut page, mut faults, mut wishes) = (0, Vec::new(), Vec::new());

        for _ in 0..6 {
            faults.push((page, memory.fault(page)));
            if let Some(wish) = memory.wish() {
                memory.states.set_present(wish.clone());
                wishes.push(wish);
            }
            page = memory.states.next_missing(page, 1).unwrap().start;
        }

        assert_eq!(faults, [(0, 16), (16, 32), (32, 64), (64, 64), (192, 64), (448, 64)]);
        assert_eq!(wishes, [128..192, 256..448, 512..960]);
    }

    #[test]
    fn who_is_faster_than_what_comes_ahead_goes_on_and_nothing_is_wanted_twice() {
        let mut memory = Memory::new(1 << 14);
        let mut wanted = 0;

        for page in (0..8192).step_by(64) {
            if memory.states.is_missing(page) {
                assert!(memory.fault(page) <= 64, "page {page}");
            }
            // Apart from the rest of a block.
            if let Some(wish) = memory.wish().filter(|wish| wish.len() < 4096) {
                assert!(wish.start >= wanted && wish.end <= page + 512, "{wish:?} at {page}");
                wanted = wish.end;
            }
        }

        assert_eq!(wanted, 8192 - 64 + 512);
    }

    #[test]
    fn streams_next_to_each_other_are_told_apart_and_go_on_behind_what_came_otherwise() {
        let mut memory = Memory::new(1 << 16);
        let starts: Vec<usize> = (0..8).map(|stream| stream * 4096).collect();

        for &start in &starts {
            assert_eq!(memory.fault(start), 16);
        }
        for &start in &starts {
            assert_eq!(memory.fault(start + 16), 32);
        }
        memory.states.set_present(32..100);

        assert_eq!(memory.fault(100), 64, "nothing was missing in between");
        assert_eq!(memory.fault(4096 + 48), 16, "not right behind");
    }

    #[test]
    fn faults_of_streams_are_foreseen_and_others_are_not() {
        let mut memory = Memory::new(8192);

        for fault in 0..4 {
            memory.fault(fault * 1000);
        }
        assert_eq!(memory.window.foreseen(), 0);

        memory.fault(5000);
        for _ in 0..3 {
            let next = memory.states.next_missing(5000, 1).unwrap().start;
            memory.fault(next);
        }
        assert_eq!(memory.window.foreseen(), 3);
        assert_eq!(memory.window.foreseen(), 0, "told once");
        assert_eq!(Window::new(Some(64 << 10), 1, PAGE).foreseen(), 0);
    }

    #[test]
    fn a_stream_that_ended_is_forgotten_for_new_ones() {
        let mut memory = Memory::new(1 << 16);

        for start in 0..9 {
            memory.fault(start * 4096);
        }

        assert_eq!(memory.fault(16), 16, "the oldest of nine");
        assert_eq!(memory.fault(8 * 4096 + 16), 32, "the latest");
    }

    #[test]
    fn a_block_that_hardly_faults_while_others_do_gets_less() {
        let blocks = 300;
        let mut memory = Memory::new(blocks * 4096);

        let first: Vec<usize> = (0..blocks).map(|block| memory.fault(block * 4096)).collect();
        let then: Vec<usize> = (0..blocks).map(|block| memory.fault(block * 4096 + 2000)).collect();

        assert!(first.iter().all(|&pages| pages == 16), "nothing is known of them");
        assert!(then.iter().all(|&pages| pages == 4), "{then:?}");
        let more: Vec<usize> = (1..40).map(|fault| memory.fault(fault * 96 + 8)).collect();
        assert_eq!(more[..3], [4; 3]);
        assert_eq!(more[3..30], [16; 27], "more than a sixty-fourth");
        assert_eq!(more[38], 64, "dense");
    }
}
