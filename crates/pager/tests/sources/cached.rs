//! The cache before a slow source, with real threads and sessions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use pager::{CacheOptions, CachedSource, PageSource, PagerError, ReadNow};
use uffd::{Mapping, MappingKind};

use super::failing::{Flaky, Late, assert_poisoned};
use super::kinds::shuffled;
use crate::support::{Bytes, DEADLINE, PAGE, elsewhere, finish, image, read, serve};

const PAGES: usize = 512;
const CHUNK: usize = 16 * PAGE;

/// Counts how often it is read; never at hand.
#[derive(Debug)]
struct Counting {
    good: Bytes,
    reads: AtomicU64,
}

impl PageSource for Counting {
    fn size(&self) -> u64 {
        self.good.size()
    }
    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.good.read(offset, buffer)
    }
}

fn counting(bytes: &[u8]) -> Arc<Counting> {
    Arc::new(Counting { good: Bytes(bytes.to_vec()), reads: AtomicU64::new(0) })
}

fn options(chunks: usize) -> CacheOptions {
    CacheOptions { chunk: CHUNK as u64, cache_bytes: (chunks * CHUNK) as u64 }
}

fn cached(inner: &Arc<Counting>, chunks: usize) -> Arc<CachedSource> {
    Arc::new(CachedSource::new(Arc::<Counting>::clone(inner), options(chunks)).unwrap())
}

fn is_kept(source: &CachedSource, chunk: usize) -> bool {
    source.read_now((chunk * CHUNK) as u64, &mut [0]).unwrap() == ReadNow::Done
}

fn fetch(source: &CachedSource, chunk: usize) {
    source.read((chunk * CHUNK) as u64, &mut [0]).unwrap();
}

#[test]
fn sessions_that_share_a_cache_fetch_every_chunk_once_between_them() {
    let bytes = image(PAGES);
    let inner = counting(&bytes);
    let source = cached(&inner, PAGES * PAGE / CHUNK);
    let sessions: Vec<_> = (0..4)
        .map_while(|_| {
            let mapping = Mapping::new(bytes.len(), MappingKind::Private).unwrap();
            serve(mapping, Arc::<CachedSource>::clone(&source), |_| {})
        })
        .collect();
    if sessions.is_empty() {
        return;
    }
    // All of them at once, each in an order of its own.
    let start = Arc::new(Barrier::new(sessions.len()));
    let readers: Vec<_> = sessions
        .iter()
        .zip(1..)
        .map(|(served, seed)| {
            let (mapping, bytes, start) = (Arc::clone(&served.mapping), bytes.clone(), Arc::clone(&start));
            elsewhere(move || {
                start.wait();
                let mut page_bytes = [0; PAGE];
                shuffled(PAGES, seed).into_iter().all(|page| {
                    mapping.read_checked(page * PAGE, &mut page_bytes).unwrap();
                    page_bytes == bytes[page * PAGE..(page + 1) * PAGE]
                })
            })
        })
        .collect();

    assert!(readers.iter().all(finish));

    assert_eq!(inner.reads.load(Ordering::SeqCst), (PAGES * PAGE / CHUNK) as u64);
    for served in &sessions {
        served.close();
    }
}

#[test]
fn a_chunk_in_flight_is_not_fetched_again_by_those_who_come_meanwhile() {
    let bytes = image(PAGES);
    let (late, asked, open) = Late::new(bytes.clone());
    let source = Arc::new(CachedSource::new(late, options(4)).unwrap());
    let reader = |offset: usize| {
        let source = Arc::clone(&source);
        elsewhere(move || {
            let mut buffer = [0; PAGE];
            source.read(offset as u64, &mut buffer).map(|()| buffer)
        })
    };
    let first = reader(0);
    assert_eq!(asked.recv_timeout(DEADLINE).unwrap(), 0);
    let others: Vec<_> = (1..8).map(|page| reader(page * PAGE)).collect();
    assert_eq!(source.read_now(0, &mut [0]).unwrap(), ReadNow::WouldBlock);
    open.send(()).unwrap();

    assert!(finish(&first).unwrap() == bytes[..PAGE]);
    for (page, other) in (1..8).zip(others) {
        assert!(finish(&other).unwrap() == bytes[page * PAGE..(page + 1) * PAGE]);
    }
    assert!(asked.try_recv().is_err(), "fetched again");
}

