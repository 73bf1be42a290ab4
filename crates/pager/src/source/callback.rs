//! A source whose bytes are brought by somebody who is asked: chunks, each asked for once while it is on the way, so many at a
//! time, those that a thread waits for first; and a bounded memory of what came.
//!
//! Reads of sessions are cut into chunks and put together again here; whoever answers knows only chunks.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunk_cache::ChunkCache;
use super::fetch::Fetch;
use super::{PageSource, ReadNow};
use crate::error::PagerError;

/// Whoever is asked. Called on the event loop or on a thread that has just answered: it only passes the request on.
pub trait Fetcher: Send + Sync {
    /// Asks for `len` bytes from `offset`. The answer goes to [`CallbackSource::answer`] with the same `id`.
    fn request(&self, id: u64, offset: u64, len: usize);

    /// Nobody wants the bytes of this request any more; an answer is passed over. Called as `request` is. Default: nothing.
    fn cancel(&self, id: u64) {
        let _ = id;
    }
}

/// How a [`CallbackSource`] asks.
#[derive(Debug, Clone, Copy)]
pub struct CallbackOptions {
    /// Bytes of the image.
    pub size: u64,
    /// Bytes asked for at once; the last chunk may be shorter. A power of two, at least a page.
    pub chunk: usize,
    /// Chunks on the way at one time.
    pub concurrency: usize,
    /// Bytes of chunks kept for later reads.
    pub cache_bytes: usize,
    /// The thread that has to run for an answer to come, by its kernel id: memory it touches itself would wait for ever.
    pub thread: Option<u32>,
}

/// See the module.
pub struct CallbackSource {
    options: CallbackOptions,
    fetcher: Box<dyn Fetcher>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    /// Chunks on the way, by the id of their request.
    asked: HashMap<u64, u64>,
    /// Reads that wait for a chunk, by its number: on the way or queued.
    wanted: HashMap<u64, Vec<u64>>,
    /// Chunks to be asked for: for those who wait, and in the background.
    demand: VecDeque<u64>,
    background: VecDeque<u64>,
    /// Reads that are not complete, by a number of their own.
    reads: HashMap<u64, Reading>,
    cache: ChunkCache,
    closed: bool,
}

struct Reading {
    fetch: Fetch,
    /// Chunks that have not come.
    missing: usize,
}

impl CallbackSource {
    /// A source that asks `fetcher`.
    ///
    /// # Errors
    ///
    /// [`PagerError::Unsupported`] for a size of 0, or a chunk that is no power of two from a page to 1 GiB.
    pub fn new(options: CallbackOptions, fetcher: Box<dyn Fetcher>) -> Result<Self, PagerError> {
        if options.size == 0 {
            return Err(PagerError::Unsupported("a source of 0 bytes has nothing to serve".to_owned()));
        }
        if !options.chunk.is_power_of_two() || !(uffd::page_size()..=1 << 30).contains(&options.chunk) {
            return Err(PagerError::Unsupported(format!(
                "chunks of {} bytes: a power of two from {} to 1 GiB is needed",
                options.chunk,
                uffd::page_size()
            )));
        }
        let cache = ChunkCache::new(options.cache_bytes / options.chunk);
        let state = Mutex::new(State { cache, ..State::default() });
        Ok(Self { options, fetcher, state })
    }

    /// Takes the answer to a request: exactly the bytes asked for, or why they cannot be had. One that is not expected (any
    /// more) is passed over.
    pub fn answer(&self, id: u64, bytes: Result<&[u8], PagerError>) {
        let (done, more) = {
            let mut state = self.lock();
            let Some(chunk) = state.asked.remove(&id) else { return };
            let expected = self.chunk_len(chunk);
            let bytes = bytes.and_then(|bytes| match bytes.len() {
                len if len == expected => Ok(bytes),
                len => Err(PagerError::Callback(format!(
                    "the source answered with {len} bytes where {expected} were asked for (offset {})",
                    self.start_of(chunk)
                ))),
            });
            let done = self.settle(&mut state, chunk, &bytes);
            if let Ok(bytes) = bytes {
                state.cache.insert(chunk, || Arc::new(bytes.to_vec()));
            }
            (done, self.next_requests(&mut state))
        };
        // Outside the lock: both go to other threads.
        for (fetch, result) in done {
            fetch.complete(result);
        }
        self.ask(&more);
    }

    /// Nobody answers any more: what is on the way fails, and whatever is asked from now on.
    pub fn close(&self) {
        let reads: Vec<Reading> = {
            let mut state = self.lock();
            state.closed = true;
            state.asked.clear();
            state.wanted.clear();
            state.demand.clear();
            state.background.clear();
            state.reads.drain().map(|(_, reading)| reading).collect()
        };
        for Reading { fetch, .. } in reads {
            fetch.complete(Err(ended()));
        }
    }

