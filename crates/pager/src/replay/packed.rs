//! What is to be replayed, as bytes: for a pager in another process, which needs neither the recording nor its image, and for whoever goes
//! on after that.
//!
//! ```text
//! words of 8 bytes, little-endian
//! "UFFPLAN1", bytes of a page, bytes of the image, how many blocks follow, how many that are held back
//! of each block: which 64 pages of the image, and which of them, as bits; those held back likewise
//! CRC-32 of all of it
//! ```
//!
//! Reading it is one pass, bounded, so that it can be done where others wait.

use crate::error::PagerError;

use super::plan::{BLOCK, Masks, Replay};

const MAGIC: u64 = u64::from_le_bytes(*b"UFFPLAN1");
const HEAD: usize = 5;
/// Blocks, with those held back: of 256 GiB one behind the other.
const MOST_BLOCKS: usize = 1 << 20;
/// Pages of an image, as many as a process can have.
const MOST_PAGES: u64 = 1 << 45;

fn refused(reason: impl Into<String>) -> PagerError {
    PagerError::Protocol(format!("what is to be replayed cannot be read: {}", reason.into()))
}

impl Replay {
    /// All of it, as bytes.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut held: Vec<(u64, u64)> = self.held.iter().map(|(&block, &mask)| (block, mask)).collect();
        held.sort_unstable();
        let head = [MAGIC, self.page_size, self.image_size, self.blocks.len() as u64, held.len() as u64];
        let blocks = self.blocks.iter().chain(&held).flat_map(|&(block, mask)| [block, mask]);
        let mut bytes: Vec<u8> = head.into_iter().chain(blocks).flat_map(u64::to_le_bytes).collect();
        bytes.extend_from_slice(&u64::from(crc32fast::hash(&bytes)).to_le_bytes());
        bytes
    }

    /// The same from such bytes. A page that is in several blocks is in the first.
    ///
    /// # Errors
    ///
    /// [`PagerError::Protocol`] says what is wrong with them; [`PagerError::Exhausted`] for more than 1,048,576 blocks.
    pub fn unpack(bytes: &[u8]) -> Result<Self, PagerError> {
        let (words, []) = bytes.as_chunks::<8>() else { return Err(refused("it has half a word")) };
        let word = |at: usize| words.get(at).map_or(0, |&word| u64::from_le_bytes(word));
        let [magic, page_size, image_size, blocks, held] = [0, 1, 2, 3, 4].map(word);
        if magic != MAGIC {
            return Err(refused("it is something else"));
        }
        let (blocks, count) = (blocks as usize, blocks.saturating_add(held));
        if count > MOST_BLOCKS as u64 {
            return Err(PagerError::Exhausted(format!(
                "{count} blocks of 64 pages are to be replayed, of at most {MOST_BLOCKS}: intersect recordings, or take a shorter one"
            )));
        }
        let crc = HEAD + 2 * count as usize;
        let checked = bytes.get(..crc * 8).unwrap_or_default();
        if words.len() != crc + 1 || u64::from(crc32fast::hash(checked)) != word(crc) {
            return Err(refused("it is cut short, or damaged"));
        }
        let pages = image_size.checked_div(page_size).unwrap_or_default();
        if !page_size.is_power_of_two() || page_size < 4096 || pages > MOST_PAGES {
            return Err(refused(format!("an image of {image_size} bytes with pages of {page_size}")));
        }
        let mut replay = Self {
            page_size,
            image_size,
            blocks: Vec::with_capacity(blocks),
            members: Masks::new(),
            held: Masks::new(),
            pages: 0,
            held_pages: 0,
        };
        for (nth, at) in (HEAD..crc).step_by(2).enumerate() {
            replay.add(word(at), word(at + 1), nth >= blocks)?;
        }
        Ok(replay)
    }

    fn add(&mut self, block: u64, mask: u64, held: bool) -> Result<(), PagerError> {
        let last = mask.checked_ilog2().and_then(|bit| block.checked_mul(BLOCK)?.checked_add(u64::from(bit)));
        if last.is_none_or(|page| page >= self.image_size.div_ceil(self.page_size)) {
            return Err(refused(format!("block {block} has pages that the image has not, or none")));
        }
        let known = self.members.entry(block).or_insert(0);
        let mask = mask & !*known;
        *known |= mask;
        if held {
            self.held_pages += u64::from(mask.count_ones());
            *self.held.entry(block).or_insert(0) |= mask;
        } else if mask != 0 {
            self.pages += u64::from(mask.count_ones());
            self.blocks.push((block, mask));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Trace, TraceEnd, TraceFault, TraceHeader, TraceKind};

    fn replay(pages: &[u64], hold_back: bool) -> Replay {
        Replay::new(&trace(pages), hold_back)
    }

    fn trace(pages: &[u64]) -> Trace {
        let header = TraceHeader { page_size: 4096, image_size: 1 << 30, identity: [7; 32], started_ms: 0 };
        let fault = |(time_ns, &page): (u64, &u64)| TraceFault {
            time_ns,
            kind: TraceKind::Missing,
            write: false,
            page,
            before: 0,
            pages: 1,
            latency_ns: 1,
        };
        let faults = (0..).zip(pages).map(fault).collect();
        Trace { header, faults, end: TraceEnd::Complete, dropped: 0 }
    }

    fn told(replay: &Replay) -> (u64, u64, Vec<(u64, u64)>, u64, u64) {
        let Replay { page_size, image_size, blocks, pages, held_pages, .. } = replay;
        (*page_size, *image_size, blocks.clone(), *pages, *held_pages)
    }

    #[test]
    fn what_was_packed_is_the_same_in_the_same_order() {
        let far: Vec<u64> = (0..40_000).map(|nth| nth * 37 % (1 << 18)).chain([5, 64, 6]).collect();
        for (pages, hold_back) in
            [(&[][..], false), (&[200, 3, 4, 77][..], false), (&far, false), (&far, true)]
        {
            let replay = replay(pages, hold_back);
            let again = Replay::unpack(&replay.pack()).unwrap();

            assert_eq!(told(&again), told(&replay));
            assert_eq!((again.members, again.held), (replay.members, replay.held));
        }
    }

    #[test]
    fn a_plan_of_scattered_pages_is_smaller_than_its_recording_and_read_sooner() {
        let pages: Vec<u64> = (0..1_u64 << 16).map(|nth| nth * 40_503 % (1 << 18)).collect();
        let (trace, packed) = (trace(&pages).encode(), replay(&pages, false).pack());
        let took = |act: &dyn Fn()| {
            let started = std::time::Instant::now();
            act();
            started.elapsed()
        };
        let plan = took(&|| drop(Replay::unpack(&packed)));
        let recording = took(&|| drop(Trace::parse(&trace).map(|trace| Replay::new(&trace, false))));

        println!("{} bytes in {plan:?}; as a recording {} in {recording:?}", packed.len(), trace.len());
        assert!(packed.len() < trace.len());
        assert!(plan < recording, "{plan:?} {recording:?}");
    }

    #[test]
    fn bytes_that_are_none_are_refused_and_more_than_there_may_be_are_said_to_be() {
        let good = replay(&[1, 2, 70], false).pack();
        for len in 0..good.len() {
            assert!(Replay::unpack(&good[..len]).is_err(), "{len}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(Replay::unpack(&bad).is_err(), "{at}");
        }
        let sealed = |words: &[u64]| {
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.extend_from_slice(&u64::from(crc32fast::hash(&bytes)).to_le_bytes());
            Replay::unpack(&bytes)
        };
        let image = 1 << 20;
        assert!(sealed(&[MAGIC, 4096, image, 1, 0, 3, u64::MAX]).is_ok());
        for words in [
            &[MAGIC, 4096, image, 1, 0, 4, 1][..],
            &[MAGIC, 4096, image, 1, 0, u64::MAX, 1],
            &[MAGIC, 4096, image, 1, 0, 0, 0],
            &[MAGIC, 4096, image, 0, 1, 9, 1],
            &[MAGIC, 4095, image, 0, 0],
            &[MAGIC, 0, image, 0, 0],
            &[MAGIC, 4096, u64::MAX, 0, 0],
            &[MAGIC, 4096, image, 2, 0, 0, 1],
            &[MAGIC, 4096, image, u64::MAX, 2],
        ] {
            assert!(sealed(words).is_err(), "{words:x?}");
        }
        let twice = sealed(&[MAGIC, 4096, image, 2, 1, 0, 7, 0, 12, 0, 24]).unwrap();
        assert_eq!(told(&twice), (4096, image, vec![(0, 7), (0, 8)], 4, 1));
        let many = sealed(&[MAGIC, 4096, image, MOST_BLOCKS as u64, 1]);
        assert!(matches!(many, Err(PagerError::Exhausted(_))), "{many:?}");
    }
}
