//! A slow source, read in chunks that are fetched once and kept as long as there is room.
//!
//! Readers of a chunk that is being fetched wait for that fetch, whichever session they belong to. No lock is held during
//! a fetch, nor while bytes are copied. The event loop only looks: what it cannot have at once a worker reads.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};

#[cfg(not(test))]
use std::sync::{Condvar, Mutex, MutexGuard};

// The tests below try the schedules of its threads one by one.
#[cfg(test)]
use shuttle::sync::{Condvar, Mutex, MutexGuard};

use super::chunk_cache::{Chunk, ChunkCache};
use super::{PageSource, ReadNow, panicked, waiting};
use crate::error::PagerError;

/// The largest chunk.
const MOST_CHUNK: u64 = 64 << 20;

/// How much is fetched at once, and how much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes fetched at once: a power of two, from a page to 64 MiB. Default: 1 MiB.
    pub chunk: u64,
    /// Bytes kept, at least one chunk. Chunks being fetched (one for each worker at most) come on top of it. Default: 256 MiB.
    pub cache_bytes: u64,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { chunk: 1 << 20, cache_bytes: 256 << 20 }
    }
}

/// Keeps what it has read of another source; replaces by CLOCK. Errors are not kept: the next reader tries again.
#[derive(Debug)]
pub struct CachedSource {
    inner: Arc<dyn PageSource>,
    chunk: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    kept: ChunkCache,
    fetching: HashMap<u64, Arc<Fetch>>,
}

/// A fetch that is under way, for those who wait for it.
struct Fetch {
    outcome: Mutex<Option<Result<Chunk, PagerError>>>,
    done: Condvar,
}

impl CachedSource {
    /// `inner`, with a cache in front of it.
    ///
    /// # Errors
    ///
    /// [`PagerError::SourceOption`] for a chunk that is no power of two or out of bounds, and for a cache smaller than one.
    pub fn new(inner: Arc<dyn PageSource>, options: CacheOptions) -> Result<Self, PagerError> {
        let CacheOptions { chunk, cache_bytes } = options;
        let refused = |option, value, reason| Err(PagerError::SourceOption { option, value, reason });
        if !chunk.is_power_of_two() || chunk < uffd::page_size() as u64 || chunk > MOST_CHUNK {
            return refused("chunk", chunk, "give a power of two, from a page to 64 MiB");
        }
        if cache_bytes < chunk {
            return refused("cacheBytes", cache_bytes, "give at least the bytes of one chunk");
        }
        let most_chunks = usize::try_from(cache_bytes / chunk).unwrap_or(usize::MAX);
        let state = State { kept: ChunkCache::new(most_chunks), ..State::default() };
        Ok(Self { inner, chunk, state: Mutex::new(state) })
    }

    /// A chunk from wherever it can be had. Waits.
    fn get(&self, number: u64) -> Result<Chunk, PagerError> {
        let mut state = lock(&self.state);
        if let Some(bytes) = state.kept.get(number).cloned() {
            return Ok(bytes);
        }
        if let Some(fetch) = state.fetching.get(&number) {
            let fetch = Arc::clone(fetch);
            drop(state);
            return fetch.wait();
        }
        let fetch = Arc::new(Fetch { outcome: Mutex::new(None), done: Condvar::new() });
        state.fetching.insert(number, Arc::clone(&fetch));
        drop(state);

        // Those who wait are told, whatever comes of it.
        let outcome =
            catch_unwind(AssertUnwindSafe(|| self.fetch(number))).unwrap_or_else(|_| Err(panicked()));

        let mut state = lock(&self.state);
        state.fetching.remove(&number);
        let replaced = match &outcome {
            Ok(bytes) => state.kept.insert(number, || Arc::clone(bytes)),
            Err(_) => None,
        };
        drop(state);
        // Giving back so much memory takes its time.
        drop(replaced);
        fetch.finish(outcome.clone());
        outcome
    }

    fn fetch(&self, number: u64) -> Result<Chunk, PagerError> {
        let offset = number * self.chunk;
        let len = self.chunk.min(self.inner.size().saturating_sub(offset));
        let mut bytes = vec![0; len as usize];
        waiting::read(&self.inner, offset, &mut bytes)?;
        Ok(Arc::new(bytes))
    }

    /// Copies out of the chunks that `get` gives; stops where it gives none.
    fn copy(
        &self,
        offset: u64,
        buffer: &mut [u8],
        get: impl Fn(u64) -> Result<Option<Chunk>, PagerError>,
    ) -> Result<ReadNow, PagerError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let Some(chunk) = get(at / self.chunk)? else { return Ok(ReadNow::WouldBlock) };
            let bytes = chunk.get((at % self.chunk) as usize..).unwrap_or_default();
            let count = bytes.len().min(rest.len());
            match (rest.get_mut(..count), bytes.get(..count)) {
                (Some(to), Some(bytes @ [_, ..])) => to.copy_from_slice(bytes),
                _ => {
                    let expected = offset.saturating_add(buffer.len() as u64);
                    let (path, actual) = ("(cache)".into(), self.inner.size());
                    return Err(PagerError::SourceTruncated { path, expected, actual });
                }
            }
            done += count;
        }
        Ok(ReadNow::Done)
    }
}