    /// Only whole steps are taken under this lock; nobody is called.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_of(&self, chunk: u64) -> u64 {
        chunk * self.options.chunk as u64
    }

    fn chunk_len(&self, chunk: u64) -> usize {
        (self.options.size - self.start_of(chunk)).min(self.options.chunk as u64) as usize
    }

    fn chunks_of(&self, offset: u64, len: usize) -> std::ops::RangeInclusive<u64> {
        let size = self.options.chunk as u64;
        offset / size..=(offset + (len as u64).max(1) - 1) / size
    }

    /// Gives a chunk to the reads that wait for it; those that are complete now, or have failed, come back.
    fn settle(
        &self,
        state: &mut State,
        chunk: u64,
        bytes: &Result<&[u8], PagerError>,
    ) -> Vec<(Fetch, Result<(), PagerError>)> {
        let mut done = Vec::new();
        for number in state.wanted.remove(&chunk).unwrap_or_default() {
            let Some(reading) = state.reads.get_mut(&number) else { continue };
            let result = match bytes {
                Ok(bytes) => {
                    copy_overlap(&mut reading.fetch, self.start_of(chunk), bytes);
                    reading.missing -= 1;
                    if reading.missing > 0 {
                        continue;
                    }
                    Ok(())
                }
                Err(error) => Err(error.clone()),
            };
            if let Some(Reading { fetch, .. }) = state.reads.remove(&number) {
                done.push((fetch, result));
            }
        }
        done
    }

    /// Takes as many chunks out of the queues as may be on the way; those nobody waits for any more are passed over.
    fn next_requests(&self, state: &mut State) -> Vec<(u64, u64)> {
        let mut requests = Vec::new();
        while state.asked.len() < self.options.concurrency {
            let Some(chunk) = state.demand.pop_front().or_else(|| state.background.pop_front()) else {
                break;
            };
            let waited_for = state
                .wanted
                .get(&chunk)
                .is_some_and(|reads| reads.iter().any(|read| state.reads.contains_key(read)));
            if !waited_for {
                state.wanted.remove(&chunk);
                continue;
            }
            // Asked for already, when it was queued in the background and then wanted by somebody who waits.
            if state.asked.values().any(|&asked| asked == chunk) {
                continue;
            }
            state.next_id += 1;
            state.asked.insert(state.next_id, chunk);
            requests.push((state.next_id, chunk));
        }
        requests
    }

    fn ask(&self, requests: &[(u64, u64)]) {
        for &(id, chunk) in requests {
            self.fetcher.request(id, self.start_of(chunk), self.chunk_len(chunk));
        }
    }
}

impl PageSource for CallbackSource {
    fn size(&self) -> u64 {
        self.options.size
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        let mut state = self.lock();
        for chunk in self.chunks_of(offset, buffer.len()) {
            let Some(bytes) = state.cache.get(chunk) else { return Ok(ReadNow::WouldBlock) };
            overlap(buffer, offset, self.start_of(chunk), bytes);
        }
        Ok(ReadNow::Done)
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), PagerError> {
        // Never reached: `fetch` takes everything.
        Err(PagerError::Internal("a source that has to be asked was read".to_owned()))
    }

    fn fetch(&self, mut fetch: Fetch) -> Result<(), Fetch> {
        let requests = {
            let mut state = self.lock();
            if state.closed {
                drop(state);
                fetch.complete(Err(ended()));
                return Ok(());
            }
            state.next_id += 1;
            let number = state.next_id;
            let (offset, demand) = (fetch.offset(), fetch.is_demand());
            let mut missing = 0;
            for chunk in self.chunks_of(offset, fetch.len()) {
                if let Some(bytes) = state.cache.get(chunk) {
                    overlap(fetch.buffer(), offset, self.start_of(chunk), bytes);
                    continue;
                }
                missing += 1;
                state.wanted.entry(chunk).or_default().push(number);
                if state.asked.values().any(|&asked| asked == chunk) {
                    continue;
                }
                if demand {
                    state.demand.push_back(chunk);
                } else {
                    state.background.push_back(chunk);
                }
            }
            if missing == 0 {
                drop(state);
                fetch.complete(Ok(()));
                return Ok(());
            }
            state.reads.insert(number, Reading { fetch, missing });
            self.next_requests(&mut state)
        };
        self.ask(&requests);
        Ok(())
    }

    fn given_up(&self) {
        let (reads, ids, more) = {
            let mut state = self.lock();
            let state = &mut *state;
            let reads: Vec<Reading> = state
                .reads
                .extract_if(|_, reading| !reading.fetch.is_wanted())
                .map(|(_, reading)| reading)
                .collect();
            if reads.is_empty() {
                return;
            }
            let (wanted, reads_left) = (&mut state.wanted, &state.reads);
            wanted.retain(|_, waiting| {
                waiting.retain(|read| reads_left.contains_key(read));
                !waiting.is_empty()
            });
            let ids: Vec<u64> =
                state.asked.extract_if(|_, chunk| !wanted.contains_key(chunk)).map(|(id, _)| id).collect();
            (reads, ids, self.next_requests(state))
        };
        // Outside the lock: all of it goes to other threads.
        drop(reads);
        for id in ids {
            self.fetcher.cancel(id);
        }
        self.ask(&more);
    }

    fn answered_by(&self) -> Option<u32> {
        self.options.thread
    }
}

impl std::fmt::Debug for CallbackSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallbackSource").field("options", &self.options).finish_non_exhaustive()
    }
}

fn ended() -> PagerError {
    PagerError::Callback("whoever answered for the source has ended".to_owned())
}

fn copy_overlap(fetch: &mut Fetch, start: u64, bytes: &[u8]) {
    let offset = fetch.offset();
    overlap(fetch.buffer(), offset, start, bytes);
}

/// Copies what a chunk that starts at `start` has of a buffer that starts at `offset`.
fn overlap(buffer: &mut [u8], offset: u64, start: u64, bytes: &[u8]) {
    let from = offset.max(start);
    let to = (offset + buffer.len() as u64).min(start + bytes.len() as u64);
    if from >= to {
        return;
    }
    let source = bytes.get((from - start) as usize..(to - start) as usize);
    let target = buffer.get_mut((from - offset) as usize..(to - offset) as usize);
    if let (Some(source), Some(target)) = (source, target) {
        target.copy_from_slice(source);
    }
}
