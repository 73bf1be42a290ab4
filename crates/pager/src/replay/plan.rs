//! A recording as what is to be done, made once for any number of sessions.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use crate::error::PagerError;
use crate::trace::Trace;

/// Pages of a block: one word of them.
pub(super) const BLOCK: u64 = 64;
/// Pages after which a block begins anew: 64 MiB.
const EPOCH: u64 = 1 << 14;
/// One page in so many is held back, where waste is to be estimated.
const HELD: u64 = 64;

/// Pages of the image, 64 to a word.
pub(super) type Masks = HashMap<u64, u64>;

/// What a recording comes to. Made once, for any number of sessions.
#[derive(Debug)]
pub struct Replay {
    pub(super) page_size: u64,
    pub(super) image_size: u64,
    /// Which block, and which pages of it.
    pub(super) blocks: Vec<(u64, u64)>,
    pub(super) members: Masks,
    pub(super) held: Masks,
    /// How many pages that is, and how many of them are held back.
    pub(super) pages: u64,
    pub(super) held_pages: u64,
}

impl Replay {
    /// Of what `trace` has brought. With `hold_back`, one page in 64 is left out, so that it can be seen whether anybody wants
    /// it: what share of the others nobody wants is the same, on average.
    #[must_use]
    pub fn new(trace: &Trace, hold_back: bool) -> Self {
        let page_size = u64::from(trace.header.page_size);
        let mut replay = Self {
            page_size,
            image_size: trace.header.image_size,
            blocks: Vec::new(),
            members: Masks::new(),
            held: Masks::new(),
            pages: 0,
            held_pages: 0,
        };
        let chance = RandomState::new();
        let mut of_epoch: HashMap<u64, usize> = HashMap::new();
        for page in trace.working_set().into_iter().flatten() {
            let (block, bit) = (page / BLOCK, 1 << (page % BLOCK));
            *replay.members.entry(block).or_insert(0) |= bit;
            if hold_back && chance.hash_one(page) % HELD == 0 {
                *replay.held.entry(block).or_insert(0) |= bit;
                replay.held_pages += 1;
                continue;
            }
            if replay.pages.is_multiple_of(EPOCH) {
                of_epoch.clear();
            }
            replay.pages += 1;
            let index = *of_epoch.entry(block).or_insert(replay.blocks.len());
            match replay.blocks.get_mut(index) {
                Some((_, mask)) => *mask |= bit,
                None => replay.blocks.push((block, bit)),
            }
        }
        replay
    }

    /// Refuses a source that cannot be its image. Whether it is that, [`Trace::check`] tells.
    pub(crate) fn fits(&self, source_len: u64) -> Result<(), PagerError> {
        if source_len == self.image_size {
            return Ok(());
        }
        Err(PagerError::TraceImage(format!(
            "the recording is of an image of {} bytes, this one has {source_len}",
            self.image_size
        )))
    }

    /// The stretches of a block: where in the image, and bytes.
    pub(super) fn stretches(&self, block: u64, mask: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let page_size = self.page_size;
        let mut left = mask;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let start = left.trailing_zeros();
            let len = (left >> start).trailing_ones();
            left &= u64::MAX.checked_shl(start + len).unwrap_or(0);
            Some(((block * BLOCK + u64::from(start)) * page_size, u64::from(len) * page_size))
        })
    }

    /// Whether any page of `len` bytes from `offset` on is in there.
    pub(super) fn any(&self, masks: &Masks, offset: u64, len: u64) -> bool {
        let mut pages = offset / self.page_size..(offset + len).div_ceil(self.page_size);
        pages.any(|page| masks.get(&(page / BLOCK)).is_some_and(|mask| mask >> (page % BLOCK) & 1 != 0))
    }
}
