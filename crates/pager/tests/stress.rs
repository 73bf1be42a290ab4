//! Memory under stress: many threads touch it at random while others take it away, two sessions of one pager, whose
//! sources are at hand or not, and which are closed and begun anew meanwhile.
//!
//! `USERFAULTFD_STRESS_SECONDS` says for how long (default: 8).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
#[path = "support/handshakes.rs"]
mod handshakes;
mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use pager::{
    EndReason, FailurePolicy, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, Rest,
    SessionInfo, SessionOptions, StatsSnapshot,
};
use uffd::{Mapping, MappingKind, Modes};

use handshakes::Random;
use support::{DEADLINE, PAGE, image, told, uffd};

const SESSIONS: usize = 2;
const TOUCHERS: usize = 8;
const PAGES: usize = 4096;
const WORDS: usize = PAGE / 8;
/// How long one session lasts before it is closed and another takes its place.
const LIFETIME: Duration = Duration::from_millis(600);
/// The longest that a thread may wait for a word, on a machine that does nothing else.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What takes memory away from the threads that touch it; each on a thread of its own.
const DISTURBERS: &[fn(&Stress)] = &[discard_at_random];

/// A part of the source is never at hand: its pages are read by workers.
#[derive(Debug)]
struct HalfAtHand(Vec<u8>);

impl PageSource for HalfAtHand {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if offset >> 18 & 1 == 0 {
            return Ok(ReadNow::WouldBlock);
        }
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

/// Memory that is served, and what is known of its pages without looking at it. Never reset: what was discarded once
/// reads zero for ever.
struct Area {
    mapping: Mapping,
    /// A discard has been asked for: from here on the page may read zero.
    begun: Vec<AtomicBool>,
    /// A discard has returned: from here on it must.
    done: Vec<AtomicBool>,
    id: u64,
    info: Arc<SessionInfo>,
    notices: std::sync::Mutex<Receiver<Notice>>,
}

struct Stress {
    pager: Pager,
    source: Arc<HalfAtHand>,
    words: Vec<u64>,
    areas: Vec<RwLock<Arc<Area>>>,
    stop: AtomicBool,
    touched: AtomicU64,
    discarded: AtomicU64,
    longest_ns: AtomicU64,
    /// The longest that a thread which only sleeps was late: what the machine itself adds to every wait.
    late_ns: AtomicU64,
}

impl Area {
    fn new(pager: &Pager, source: &Arc<HalfAtHand>) -> Option<Arc<Self>> {
        let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
        let uffd = uffd()?;
        let (address, len) = (mapping.address(), mapping.len() as u64);
        // SAFETY: no reference to the mapping exists; it is read by copying.
        unsafe { uffd.register(address, len, Modes::MISSING) }.unwrap();
        let options = SessionOptions {
            modes: pager::SessionModes::default(),
            source_timeout: DEADLINE,
            regions: vec![Region { address, len, source_offset: 0 }],
            page_size: PAGE as u64,
            source: Arc::<HalfAtHand>::clone(source),
            policy: FailurePolicy::Poison,
            window: None,
            process: None,
        };
        let (observer, notices) = told();
        let id = pager.adopt(uffd, options, observer).unwrap();
        let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else {
            panic!("not started")
        };
        let flags = || (0..PAGES).map(|_| AtomicBool::new(false)).collect();
        let (begun, done) = (flags(), flags());
        Some(Arc::new(Self { mapping, begun, done, id, info, notices: notices.into() }))
    }

