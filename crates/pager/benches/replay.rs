//! A working set at random, touched by one thread, page after page: on demand, or replayed from a recording of the same run.
//! Prints the milliseconds of touching, those until everything was there that was to be first, and how many faults there were.
//!
//! `replay HOW MEBIBYTES PERCENT [IMAGE]`: how is `page` (by page), `windows` (of 64 KiB), `replay` (while it is touched) or
//! `before` (first). From a file that is dropped from the page cache, or, without one, from a source that takes half a
//! millisecond for each request.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a program for measuring")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pager::{
    FileSource, Notice, Observer, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, Replay, Rest,
    SessionOptions, Trace, TraceEnd, TraceFault, TraceHeader, TraceKind, WorkingSet,
};
use uffd::{CreateOptions, Factory, Mapping, MappingKind, Modes};

const PAGE: usize = 4096;
/// What a request takes.
const LATENCY: Duration = Duration::from_micros(500);

/// Bytes that are far away: their own page number, in each.
#[derive(Debug)]
struct Far(u64);

impl PageSource for Far {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        thread::sleep(LATENCY);
        for (nth, page) in buffer.chunks_mut(PAGE).enumerate() {
            page.fill(byte_of(offset as usize / PAGE + nth));
        }
        Ok(())
    }
}

/// What page a byte is of; never zero, which would not be copied.
fn byte_of(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

struct Told(Mutex<std::sync::mpsc::Sender<Notice>>);

impl Observer for Told {
    fn notice(&self, notice: Notice) {
        let _ = self.0.lock().unwrap().send(notice);
    }
}

/// All pages, in an order that is no order, always the same.
fn shuffled(pages: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..pages).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, state as usize % (last + 1));
    }
    order
}

fn recording(source: &Arc<dyn PageSource>, pages: &[usize]) -> Trace {
    let fault = |(nth, &page): (usize, &usize)| TraceFault {
        time_ns: nth as u64 * 10_000,
        kind: TraceKind::Missing,
        write: false,
        page: page as u64,
        before: 0,
        pages: 1,
        latency_ns: 10_000,
    };
    Trace {
        header: TraceHeader::of(source, PAGE as u32).unwrap(),
        faults: pages.iter().enumerate().map(fault).collect(),
        end: TraceEnd::Complete,
        dropped: 0,
    }
}

/// Takes a file out of the page cache.
fn drop_from_cache(path: &str) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: an open descriptor; the call changes nothing but what is cached.
    let failed = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(failed, 0);
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let [how, mebibytes, percent, image @ ..] = words.as_slice() else {
        panic!("replay HOW MEBIBYTES PERCENT [IMAGE]")
    };
    let pages = mebibytes.parse::<usize>().unwrap() << 8;
    let mut wanted = shuffled(pages);
    wanted.truncate(pages * percent.parse::<usize>().unwrap() / 100);
    let (source, expected): (Arc<dyn PageSource>, Vec<u8>) = match image.first() {
        None => (Arc::new(Far((pages * PAGE) as u64)), (0..pages).map(byte_of).collect()),
        Some(path) => {
            let bytes = std::fs::read(path).unwrap();
            let firsts = bytes.iter().step_by(PAGE).copied().take(pages).collect();
            (Arc::new(FileSource::open(Path::new(path)).unwrap()), firsts)
        }
    };
    let replays = matches!(how.as_str(), "replay" | "before");
    let trace = recording(&source, &wanted);

    let mapping = Arc::new(Mapping::new(pages * PAGE, MappingKind::Private).unwrap());
    warm(&mapping);
    let uffd = Factory::open().create(&CreateOptions::default()).unwrap();
    let (address, len) = (mapping.address(), mapping.len() as u64);
    // SAFETY: no reference to the mapping exists.
    unsafe { uffd.register(address, len, Modes::MISSING) }.unwrap();
    if let Some(path) = image.first() {
        drop_from_cache(path);
    }
    let began = Instant::now();
    let replay = replays.then(|| {
        trace.check(&source).unwrap();
        Arc::new(Replay::new(&trace, false))
    });
    let options = SessionOptions {
        window: match how.as_str() {
            "page" => Some(PAGE as u64),
            "windows" => Some(64 << 10),
            _ => None,
        },
        source_timeout: Duration::from_secs(10),
        working_set: WorkingSet { record: None, replay },
        ..SessionOptions::new(vec![Region { address, len, source_offset: 0 }], PAGE as u64, source)
    };
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (sender, notices) = channel();
    let id = pager.adopt(uffd, options, Arc::new(Told(Mutex::new(sender)))).unwrap();
    let Notice::SessionStarted(info) = notices.recv().unwrap() else { panic!("not started") };
    if how == "before" {
        let (sender, answer) = channel();
        pager.await_replay(id, Box::new(move |outcome| drop(sender.send(outcome))));
        answer.recv().unwrap().unwrap();
    }
    let ready = began.elapsed();
    let toucher = Arc::clone(&mapping);
    let touched = thread::spawn(move || {
        let began = Instant::now();
        for page in wanted {
            let place = (toucher.address() as *const u8).wrapping_add(page * PAGE);
            // SAFETY: inside of the mapping, which lives as long as this thread; nobody writes to it.
            let byte = unsafe { place.read_volatile() };
            assert_eq!(byte, expected[page], "page {page}");
        }
        began.elapsed()
    });
    let touch = touched.join().unwrap();
    let stats = info.stats.snapshot();
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    println!(
        "{{\"touch\":{:.3},\"ready\":{:.3},\"total\":{:.3},\"faults\":{},\"late\":{},\"missed\":{},\"reads\":{}}}",
        ms(touch),
        ms(ready),
        ms(touch + ready),
        stats.faults,
        stats.replay_late,
        stats.replay_missed,
        stats.worker_reads
    );
    pager.close_session(id, Rest::Zero);
    while !matches!(notices.recv().unwrap(), Notice::SessionEnded { .. }) {}
}

/// Touches and frees as much memory, so that the host has it.
fn warm(mapping: &Mapping) {
    let mut bytes = vec![0_u8; mapping.len()];
    for page in bytes.chunks_mut(PAGE) {
        page[0] = 1;
    }
    std::hint::black_box(&bytes);
}