impl PageSource for CachedSource {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        // A worker that holds the lock may have lost its CPU: it is not waited for.
        self.copy(offset, buffer, |number| {
            Ok(self.state.try_lock().ok().and_then(|mut state| state.kept.get(number).cloned()))
        })
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.copy(offset, buffer, |number| self.get(number).map(Some)).map(|_| ())
    }

    fn answered_by(&self) -> Option<u32> {
        self.inner.answered_by()
    }

    fn put_right(&self) {
        self.inner.put_right();
    }

    fn zeros(&self, offset: u64, len: u64) -> bool {
        self.inner.zeros(offset, len)
    }
}

impl Fetch {
    fn wait(&self) -> Result<Chunk, PagerError> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self.done.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, outcome: Result<Chunk, PagerError>) {
        *lock(&self.outcome) = Some(outcome);
        self.done.notify_all();
    }
}

/// Only whole values are put in under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Without the bytes themselves.
impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("kept", &self.kept.slots.len())
            .field("fetching", &self.fetching.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use shuttle::thread;

    use super::*;

    const CHUNK: u64 = 4096;
    const CHUNKS: usize = 3;
    /// Schedules tried of each case.
    const SCHEDULES: usize = 3000;

    /// Every byte tells its chunk. Notices when one chunk is fetched twice at a time; the first fetches go wrong.
    #[derive(Debug)]
    struct Slow {
        busy: [AtomicBool; CHUNKS],
        fetches: AtomicUsize,
        wrong: AtomicUsize,
        panics: bool,
    }

    impl Slow {
        fn new(wrong: usize, panics: bool) -> Arc<Self> {
            let (fetches, wrong) = (AtomicUsize::new(0), AtomicUsize::new(wrong));
            Arc::new(Self { busy: Default::default(), fetches, wrong, panics })
        }
    }

    impl PageSource for Slow {
        fn size(&self) -> u64 {
            CHUNKS as u64 * CHUNK - 96
        }
        fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
            Ok(ReadNow::WouldBlock)
        }
        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
            let number = (offset / CHUNK) as usize;
            assert!(!self.busy[number].swap(true, Ordering::SeqCst), "fetched twice at a time");
            self.fetches.fetch_add(1, Ordering::SeqCst);
            thread::yield_now();
            buffer.fill(number as u8 + 1);
            self.busy[number].store(false, Ordering::SeqCst);
            if self.wrong.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
            {
                assert!(!self.panics, "a source that panics");
                return Err(PagerError::Source { path: "slow".into(), syscall: "pread", errno: Errno::EIO });
            }
            Ok(())
        }
    }

    fn cached(slow: &Arc<Slow>, chunks: u64) -> Arc<CachedSource> {
        let options = CacheOptions { chunk: CHUNK, cache_bytes: chunks * CHUNK };
        Arc::new(CachedSource::new(Arc::<Slow>::clone(slow), options).unwrap())
    }

    fn assert_good(buffer: &[u8], offset: u64) {
        let expected = (offset..).map(|at| (at / CHUNK) as u8 + 1);
        assert!(buffer.iter().copied().zip(expected).all(|(byte, expected)| byte == expected), "at {offset}");
    }

    /// Lets three threads read from these offsets, 200 bytes each.
    fn read_by_three(source: &Arc<CachedSource>, offsets: [u64; 3]) -> Vec<Result<(), PagerError>> {
        let readers = offsets.map(|offset| {
            let source = Arc::clone(source);
            thread::spawn(move || {
                let mut buffer = [0; 200];
                let result = source.read(offset, &mut buffer);
                if result.is_ok() {
                    assert_good(&buffer, offset);
                }
                if source.read_now(offset, &mut buffer).unwrap() == ReadNow::Done {
                    assert_good(&buffer, offset);
                }
                result
            })
        });
        readers.map(|reader| reader.join().unwrap()).into()
    }

    #[test]
    fn a_chunk_that_several_read_at_once_is_fetched_once() {
        shuttle::check_random(
            || {
                let slow = Slow::new(0, false);
                let source = cached(&slow, 3);

                let results = read_by_three(&source, [10, 700, 10]);

                assert!(results.iter().all(Result::is_ok));
                assert_eq!(slow.fetches.load(Ordering::SeqCst), 1);
            },
            SCHEDULES,
        );
    }

    #[test]
    fn readers_across_chunks_and_replacement_get_the_right_bytes() {
        shuttle::check_random(
            || {
                let slow = Slow::new(0, false);
                let source = cached(&slow, 1);

                let results = read_by_three(&source, [CHUNK - 100, 2 * CHUNK - 100, 0]);

                assert!(results.iter().all(Result::is_ok));
                let state = lock(&source.state);
                let kept = &state.kept;
                assert_eq!((kept.slots.len(), kept.by_chunk.len(), state.fetching.len()), (1, 1, 0));
            },
            SCHEDULES,
        );
    }

    #[test]
    fn a_fetch_that_fails_or_panics_wakes_all_who_wait_and_is_not_remembered() {
        for panics in [false, true] {
            shuttle::check_random(
                move || {
                    let slow = Slow::new(1, panics);
                    let source = cached(&slow, 3);

                    let results = read_by_three(&source, [0, 100, 200]);

                    let failed = results.iter().filter(|result| result.is_err()).count();
                    assert!(failed >= 1);
                    let all_waited = failed == 3;
                    assert_eq!(slow.fetches.load(Ordering::SeqCst), if all_waited { 1 } else { 2 });
                    let mut buffer = [0; 200];
                    source.read(0, &mut buffer).unwrap();
                    assert_good(&buffer, 0);
                },
                SCHEDULES,
            );
        }
    }
}