#[test]
fn no_more_is_kept_than_allowed_and_what_is_read_again_outlives_a_scan() {
    let inner = counting(&image(PAGES));
    let source = cached(&inner, 4);
    for chunk in 0..4 {
        fetch(&source, chunk);
    }
    assert!((0..4).all(|chunk| is_kept(&source, chunk)));
    // Everything was read once more: one round of the hand, and then the oldest goes.
    fetch(&source, 10);
    assert!(is_kept(&source, 10));

    for chunk in 11..30 {
        fetch(&source, chunk);
        fetch(&source, 10);
    }

    assert!(is_kept(&source, 10));
    assert_eq!((0..PAGES * PAGE / CHUNK).filter(|&chunk| is_kept(&source, chunk)).count(), 4);
    assert_eq!(inner.reads.load(Ordering::SeqCst), 4 + 1 + 19);
}

#[test]
fn a_cache_smaller_than_the_image_still_serves_all_of_it_and_errors_are_not_kept() {
    let bytes = image(PAGES);
    for inner in [counting(&bytes) as Arc<dyn PageSource>, Arc::new(Flaky::new(bytes.clone()))] {
        let source = Arc::new(CachedSource::new(inner, options(2)).unwrap());
        let (mut failures, mut whole) = (0, vec![0; bytes.len()]);
        for (chunk, part) in whole.chunks_mut(CHUNK + 5).enumerate() {
            let offset = (chunk * (CHUNK + 5)) as u64;
            while let Err(error) = source.read(offset, part) {
                assert!(error.is_transient(), "{error}");
                failures += 1;
                assert!(failures < 200);
            }
        }
        assert!(whole == bytes);
    }
    let inner = counting(&bytes);
    let mapping = Mapping::new(bytes.len(), MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, cached(&inner, 2), |_| {}) else { return };
    for page in shuffled(PAGES, 4) {
        assert!(read(&served.mapping, page * PAGE, PAGE) == bytes[page * PAGE..(page + 1) * PAGE]);
    }
    served.close();
}

/// Panics whenever it is read.
#[derive(Debug)]
struct Panicking;

impl PageSource for Panicking {
    fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }
    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), PagerError> {
        panic!("a source that panics")
    }
}

#[test]
fn a_fetch_that_panics_ends_every_session_that_waits_for_it() {
    let source: Arc<dyn PageSource> = Arc::new(CachedSource::new(Arc::new(Panicking), options(2)).unwrap());
    for _ in 0..2 {
        let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
        let Some(served) = serve(mapping, Arc::clone(&source), |_| {}) else { return };
        assert!(matches!(assert_poisoned(&served, 3), Some(PagerError::Internal(_))));
    }
}

#[test]
fn chunks_and_caches_that_cannot_be_are_refused() {
    let inner: Arc<dyn PageSource> = counting(&image(1));
    for (chunk, cache_bytes, bad) in [
        (0, 1 << 20, "chunk"),
        (2048, 1 << 20, "chunk"),
        (4097, 1 << 20, "chunk"),
        (128 << 20, 1 << 30, "chunk"),
        (8192, 8191, "cacheBytes"),
        (8192, 0, "cacheBytes"),
    ] {
        let error = CachedSource::new(Arc::clone(&inner), CacheOptions { chunk, cache_bytes }).unwrap_err();
        assert!(
            matches!(error, PagerError::SourceOption { option, .. } if option == bad),
            "{chunk}: {error}"
        );
    }
    CachedSource::new(inner, CacheOptions::default()).unwrap();
}
