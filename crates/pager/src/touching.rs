//! Touching memory, and how long each page of it took: the other side of what is served, for measuring.

use std::io;
use std::time::Instant;

use uffd::Mapping;

use crate::placement::pin;

/// What touching all of a mapping came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touched {
    /// From before the first page to after the last.
    pub nanoseconds: u64,
    /// Of each page, in the order in which they were touched; at most four seconds.
    pub latencies: Vec<u32>,
    /// Of the words that were read and their places: the same for the same bytes, in whatever order.
    pub sum: u64,
}

/// Reads a word of each page of `mapping` on a thread of its own, in an order that follows from `seed` (0: from the first page
/// to the last), on this CPU.
///
/// # Errors
///
/// No thread could be started, or it may not run on that CPU.
pub fn touch(mapping: &Mapping, seed: u32, cpu: Option<usize>) -> io::Result<Touched> {
    let order = order(mapping.len() / mapping.page_size(), seed);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("uffd-touch".into()).spawn_scoped(scope, || {
            if let Some(cpu) = cpu {
                pin(cpu)?;
            }
            Ok(touch_all(mapping, &order))
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that touches has panicked")))
    })
}

fn touch_all(mapping: &Mapping, order: &[u32]) -> Touched {
    let mut latencies = Vec::with_capacity(order.len());
    let mut sum = 0_u64;
    let start = Instant::now();
    let mut before = start;
    for &page in order {
        let place = mapping.as_ptr().wrapping_add(page as usize * mapping.page_size()).cast::<u64>();
        // SAFETY: inside of the mapping, which lives as long as the caller's borrow, and aligned; whoever writes there installs
        // whole pages before this continues.
        let word = unsafe { place.read_volatile() };
        let now = Instant::now();
        latencies.push(u32::try_from((now - before).as_nanos()).unwrap_or(u32::MAX));
        before = now;
        sum = sum.wrapping_add(word.wrapping_mul(2 * u64::from(page) + 1));
    }
    let nanoseconds = u64::try_from((before - start).as_nanos()).unwrap_or(u64::MAX);
    Touched { nanoseconds, latencies, sum }
}

/// Each page once: a shuffle by xorshift.
fn order(pages: usize, seed: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..).take(pages).collect();
    let mut state = seed;
    if seed == 0 {
        return order;
    }
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        order.swap(last, state as usize % (last + 1));
    }
    order
}

#[cfg(test)]
mod tests {
    use uffd::{Mapping, MappingKind};

    use super::{order, touch};

    #[test]
    fn an_order_has_each_page_once_and_follows_from_its_seed() {
        let shuffled = order(1000, 7);
        let mut sorted = shuffled.clone();
        sorted.sort_unstable();

        assert_eq!(order(1000, 0), sorted);
        assert_ne!(shuffled, sorted);
        assert_eq!(shuffled, order(1000, 7));
        assert_ne!(shuffled, order(1000, 8));
    }

    #[test]
    #[allow(clippy::unwrap_used, reason = "a test says so by panicking")]
    fn what_was_read_comes_to_the_same_in_any_order_and_to_another_with_other_bytes() {
        let mapping = Mapping::new(16 * 4096, MappingKind::Private).unwrap();
        for page in 0..16_u8 {
            mapping.write(usize::from(page) * 4096, &[page + 1]).unwrap();
        }
        let one = touch(&mapping, 0, None).unwrap();

        assert_eq!(one.latencies.len(), 16);
        assert!(one.nanoseconds >= one.latencies.iter().map(|&each| u64::from(each)).sum());
        assert_eq!(one.sum, touch(&mapping, 3, None).unwrap().sum);
        mapping.write(5 * 4096, &[0xff]).unwrap();
        assert_ne!(one.sum, touch(&mapping, 3, None).unwrap().sum);
    }

    #[test]
    fn a_cpu_that_does_not_exist_is_an_error() {
        let mapping = Mapping::new(4096, MappingKind::Private);
        assert!(mapping.is_ok_and(|mapping| touch(&mapping, 0, Some(1023)).is_err()));
    }
}
