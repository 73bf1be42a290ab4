//! The highest rate of faults that sessions of one pager answer: threads touch memory page after page, in one session after
//! the other, each fault gets its page and nothing else, all from one file. Prints nanoseconds per fault, the median of some
//! rounds.
//!
//! `storm THREADS ROUNDS [SESSIONS [IMAGE [HOW]]]`; without a file, or with `-`, from memory. HOW is `own`, `adopted` (the
//! userfaultfd came from elsewhere), `kept` (that, and a successor could take over), or `recorded`. Which CPUs it may use is the
//! caller's business (taskset(1)); of several the first is the threads' that touch, and the last the pager's.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a program for measuring")]

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use pager::{
    FileSource, Keeper, KeptConnection, KeptDescriptors, KeptSession, MemorySource, Notice, Observer,
    PageSource, Pager, PagerError, PagerOptions, RecordTo, Region, Rest, SessionEnd, SessionInfo,
    SessionOptions, WorkingSet,
};
use uffd::{CreateOptions, Factory, Mapping, MappingKind, Modes, Userfaultfd};

const PAGE: usize = 4096;
const PAGES: usize = 16_384;

struct Told(Mutex<Sender<Notice>>);

impl Observer for Told {
    fn notice(&self, notice: Notice) {
        let _ = self.0.lock().unwrap().send(notice);
    }
}

/// Keeps nothing: what it costs to be kept is what is measured.
#[derive(Debug)]
struct Holder;

impl Keeper for Holder {
    fn keep(&self, _: &KeptSession, _: KeptDescriptors<'_>) -> Result<(), PagerError> {
        Ok(())
    }

    fn forget(&self, _: u64, _: &SessionEnd, _: bool) {}

    fn keep_connection(&self, _: &KeptConnection, _: BorrowedFd<'_>) -> Result<(), PagerError> {
        Ok(())
    }

    fn forget_connection(&self, _: u64) {}
}

/// What all sessions are filled from, and the first byte of each of its pages.
struct Image {
    source: Arc<dyn PageSource>,
    first_bytes: Arc<Vec<u8>>,
}

impl Image {
    fn new(path: Option<&str>) -> Self {
        let Some(path) = path.filter(|&path| path != "-") else {
            let source = Arc::new(MemorySource::new(vec![1; PAGES * PAGE]));
            return Self { source, first_bytes: Arc::new(vec![1; PAGES]) };
        };
        let bytes = std::fs::read(path).unwrap();
        let first_bytes = bytes.iter().step_by(PAGE).copied().take(PAGES).collect();
        Self {
            source: Arc::new(FileSource::open(Path::new(path)).unwrap()),
            first_bytes: Arc::new(first_bytes),
        }
    }
}

/// A mapping that is served.
struct Served {
    mapping: Arc<Mapping>,
    info: Arc<SessionInfo>,
    notices: Receiver<Notice>,
}

/// Where faults are recorded: a file that each session writes anew.
fn record() -> PathBuf {
    std::env::temp_dir().join(format!("userfaultfd-storm-{}.trace", std::process::id()))
}

/// The CPUs that this program may use.
fn cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect()
}

/// Keeps this thread on the first of them.
fn stay_on_the_first() {
    let mut set = CpuSet::new();
    set.set(cpus().first().copied().unwrap_or_default()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

fn serve(pager: &Pager, pages: usize, source: &Arc<dyn PageSource>, how: &str) -> Served {
    let mapping = Arc::new(Mapping::new(pages * PAGE, MappingKind::Private).unwrap());
    let mut uffd = Factory::open().create(&CreateOptions::default()).unwrap();
    if how != "own" {
        uffd = Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    }
    let (address, len) = (mapping.address(), mapping.len() as u64);
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(address, len, Modes::MISSING) }.unwrap();
    let options = SessionOptions {
        window: Some(PAGE as u64),
        source_timeout: Duration::from_secs(10),
        working_set: WorkingSet {
            record: (how == "recorded").then(|| RecordTo::new(&record(), source).unwrap()),
            replay: None,
        },
        ..SessionOptions::new(
            vec![Region { address, len, source_offset: 0 }],
            PAGE as u64,
            Arc::clone(source),
        )
    };
    let (sender, notices) = channel();
    pager.adopt(uffd, options, Arc::new(Told(Mutex::new(sender)))).unwrap();
    let Notice::SessionStarted(info) = notices.recv().unwrap() else { panic!("not started") };
    Served { mapping, info, notices }
}

/// Nanoseconds per fault of one storm.
fn storm(pager: &Pager, threads: usize, sessions: usize, image: &Image, how: &str) -> u128 {
    let served: Vec<Served> =
        (0..sessions).map(|_| serve(pager, PAGES / sessions, &image.source, how)).collect();
    let start = Arc::new(Barrier::new(threads + 1));
    let touchers: Vec<_> = (0..threads)
        .map(|first| {
            let mappings: Vec<_> = served.iter().map(|one| Arc::clone(&one.mapping)).collect();
            let (start, first_bytes) = (Arc::clone(&start), Arc::clone(&image.first_bytes));
            thread::spawn(move || {
                stay_on_the_first();
                start.wait();
                for turn in (first..PAGES / sessions * sessions).step_by(threads) {
                    let (page, mapping) = (turn / sessions, &mappings[turn % sessions]);
                    let place = (mapping.address() as *const u8).wrapping_add(page * PAGE);
                    // SAFETY: inside of the mapping, which lives as long as this thread; others only read it.
                    let byte = unsafe { place.read_volatile() };
                    assert_eq!(byte, first_bytes[page], "page {page}");
                }
                drop(mappings);
            })
        })
        .collect();
    start.wait();
    let began = Instant::now();
    for toucher in touchers {
        toucher.join().unwrap();
    }
    let took = began.elapsed();
    for Served { info, notices, .. } in &served {
        pager.close_session(info.id, Rest::Zero);
        while !matches!(notices.recv().unwrap(), Notice::SessionEnded { .. }) {}
        let recorded = info.recording.as_ref().map(|recording| recording.faults());
        assert!(recorded.is_none_or(|faults| faults == (PAGES / sessions) as u64), "{recorded:?}");
    }
    took.as_nanos() / PAGES as u128
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let number = |at: usize, default| words.get(at).map_or(default, |word| word.parse::<usize>().unwrap());
    let (threads, rounds, sessions) = (number(0, 4), number(1, 5), number(2, 1));
    let image = Image::new(words.get(3).map(String::as_str));
    let how = words.get(4).map_or("own", String::as_str);
    let keeper: Arc<dyn Keeper> = Arc::new(Holder);
    let keeper = (how == "kept").then_some(keeper);
    let cpu = cpus().last().copied().filter(|_| cpus().len() > 1);
    let pager = Pager::start(&PagerOptions { keeper, cpu, ..PagerOptions::default() }).unwrap();
    // The first warms the memory up.
    storm(&pager, threads, sessions, &image, how);
    let mut times: Vec<u128> = (0..rounds).map(|_| storm(&pager, threads, sessions, &image, how)).collect();
    times.sort_unstable();
    // Not there where nothing was recorded.
    let _ = std::fs::remove_file(record());
    println!("{}", times.get(times.len() / 2).copied().unwrap_or_default());
}
