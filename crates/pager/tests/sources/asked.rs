//! Sources that have to be asked, and answer on a thread of their own, behind those that hold another source.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use pager::{
    CacheOptions, CachedSource, Fetch, LayeredSource, Overlay, OverlaySource, PageSource, PagerError,
    ReadNow, RetryOptions, RetrySource,
};

use super::failing::assert_poisoned;
use super::kinds::{assert_serves, diff, dir};
use crate::support::{PAGE, image};

const PAGES: usize = 128;

/// Answers on its own thread, and cannot be read in any other way. From `good` bytes on it drops what it is asked.
#[derive(Debug)]
struct Asked {
    size: u64,
    questions: Mutex<Option<Sender<Fetch>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Asked {
    fn source(bytes: Vec<u8>, good: usize) -> Arc<dyn PageSource> {
        let (questions, asked) = channel::<Fetch>();
        let size = bytes.len() as u64;
        let thread = std::thread::spawn(move || {
            for mut fetch in asked {
                let start = fetch.offset() as usize;
                let end = start + fetch.len();
                if end <= good {
                    fetch.buffer().copy_from_slice(&bytes[start..end]);
                    fetch.complete(Ok(()));
                }
            }
        });
        Arc::new(Self { size, questions: Mutex::new(Some(questions)), thread: Mutex::new(Some(thread)) })
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        drop(self.questions.lock().unwrap().take());
        // It holds nothing of this test's that could go wrong.
        let _ = self.thread.lock().unwrap().take().unwrap().join();
    }
}

impl PageSource for Asked {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), PagerError> {
        Err(PagerError::Internal("it has to be asked".to_owned()))
    }
    fn fetch(&self, fetch: Fetch) -> Result<(), Fetch> {
        self.questions.lock().unwrap().as_ref().unwrap().send(fetch).unwrap();
        Ok(())
    }
    fn answered_by(&self) -> Option<u32> {
        Some(4711)
    }
}

fn small_cache() -> CacheOptions {
    CacheOptions { chunk: 8 * PAGE as u64, cache_bytes: 32 * PAGE as u64 }
}

fn retried(inner: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
    Arc::new(RetrySource::new(inner, RetryOptions::default()).unwrap())
}

#[test]
fn a_source_that_has_to_be_asked_serves_through_every_source_that_holds_another() {
    let dir = dir();
    let mut bytes = image(PAGES);
    let asked = || Asked::source(image(PAGES), usize::MAX);
    let cached: Arc<dyn PageSource> = Arc::new(CachedSource::new(asked(), small_cache()).unwrap());
    for source in [&retried(asked()), &cached] {
        assert_serves(source, &bytes);
        assert_eq!(source.answered_by(), Some(4711));
    }

    let path = diff(&dir.path().join("diff"), bytes.len(), &[(3, 3), (64, 4)]);
    for (page, byte) in [(3, 3), (64, 4)] {
        bytes[page * PAGE..(page + 1) * PAGE].fill(byte);
    }
    let layered: Arc<dyn PageSource> = Arc::new(LayeredSource::new(asked(), &[path]).unwrap());
    let mut holes = [0; PAGE];
    if Arc::new(CachedSource::new(Arc::clone(&layered), small_cache()).unwrap()).read(0, &mut holes).is_ok()
        && holes == [0; PAGE]
    {
        return println!("skipped: this file system does not tell where a file has holes");
    }
    assert_serves(&layered, &bytes);

    let identity = Overlay { offset: 5000, bytes: vec![9; 9000] };
    bytes[5000..14000].fill(9);
    let overlaid: Arc<dyn PageSource> = Arc::new(OverlaySource::new(layered, vec![identity]).unwrap());
    assert_serves(&overlaid, &bytes);
    let all: Arc<dyn PageSource> = Arc::new(CachedSource::new(retried(overlaid), small_cache()).unwrap());
    assert_serves(&all, &bytes);
    assert_eq!(all.answered_by(), Some(4711));
}

#[test]
fn a_question_that_is_dropped_ends_the_session_whatever_holds_the_source() {
    let good = 16 * PAGE;
    let asked = || Asked::source(image(64), good);
    let cached: Arc<dyn PageSource> = Arc::new(CachedSource::new(asked(), small_cache()).unwrap());
    let layered: Arc<dyn PageSource> = Arc::new(LayeredSource::new(asked(), &[]).unwrap());
    for source in [retried(asked()), cached, layered] {
        let Some(served) = super::failing::served(source) else { return };
        let error = assert_poisoned(&served, 40);
        assert!(matches!(error, Some(PagerError::Internal(_))), "{error:?}");
    }
}
