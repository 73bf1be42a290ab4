//! Memory that is read, given back and moved about by different threads at the same time. Nobody moves what another thread
//! uses: whoever touches a piece of it shares the piece's lock, whoever moves a part of it has the lock alone, and where
//! everything is by then is kept behind that lock.

use std::ops::Range;
use std::sync::RwLock;

use nix::errno::Errno;

use super::PAGE;
use super::handshakes::Random;
use super::support::area::{Area, Made};

/// Pages under one lock.
const PIECE: usize = 128;
/// What is moved is cut no smaller: each move apart costs a piece of the pager's map, and windows end there.
const SMALLEST: usize = 8;
/// The most pages that the end of a piece grows by.
const MOST_GROWN: usize = 7;
/// The most pages that are unmapped at once.
const MOST_GIVEN_UP: usize = 4;
/// Where the memory is first, side by side. Its other places keep room between pieces, to grow, and not to be one mapping.
const HOME: usize = 0;
const PLACES: usize = 3;

/// Pages that lie together.
#[derive(Debug)]
struct Part {
    pages: Range<usize>,
    place: usize,
    /// Pages behind them, which never had a source.
    grown: usize,
}

pub(crate) struct Memory {
    places: [Area; PLACES],
    /// Of each piece, in the order of pages. Those that were given up for good are in no part.
    pieces: Vec<RwLock<Vec<Part>>>,
}

impl Memory {
    pub(crate) fn new(pages: usize) -> Self {
        assert_eq!(pages % PIECE, 0);
        let pieces = pages / PIECE;
        let places = std::array::from_fn(|place| Area::reserve(PAGE, pieces * stride(place)));
        places[HOME].map(Made::Private);
        let whole = |piece| vec![Part { pages: piece * PIECE..(piece + 1) * PIECE, place: HOME, grown: 0 }];
        Self { places, pieces: (0..pieces).map(|piece| RwLock::new(whole(piece))).collect() }
    }

    /// Where it is to be registered.
    pub(crate) fn home(&self) -> Area {
        self.places[HOME]
    }

    /// One word of a page, by `read`; `None` of a page that was given up.
    pub(crate) fn word<T>(&self, page: usize, word: usize, read: impl FnOnce(Area, usize) -> T) -> Option<T> {
        let parts = self.pieces[page / PIECE].read().unwrap();
        let part = parts.iter().find(|part| part.pages.contains(&page))?;
        Some(read(self.at(page, 1, part.place), word))
    }

    /// One word of what the piece has grown by that has `page`, by `read`.
    pub(crate) fn grown_word<T>(
        &self,
        page: usize,
        word: usize,
        read: impl FnOnce(Area, usize) -> T,
    ) -> Option<T> {
        let parts = self.pieces[page / PIECE].read().unwrap();
        let part = parts.last().filter(|part| part.grown > 0)?;
        let behind = self.at(part.pages.end - 1, 1 + part.grown, part.place).part(1, part.grown);
        Some(read(behind.part(page % part.grown, 1), word))
    }

    /// Some pages that lie together and begin with `first`, at most so many, for `act`. `None` where it was given up.
    pub(crate) fn together<T>(
        &self,
        first: usize,
        most: usize,
        act: impl FnOnce(Range<usize>, Area) -> T,
    ) -> Option<T> {
        let parts = self.pieces[first / PIECE].read().unwrap();
        let part = parts.iter().find(|part| part.pages.contains(&first))?;
        let pages = first..(first + most).min(part.pages.end);
        let area = self.at(first, pages.len(), part.place);
        Some(act(pages, area))
    }

    /// Moves something, as soon as nobody uses it, to another of its places, with `remap` as mremap(2). Its end may grow or
    /// be given up by that, and what it leaves may stay mapped: then one word of it. `Err` is what mremap(2) says. After
    /// EFAULT it is used no more: of several mappings, the kernel may have moved the first (Linux 6.17).
    pub(crate) fn move_something(
        &self,
        random: &mut Random,
        remap: impl FnOnce(Area, Area, i32) -> Result<(), Errno>,
    ) -> Result<Option<u64>, Errno> {
        let mut parts = self.pieces[random.below(self.pieces.len())].write().unwrap();
        if parts.is_empty() {
            return Ok(None);
        }
        let mut chosen = random.below(parts.len());
        if parts[chosen].pages.len() >= 2 * SMALLEST && random.one_in(4) {
            chosen += cut_in_two(&mut parts, chosen, random);
        }
        let is_end = chosen + 1 == parts.len();
        let part = &mut parts[chosen];
        let place = (part.place + 1 + random.below(PLACES - 1)) % PLACES;
        let gives_up = part.pages.len() > MOST_GIVEN_UP && random.one_in(8);
        let given_up = if gives_up { 1 + random.below(MOST_GIVEN_UP) } else { 0 };
        let grows = is_end && place != HOME && given_up == 0;
        let grown = if grows { random.below(MOST_GROWN + 1) } else { 0 };
        let pages = part.pages.start..part.pages.end - given_up;
        let from = self.at(pages.start, part.pages.len() + part.grown, part.place);
        let to = self.at(pages.start, pages.len() + grown, place);
        let stay = from.pages == to.pages && random.one_in(4);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        if let Err(errno) = remap(from, to, if stay { flags | libc::MREMAP_DONTUNMAP } else { flags }) {
            parts.remove(chosen);
            return Err(errno);
        }
        *part = Part { pages, place, grown };
        Ok(stay.then(|| from.word(random.below(from.len() / 8))))
    }

    /// `pages` pages from page `first` on, at a place of theirs.
    fn at(&self, first: usize, pages: usize, place: usize) -> Area {
        self.places[place].part(first / PIECE * stride(place) + first % PIECE, pages)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.places.iter().for_each(|place| assert!(place.unmap_raw()));
    }
}

/// Pages from piece to piece.
fn stride(place: usize) -> usize {
    if place == HOME { PIECE } else { PIECE + MOST_GROWN + 1 }
}

/// Which of both is meant.
fn cut_in_two(parts: &mut Vec<Part>, index: usize, random: &mut Random) -> usize {
    let part = &mut parts[index];
    let at = part.pages.start + SMALLEST + random.below(part.pages.len() - 2 * SMALLEST + 1);
    let behind = Part { pages: at..part.pages.end, place: part.place, grown: part.grown };
    *part = Part { pages: part.pages.start..at, place: part.place, grown: 0 };
    parts.insert(index + 1, behind);
    random.below(2)
}
