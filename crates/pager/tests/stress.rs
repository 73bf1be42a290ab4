//! Memory under stress: many threads touch it at random while others give it back and move it about, two sessions of one
//! pager, whose sources are at hand or not, and which are closed and begun anew meanwhile.
//!
//! `USERFAULTFD_STRESS_SECONDS` says for how long (default: 60).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
#[path = "support/handshakes.rs"]
mod handshakes;
#[path = "stress/memory.rs"]
mod memory;
mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pager::{
    EndReason, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, Rest, SessionInfo,
    SessionOptions, StatsSnapshot,
};
use uffd::Modes;

use handshakes::Random;
use memory::Memory;
use support::area::{Area, Made, ended, faults_ended, register, started};
use support::{DEADLINE, PAGE, image, told, uffd};

const SESSIONS: usize = 2;
const TOUCHERS: usize = 8;
const PAGES: usize = 4096;
const WORDS: usize = PAGE / 8;
/// How long one session lasts before it is closed and another takes its place.
const LIFETIME: Duration = Duration::from_millis(100);
/// The longest that a read takes which is not at hand.
const LONGEST_READ: Duration = Duration::from_millis(4);
/// The longest that a thread may wait for a word, or until what it does to memory is done, on a machine that does nothing
/// else.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What takes memory away from the threads that touch it; each on a thread of its own.
const DISTURBERS: &[fn(&Stress)] = &[discard_at_random, move_at_random];

/// A part of the source is never at hand: its pages are read by workers, and much can happen until they come.
#[derive(Debug)]
struct HalfAtHand(Vec<u8>);

fn at_hand(offset: u64) -> bool {
    offset >> 18 & 1 == 1
}

impl PageSource for HalfAtHand {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if !at_hand(offset) {
            return Ok(ReadNow::WouldBlock);
        }
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        if !at_hand(offset) {
            thread::sleep(LONGEST_READ / (1 + offset as u32 / PAGE as u32 % 7));
        }
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

/// Memory that is served, and what is known of its pages without looking at it. Never reset: what was discarded once
/// reads zero for ever.
struct Served {
    memory: Memory,
    /// A discard has been asked for: from here on the page may read zero.
    begun: Vec<AtomicBool>,
    /// A discard has returned: from here on it must.
    done: Vec<AtomicBool>,
    /// Its session is being closed: from here on its memory need not be one mapping where it was.
    closing: AtomicBool,
    id: u64,
    info: Arc<SessionInfo>,
    notices: std::sync::Mutex<Receiver<Notice>>,
}

struct Stress {
    pager: Pager,
    source: Arc<HalfAtHand>,
    words: Vec<u64>,
    served: Vec<RwLock<Arc<Served>>>,
    stop: AtomicBool,
    touched: AtomicU64,
    discarded: AtomicU64,
    moved: AtomicU64,
    grown: AtomicU64,
    longest_ns: AtomicU64,
    /// The longest that a thread which only sleeps was late: what the machine itself adds to every wait.
    late_ns: AtomicU64,
}

impl Served {
    fn new(pager: &Pager, source: &Arc<HalfAtHand>) -> Option<Arc<Self>> {
        let uffd = uffd()?;
        let memory = Memory::new(PAGES);
        let home = memory.home();
        register(&uffd, home, Modes::MISSING);
        let options = SessionOptions {
            source_timeout: DEADLINE,
            ..SessionOptions::new(
                vec![Region { address: home.address, len: home.len() as u64, source_offset: 0 }],
                PAGE as u64,
                Arc::<HalfAtHand>::clone(source),
            )
        };
        let (observer, notices) = told();
        let id = pager.adopt(uffd, options, observer).unwrap();
        let info = started(&notices);
        let flags = || (0..PAGES).map(|_| AtomicBool::new(false)).collect();
        let (begun, done, closing) = (flags(), flags(), AtomicBool::new(false));
        Some(Arc::new(Self { memory, begun, done, closing, id, info, notices: notices.into() }))
    }

