//! `touch`: taking one fault a page and measuring each from the inside, the way a guest would feel it.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::json::Object;
use crate::memory::Memory;
use crate::random::Random;
use crate::words::Settings;

/// More threads than this are a typing error.
const MOST_THREADS: usize = 1024;

/// What one thread saw.
struct Seen {
    start: Instant,
    end: Instant,
    first: Duration,
    /// One for each page, in no order.
    times: Vec<Duration>,
}

/// Loads 8 bytes of each chosen page, or stores there what it has loaded; see the help for the settings.
///
/// # Errors
/// A refused setting.
pub(crate) fn touch(memory: &Memory, settings: &Settings) -> Result<Object, Failure> {
    settings.only(&["order", "seed", "threads", "stride", "limit", "access", "offset"])?;
    let page_size = memory.page_size();
    let stride = settings.bytes("stride")?.unwrap_or(page_size);
    let threads = settings.count("threads")?.unwrap_or(1);
    if stride == 0 || !stride.is_multiple_of(page_size) {
        return Err(Failure::new(format!(
            "stride: expected a multiple of the page size ({page_size}) above 0, got {stride}"
        )));
    }
    if !(1..=MOST_THREADS).contains(&threads) {
        return Err(Failure::new(format!("threads: expected 1 to {MOST_THREADS}, got {threads}")));
    }
    let offset = settings.bytes("offset")?.unwrap_or(0);
    if !offset.is_multiple_of(page_size) {
        return Err(Failure::new(format!(
            "offset: expected a multiple of the page size ({page_size}), got {offset}"
        )));
    }
    let first = offset / page_size;
    let mut pages: Vec<usize> = (first..memory.pages()).step_by(stride / page_size).collect();
    match settings.get("order").unwrap_or("sequential") {
        "sequential" => {}
        "random" => Random::new(settings.number("seed")?.unwrap_or(1)).shuffle(&mut pages),
        other => return Err(Failure::new(format!("order: expected sequential or random, got {other:?}"))),
    }
    let store = match settings.get("access").unwrap_or("load") {
        "load" => false,
        "store" => true,
        other => return Err(Failure::new(format!("access: expected load or store, got {other:?}"))),
    };
    pages.truncate(settings.count("limit")?.unwrap_or(usize::MAX));

    let seen = in_threads(memory, &pages, threads, store);
    let started = seen.iter().min_by_key(|one| one.start);
    let total = match (started, seen.iter().map(|one| one.end).max()) {
        (Some(first), Some(end)) => end.duration_since(first.start),
        _ => Duration::ZERO,
    };
    let first = started.map(|one| one.first).unwrap_or_default();
    let mut times: Vec<Duration> = seen.into_iter().flat_map(|one| one.times).collect();
    times.sort_unstable();
    let rank = |share: usize| nanoseconds(times.get(times.len() * share / 100).copied().unwrap_or_default());
    Ok(Object::new()
        .string("command", "touch")
        .number("pages", pages.len() as u64)
        .number("first_ns", nanoseconds(first))
        .number("total_ns", nanoseconds(total))
        .number("max_ns", nanoseconds(times.last().copied().unwrap_or_default()))
        .number("median_ns", rank(50))
        .number("p99_ns", rank(99))
        .number("bytes", (pages.len() * page_size) as u64))
}

/// Nanoseconds as the answers carry them.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Splits `pages` among threads that start together. Few pages make few threads.
fn in_threads(memory: &Memory, pages: &[usize], threads: usize, store: bool) -> Vec<Seen> {
    if pages.is_empty() {
        return Vec::new();
    }
    let parts: Vec<&[usize]> = pages.chunks(pages.len().div_ceil(threads)).collect();
    if let [only] = parts.as_slice() {
        // In the main thread: the peer then needs no second stack, whose pages would count as resident set.
        return vec![visit_each(memory, only, store)];
    }
    let barrier = Barrier::new(parts.len());
    thread::scope(|scope| {
        let running: Vec<_> = parts
            .iter()
            .map(|part| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    visit_each(memory, part, store)
                })
            })
            .collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

fn visit_each(memory: &Memory, pages: &[usize], store: bool) -> Seen {
    // Its pages must be there before the clock runs.
    let mut times = vec![Duration::ZERO; pages.len()];
    times.clear();
    let start = Instant::now();
    let mut end = start;
    for page in pages.iter().filter_map(|number| memory.page(*number)) {
        let before = Instant::now();
        if store {
            page.memory.touch_for_writing()
        } else {
            _ = page.memory.touch()
        }
        end = Instant::now();
        times.push(end.duration_since(before));
    }
    Seen { start, end, first: times.first().copied().unwrap_or_default(), times }
}