    /// What its counters came to, once it is over.
    fn end(&self) -> StatsSnapshot {
        let notice = self.notices.lock().unwrap().recv_timeout(DEADLINE).unwrap();
        let Notice::SessionEnded { end, .. } = notice else { panic!("{notice:?}") };
        assert_eq!(end.reason, EndReason::Closed, "{:?}", end.error);
        let stats = self.info.stats.snapshot();
        let ended = stats.faults_installed
            + stats.faults_zeroed
            + stats.faults_poisoned
            + stats.already_present
            + stats.joined
            + stats.unanswered;
        assert_eq!(stats.faults, ended, "every fault ends once: {stats:?}");
        assert_eq!(stats.faults_poisoned, 0, "{stats:?}");
        assert_eq!(stats.pages_zeroed, stats.faults_zeroed, "{stats:?}");
        assert_eq!(stats.bytes_installed, stats.pages_installed * PAGE as u64, "{stats:?}");
        assert!(stats.pages_installed <= PAGES as u64, "the source is given once: {stats:?}");
        assert!(stats.faults > 0 && stats.pages_removed > 0 && stats.worker_reads > 0, "{stats:?}");
        stats
    }
}

impl Stress {
    fn area(&self, random: &mut Random) -> Arc<Area> {
        Arc::clone(&self.areas[random.below(SESSIONS)].read().unwrap())
    }

    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

fn touch_at_random(stress: &Stress, seed: u64) {
    let mut random = Random::new(seed);
    while stress.running() {
        let area = stress.area(&mut random);
        for _ in 0..64 {
            let (page, word) = (random.below(PAGES), random.below(WORDS));
            let must_be_zero = area.done[page].load(Ordering::SeqCst);
            let mut bytes = [0; 8];
            let start = Instant::now();
            area.mapping.read(page * PAGE + word * 8, &mut bytes).unwrap();
            stress.longest_ns.fetch_max(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            let may_be_zero = area.begun[page].load(Ordering::SeqCst);
            let (found, source) = (u64::from_ne_bytes(bytes), stress.words[page * WORDS + word]);
            assert!(
                found == source && !must_be_zero || found == 0 && may_be_zero,
                "page {page}, word {word}: {found:#x}, the source has {source:#x}; \
                 discard asked for: {may_be_zero}, done before: {must_be_zero}"
            );
        }
        stress.touched.fetch_add(64, Ordering::Relaxed);
    }
}

fn discard_at_random(stress: &Stress) {
    let mut random = Random::new(7);
    while stress.running() {
        let area = stress.area(&mut random);
        let first = random.below(PAGES);
        let pages = first..(first + 1 + random.below(16)).min(PAGES);
        area.begun[pages.clone()].iter().for_each(|page| page.store(true, Ordering::SeqCst));
        area.mapping.discard(first * PAGE, pages.len() * PAGE).unwrap();
        area.done[pages.clone()].iter().for_each(|page| page.store(true, Ordering::SeqCst));
        stress.discarded.fetch_add(pages.len() as u64, Ordering::Relaxed);
        // Else most of the memory would soon be zeros only.
        thread::sleep(Duration::from_micros(500));
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
    let Some(areas) = (0..SESSIONS).map(|_| Area::new(&pager, &source).map(RwLock::new)).collect() else {
        return;
    };
    let counter = AtomicU64::default;
    let stress = Stress {
        pager,
        source,
        words,
        areas,
        stop: AtomicBool::new(false),
        touched: counter(),
        discarded: counter(),
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
        let fresh = Area::new(&stress.pager, &stress.source).unwrap();
        let old = std::mem::replace(&mut *stress.areas[turn % SESSIONS].write().unwrap(), fresh);
        // Threads that still touch it find the source's bytes or zeros to the last.
        stress.pager.close_session(old.id, Rest::Populate);
        deferred += old.end().deferred;
        sessions += 1;
    }
    stress.stop.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    for area in &stress.areas {
        let area = area.read().unwrap();
        stress.pager.close_session(area.id, Rest::Populate);
        deferred += area.end().deferred;
    }
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (longest, late) =
        (Duration::from_nanos(of(&stress.longest_ns)), Duration::from_nanos(of(&stress.late_ns)));
    let (touched, discarded) = (of(&stress.touched), of(&stress.discarded));
    println!(
        "{touched} words read, {discarded} pages discarded, {deferred} answers put off, {sessions} sessions; longest wait {longest:?} \
         (the machine's own lateness: {late:?})"
    );
    assert!(longest < LONGEST_WAIT + 4 * late, "a thread waited {longest:?}");
    assert!(touched > 1000 && discarded > 100 && deferred > 0);
}

#[test]
fn every_word_is_the_sources_or_zero_after_a_discard_and_nobody_waits_long() {
    let seconds =
        std::env::var("USERFAULTFD_STRESS_SECONDS").map_or(8, |text| text.parse().expect("seconds"));
    let time = Duration::from_secs(seconds);
    alone::alone(
        "every_word_is_the_sources_or_zero_after_a_discard_and_nobody_waits_long",
        2 * time + Duration::from_secs(30),
        || run(time),
    );
}
