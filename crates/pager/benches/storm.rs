//! The highest rate of faults that one session answers: threads touch memory page after page, each fault gets its page
//! and nothing else, from memory. Prints nanoseconds per fault, the median of some rounds.
//!
//! `storm THREADS ROUNDS`; which CPUs it may use is the caller's business (taskset(1)).
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a program for measuring")]

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pager::{
    FailurePolicy, MemorySource, Notice, Observer, Pager, PagerOptions, Region, Rest, SessionModes,
    SessionOptions,
};
use uffd::{CreateOptions, Factory, Mapping, MappingKind, Modes};

const PAGE: usize = 4096;
const PAGES: usize = 16_384;

struct Told(Mutex<Sender<Notice>>);

impl Observer for Told {
    fn notice(&self, notice: Notice) {
        let _ = self.0.lock().unwrap().send(notice);
    }
}

/// Nanoseconds per fault of one storm.
fn storm(pager: &Pager, threads: usize, source: &Arc<MemorySource>) -> u128 {
    let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
    let uffd = Factory::open().create(&CreateOptions::default()).unwrap();
    let (address, len) = (mapping.address(), mapping.len() as u64);
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(address, len, Modes::MISSING) }.unwrap();
    let options = SessionOptions {
        regions: vec![Region { address, len, source_offset: 0 }],
        page_size: PAGE as u64,
        source: Arc::<MemorySource>::clone(source),
        policy: FailurePolicy::Poison,
        window: Some(PAGE as u64),
        fill: pager::FillOptions::default(),
        source_timeout: Duration::from_secs(10),
        process: None,
        modes: SessionModes::default(),
    };
    let (sender, notices) = channel();
    let id = pager.adopt(uffd, options, Arc::new(Told(Mutex::new(sender)))).unwrap();
    let Notice::SessionStarted(_) = notices.recv().unwrap() else { panic!("not started") };

    let start = Arc::new(Barrier::new(threads + 1));
    let touchers: Vec<_> = (0..threads)
        .map(|first| {
            let (mapping, start) = (Arc::clone(&mapping), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                for page in (first..PAGES).step_by(threads) {
                    let place = (address as *const u8).wrapping_add(page * PAGE);
                    // SAFETY: inside of the mapping, which lives as long as this thread; others only read it.
                    let byte = unsafe { place.read_volatile() };
                    assert_ne!(byte, 0, "page {page}");
                }
                drop(mapping);
            })
        })
        .collect();
    start.wait();
    let began = Instant::now();
    for toucher in touchers {
        toucher.join().unwrap();
    }
    let took = began.elapsed();
    pager.close_session(id, Rest::Zero);
    while !matches!(notices.recv().unwrap(), Notice::SessionEnded { .. }) {}
    took.as_nanos() / PAGES as u128
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|argument| argument.parse::<usize>().ok());
    let (threads, rounds) = (arguments.next().unwrap_or(4), arguments.next().unwrap_or(5));
    let source = Arc::new(MemorySource::new(vec![1; PAGES * PAGE]));
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    // The first warms the memory up.
    storm(&pager, threads, &source);
    let mut times: Vec<u128> = (0..rounds).map(|_| storm(&pager, threads, &source)).collect();
    times.sort_unstable();
    println!("{}", times.get(times.len() / 2).copied().unwrap_or_default());
}
