//! `discard` and `discard-random`: giving memory back as a balloon does, and remembering which, so that
//! `zeros`, `compare` and `hash` know what to expect.

use std::time::Instant;

use crate::failure::Failure;
use crate::json::Object;
use crate::memory::Memory;
use crate::page_set::PageSet;
use crate::random::Random;
use crate::touch::nanoseconds;
use crate::words::Settings;

/// `discard OFFSET LEN`: one madvise(2) a region of the range.
///
/// # Errors
/// A range that is not made of whole pages of regions, or what madvise says; regions before the failing one
/// are discarded and remembered.
pub(crate) fn range(
    memory: &Memory,
    discarded: &mut PageSet,
    offset: u64,
    len: usize,
) -> Result<Object, Failure> {
    let mut numbers = memory.page_numbers(offset, len)?;
    let chunks = memory.chunks(offset, len)?;
    let start = Instant::now();
    for chunk in chunks {
        chunk.discard(memory.discard())?;
        for number in numbers.by_ref().take(chunk.len() / memory.page_size()) {
            discarded.insert(number);
        }
    }
    Ok(Object::new().string("command", "discard").number("ns", nanoseconds(start.elapsed())))
}

/// `discard-random`: `count` runs of `pages` pages each, one madvise(2) a run. A run stays inside its region
/// and is shorter only where the region is.
///
/// # Errors
/// A refused setting, or what madvise says; runs before the failing one are discarded and remembered.
pub(crate) fn random(
    memory: &Memory,
    discarded: &mut PageSet,
    settings: &Settings,
) -> Result<Object, Failure> {
    settings.only(&["seed", "count", "pages"])?;
    let count = settings.count("count")?.ok_or_else(|| Failure::new("count: needed, the number of runs"))?;
    let run = settings.count("pages")?.unwrap_or(1);
    if run == 0 {
        return Err(Failure::new("pages: expected at least 1, got 0"));
    }
    let mut random = Random::new(settings.number("seed")?.unwrap_or(1));
    let mut hit = PageSet::new(memory.pages());
    let mut total = 0;
    let start = Instant::now();
    for _ in 0..count {
        let chosen = random.below(memory.pages());
        let region = memory.neighbours(chosen);
        let run = run.min(region.len());
        let first = chosen.min(region.end - run);
        let Some(page) = memory.page(first) else { continue };
        for chunk in memory.chunks(page.offset, run * memory.page_size())? {
            chunk.discard(memory.discard())?;
        }
        for number in first..first + run {
            discarded.insert(number);
            total += u64::from(hit.insert(number));
        }
    }
    Ok(Object::new()
        .string("command", "discard-random")
        .number("pages", total)
        .number("ns", nanoseconds(start.elapsed())))
}
