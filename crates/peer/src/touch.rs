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
#[derive(Clone, Copy)]
struct Seen {
    start: Instant,
    end: Instant,
    first: Duration,
    slowest: Duration,
}

/// Loads 8 bytes of each chosen page; see the help for the settings.
///
/// # Errors
/// A refused setting.
pub(crate) fn touch(memory: &Memory, settings: &Settings) -> Result<Object, Failure> {
    settings.only(&["order", "seed", "threads", "stride", "limit"])?;
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
    let mut pages: Vec<usize> = (0..memory.pages()).step_by(stride / page_size).collect();
    match settings.get("order").unwrap_or("sequential") {
        "sequential" => {}
        "random" => Random::new(settings.number("seed")?.unwrap_or(1)).shuffle(&mut pages),
        other => return Err(Failure::new(format!("order: expected sequential or random, got {other:?}"))),
    }
    pages.truncate(settings.count("limit")?.unwrap_or(usize::MAX));

    let seen = in_threads(memory, &pages, threads);
    let started = seen.iter().min_by_key(|one| one.start);
    let total = match (started, seen.iter().map(|one| one.end).max()) {
        (Some(first), Some(end)) => end.duration_since(first.start),
        _ => Duration::ZERO,
    };
    let slowest = seen.iter().map(|one| one.slowest).max().unwrap_or_default();
    Ok(Object::new()
        .string("command", "touch")
        .number("pages", pages.len() as u64)
        .number("first_ns", nanoseconds(started.map(|one| one.first).unwrap_or_default()))
        .number("total_ns", nanoseconds(total))
        .number("max_ns", nanoseconds(slowest))
        .number("bytes", (pages.len() * page_size) as u64))
}

/// Nanoseconds as the answers carry them.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Splits `pages` among threads that start together. Few pages make few threads.
fn in_threads(memory: &Memory, pages: &[usize], threads: usize) -> Vec<Seen> {
    if pages.is_empty() {
        return Vec::new();
    }
    let parts: Vec<&[usize]> = pages.chunks(pages.len().div_ceil(threads)).collect();
    if let [only] = parts.as_slice() {
        // In the main thread: the peer then needs no second stack, whose pages would count as resident set.
        return vec![load_each(memory, only)];
    }
    let barrier = Barrier::new(parts.len());
    thread::scope(|scope| {
        let running: Vec<_> = parts
            .iter()
            .map(|part| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    load_each(memory, part)
                })
            })
            .collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

fn load_each(memory: &Memory, pages: &[usize]) -> Seen {
    let start = Instant::now();
    let mut seen = Seen { start, end: start, first: Duration::ZERO, slowest: Duration::ZERO };
    for (index, page) in pages.iter().filter_map(|number| memory.page(*number)).enumerate() {
        let before = Instant::now();
        page.memory.touch();
        seen.end = Instant::now();
        let took = seen.end.duration_since(before);
        if index == 0 {
            seen.first = took;
        }
        seen.slowest = seen.slowest.max(took);
    }
    seen
}