    /// What its counters came to, once it is over.
    fn end(&self, pager: &Pager) -> StatsSnapshot {
        self.closing.store(true, Ordering::SeqCst);
        // Threads that still touch it find the source's bytes or zeros to the last.
        pager.close_session(self.id, Rest::Populate);
        let end = ended(&self.notices.lock().unwrap(), self.id);
        assert_eq!(end.reason, EndReason::Closed, "{:?}", end.error);
        let stats = self.info.stats.snapshot();
        assert_eq!(stats.faults, faults_ended(&stats), "every fault ends once: {stats:?}");
        assert_eq!(stats.faults_poisoned, 0, "{stats:?}");
        assert_eq!(stats.pages_zeroed, stats.faults_zeroed, "{stats:?}");
        assert_eq!(stats.bytes_installed, stats.pages_installed * PAGE as u64, "{stats:?}");
        assert!(stats.pages_installed <= PAGES as u64, "the source is given once: {stats:?}");
        assert!(stats.faults > 0 && stats.pages_removed > 0 && stats.worker_reads > 0, "{stats:?}");
        stats
    }
}

impl Stress {
    fn any(&self, random: &mut Random) -> Arc<Served> {
        Arc::clone(&self.served[random.below(SESSIONS)].read().unwrap())
    }

    /// Ends a session. Every page of its memory is looked at once more. How many answers were put off.
    fn end(&self, served: &Served) -> u64 {
        let stats = served.end(&self.pager);
        for page in 0..PAGES {
            self.look(served, page, page % WORDS);
        }
        stats.deferred
    }

    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Does what may have to wait for the pager.
    fn timed<T>(&self, act: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = act();
        self.longest_ns.fetch_max(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Reads one word, which has to be right. Whether the page still exists.
    fn look(&self, served: &Served, page: usize, word: usize) -> bool {
        let must_be_zero = served.done[page].load(Ordering::SeqCst);
        let read = |area: Area, word| self.timed(|| area.word(word));
        let Some(found) = served.memory.word(page, word, read) else { return false };
        let may_be_zero = served.begun[page].load(Ordering::SeqCst);
        let source = self.words[page * WORDS + word];
        assert!(
            found == source && !must_be_zero || found == 0 && may_be_zero,
            "page {page}, word {word}: {found:#x}, the source has {source:#x}; \
             discard asked for: {may_be_zero}, done before: {must_be_zero}"
        );
        true
    }
}

fn touch_at_random(stress: &Stress, seed: u64) {
    let mut random = Random::new(seed);
    while stress.running() {
        let served = stress.any(&mut random);
        for _ in 0..64 {
            let (page, word) = (random.below(PAGES), random.below(WORDS));
            let read = |area: Area, word| stress.timed(|| area.word(word));
            if stress.look(&served, page, word) {
                stress.touched.fetch_add(1, Ordering::Relaxed);
            }
            if random.one_in(16)
                && let Some(found) = served.memory.grown_word(page, word, read)
            {
                assert_eq!(found, 0, "grown behind page {page}, word {word}");
                stress.grown.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn discard_at_random(stress: &Stress) {
    let mut random = Random::new(7);
    while stress.running() {
        let served = stress.any(&mut random);
        let most = 1 + random.below(16);
        served.memory.together(random.below(PAGES), most, |pages, area| {
            served.begun[pages.clone()].iter().for_each(|page| page.store(true, Ordering::SeqCst));
            stress.timed(|| area.discard_here(Made::Private));
            served.done[pages.clone()].iter().for_each(|page| page.store(true, Ordering::SeqCst));
            stress.discarded.fetch_add(pages.len() as u64, Ordering::Relaxed);
        });
        // Else most of the memory would soon be zeros only.
        thread::sleep(Duration::from_micros(500));
    }
}

fn move_at_random(stress: &Stress) {
    let mut random = Random::new(8);
    while stress.running() {
        let served = stress.any(&mut random);
        let moved = served.memory.move_something(&mut random, |from, to, flags| {
            let moved = stress.timed(|| from.remap_raw(to, flags));
            if moved == to.ptr() { Ok(()) } else { Err(Errno::last()) }
        });
        match moved {
            Ok(left_behind) => {
                assert_eq!(left_behind.unwrap_or(0), 0, "left behind by a move");
                stress.moved.fetch_add(1, Ordering::Relaxed);
            }
            // Being unregistered piece by piece, it is several mappings for a moment, which cannot be moved at once.
            Err(Errno::EFAULT) if served.closing.load(Ordering::SeqCst) => {}
            Err(errno) => panic!("mremap: {errno}"),
        }
        thread::sleep(Duration::from_micros(300));
    }
}

fn measure_lateness(stress: &Stress) {
    const TICK: Duration = Duration::from_millis(5);
    while stress.running() {
        let start = Instant::now();
        thread::sleep(TICK);
        let late = start.elapsed().saturating_sub(TICK).as_nanos() as u64;
        stress.late_ns.fetch_max(late, Ordering::Relaxed);
    }
}

fn run(time: Duration) {
    let bytes = image(PAGES);
    let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let source = Arc::new(HalfAtHand(bytes));
    let Some(served) = (0..SESSIONS).map(|_| Served::new(&pager, &source).map(RwLock::new)).collect() else {
        return;
    };
    let counter = AtomicU64::default;
    let stress = Stress {
        pager,
        source,
        words,
        served,
        stop: AtomicBool::new(false),
        touched: counter(),
        discarded: counter(),
        moved: counter(),
        grown: counter(),
        longest_ns: counter(),
        late_ns: counter(),
    };
    let stress = Arc::new(stress);
    let spawn = |act: Box<dyn FnOnce(&Stress) + Send>| {
        let stress = Arc::clone(&stress);
        thread::spawn(move || act(&stress))
    };
    let mut threads: Vec<_> = (0..TOUCHERS as u64)
        .map(|thread| spawn(Box::new(move |stress| touch_at_random(stress, thread + 1))))
        .collect();
    threads.extend(DISTURBERS.iter().map(|disturb| spawn(Box::new(disturb))));
    threads.push(spawn(Box::new(measure_lateness)));

    let until = Instant::now() + time;
    let (mut sessions, mut deferred) = (SESSIONS, 0);
    for turn in 0.. {
        thread::sleep(LIFETIME / SESSIONS as u32);
        if Instant::now() >= until || threads.iter().any(|thread| thread.is_finished()) {
            break;
        }
        let fresh = Served::new(&stress.pager, &stress.source).unwrap();
        let old = std::mem::replace(&mut *stress.served[turn % SESSIONS].write().unwrap(), fresh);
        deferred += stress.end(&old);
        sessions += 1;
    }
    stress.stop.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    for served in &stress.served {
        deferred += stress.end(&served.read().unwrap());
    }
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (longest, late) =
        (Duration::from_nanos(of(&stress.longest_ns)), Duration::from_nanos(of(&stress.late_ns)));
    let (touched, discarded) = (of(&stress.touched), of(&stress.discarded));
    let (moved, grown) = (of(&stress.moved), of(&stress.grown));
    println!(
        "{touched} words read, {grown} where memory had grown, {discarded} pages discarded, {moved} moves, \
         {deferred} answers put off, {sessions} sessions; longest wait {longest:?} (the machine's own lateness: {late:?})"
    );
    assert!(longest < LONGEST_WAIT + 4 * late, "a thread waited {longest:?}");
    assert!(touched > 1000 && discarded > 100 && moved > 100 && grown > 0 && deferred > 0);
}

#[test]
fn every_word_is_the_sources_or_zero_after_a_discard_and_nobody_waits_long() {
    let seconds =
        std::env::var("USERFAULTFD_STRESS_SECONDS").map_or(60, |text| text.parse().expect("seconds"));
    let time = Duration::from_secs(seconds);
    alone::alone(
        "every_word_is_the_sources_or_zero_after_a_discard_and_nobody_waits_long",
        2 * time + Duration::from_secs(30),
        || run(time),
    );
}
