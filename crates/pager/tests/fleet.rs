//! Many sessions of one pager: each is correct, idle ones cost nothing, and a hostile one does not slow the others down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
#[path = "support/handshakes.rs"]
mod handshakes;
mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pager::{
    EndReason, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow, Region, Rest, SessionInfo,
    SessionOptions,
};
use uffd::{Mapping, MappingKind, Modes};

use handshakes::Random;
use support::{DEADLINE, PAGE, told, uffd};

const MINUTE: Duration = Duration::from_secs(60);

/// Bytes that are worked out when they are asked for: an image of any size, each with content of its own.
#[derive(Debug)]
struct Computed {
    salt: u64,
    size: u64,
}

impl Computed {
    fn word(&self, offset: u64) -> u64 {
        // Never zero: both factors are odd.
        (self.salt * 2 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(offset | 1)
    }
}

impl PageSource for Computed {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        for (at, word) in (offset..).step_by(8).zip(buffer.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.word(at).to_ne_bytes());
        }
        Ok(())
    }
}

struct Member {
    mapping: Arc<Mapping>,
    source: Arc<Computed>,
    id: u64,
    info: Arc<SessionInfo>,
    notices: Mutex<Receiver<Notice>>,
}

impl Member {
    fn join(pager: &Pager, salt: u64, len: usize, window: Option<u64>) -> Option<Self> {
        let mapping = Arc::new(Mapping::new(len, MappingKind::Private).unwrap());
        let source = Arc::new(Computed { salt, size: len as u64 });
        let uffd = uffd()?;
        // SAFETY: no reference to the mapping exists; it is read by copying.
        unsafe { uffd.register(mapping.address(), len as u64, Modes::MISSING) }.unwrap();
        let options = SessionOptions {
            source_timeout: DEADLINE,
            window,
            ..SessionOptions::new(
                vec![Region { address: mapping.address(), len: len as u64, source_offset: 0 }],
                PAGE as u64,
                Arc::<Computed>::clone(&source),
            )
        };
        let (observer, notices) = told();
        let id = pager.adopt(uffd, options, observer).unwrap();
        let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else {
            panic!("not started")
        };
        Some(Self { mapping, source, id, info, notices: notices.into() })
    }

    fn word(&self, page: usize) -> u64 {
        let mut bytes = [0; 8];
        self.mapping.read(page * PAGE, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    fn leave(&self, pager: &Pager) {
        pager.close_session(self.id, Rest::Zero);
        let notice = self.notices.lock().unwrap().recv_timeout(DEADLINE).unwrap();
        let Notice::SessionEnded { end, .. } = notice else { panic!("{notice:?}") };
        assert_eq!(end.reason, EndReason::Closed);
    }
}

/// Resident memory of this process, counted by the kernel page by page.
fn resident() -> i64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<i64>().unwrap() * 1024
}

/// Nanoseconds that the pager's thread has run for.
fn pager_ran() -> u64 {
    let task = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "uffd-pager"));
    let times = fs::read_to_string(task.unwrap().join("schedstat")).unwrap();
    times.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn of_256_sessions_each_has_its_own_content() {
    alone::alone("of_256_sessions_each_has_its_own_content", MINUTE, || {
        const PAGES: usize = 24;
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let members: Option<Vec<Member>> =
            (0..256).map(|salt| Member::join(&pager, salt, PAGES * PAGE, None)).collect();
        let Some(members) = members else { return };
        thread::scope(|threads| {
            for thread in 0..4 {
                let members = &members;
                threads.spawn(move || {
                    let mut random = Random::new(thread + 1);
                    for _ in 0..members.len() * PAGES {
                        let (member, page) = (&members[random.below(members.len())], random.below(PAGES));
                        let expected = member.source.word((page * PAGE) as u64);
                        assert_eq!(member.word(page), expected, "session {}", member.info.id);
                    }
                });
            }
        });
        for member in &members {
            let mut bytes = vec![0; PAGES * PAGE];
            member.mapping.read(0, &mut bytes).unwrap();
            let mut expected = vec![0; PAGES * PAGE];
            member.source.read(0, &mut expected).unwrap();
            assert!(bytes == expected, "session {}", member.info.id);
            // Only then has everything been counted: a page is there a moment before it is.
            member.leave(&pager);
            assert_eq!(member.info.stats.snapshot().pages_installed, PAGES as u64);
        }
    });
}

#[test]
fn an_idle_session_costs_neither_memory_nor_time_whatever_its_size() {
    if let Some(sanitizer) = std::env::var_os("USERFAULTFD_SANITIZER") {
        println!("skipped: the {} sanitizer needs memory for every session", sanitizer.display());
        return;
    }
    alone::alone("an_idle_session_costs_neither_memory_nor_time_whatever_its_size", MINUTE, || {
        const MOST: i64 = 64 << 10;
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        // What the first session makes resident is the pager's own; and memory that was given back before must not be
        // what the next ones are made of.
        for len in [256 << 20, 16 << 30] {
            let Some(first) = Member::join(&pager, 1, len, None) else { return };
            assert_eq!(first.word(len / PAGE / 2), first.source.word(len as u64 / 2));
            first.leave(&pager);
        }
        let mut members = Vec::with_capacity(64);
        for len in [256 << 20, 16 << 30] {
            let before = resident();
            members.extend((0..16).map(|salt| Member::join(&pager, salt, len, None).unwrap()));
            let each = (resident() - before) / 16;
            println!("an idle session of {} MiB: {each} bytes", len >> 20);
            assert!(each < MOST, "{each} bytes resident for an idle session of {len} bytes");
        }

        let before = pager_ran();
        thread::sleep(Duration::from_millis(500));
        let ran = pager_ran() - before;
        assert!(ran < 1_000_000, "the pager ran for {ran} ns while nothing happened");
        // And they are there when they are needed.
        for member in &members {
            let page = member.mapping.len() / PAGE - 1;
            assert_eq!(member.word(page), member.source.word((page * PAGE) as u64));
        }
    });
}

#[derive(Debug, Clone, Copy)]
enum Storm {
    Faults,
    Removals,
}

const STORM: &str = "PAGER_TEST_STORM";
const HOSTILE_THREADS: usize = 32;

impl Storm {
    const PAGES: usize = 2048;

    /// Threads that do nothing but keep a session busy, until told to stop.
    fn rage(self, member: &Arc<Member>, stop: &Arc<AtomicBool>) -> Vec<thread::JoinHandle<()>> {
        let one = |seed: usize| {
            let (member, stop) = (Arc::clone(member), Arc::clone(stop));
            let mut random = Random::new(seed as u64 + 1);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let page = random.below(Self::PAGES);
                    member.word(page);
                    if matches!(self, Self::Removals) || random.one_in(256) {
                        let pages = if matches!(self, Self::Removals) { 1 } else { Self::PAGES - page };
                        member.mapping.discard(page * PAGE, pages * PAGE).unwrap();
                    }
                }
            })
        };
        (0..HOSTILE_THREADS).map(one).collect()
    }

    fn member(pager: &Pager) -> Option<Arc<Member>> {
        Member::join(pager, 99, Self::PAGES * PAGE, Some(PAGE as u64)).map(Arc::new)
    }

    /// For a second process: rages until it is killed.
    fn rage_on(self) -> Option<()> {
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let member = Self::member(&pager)?;
        let threads = self.rage(&member, &Arc::default());
        println!("raging");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        Some(())
    }
}

/// A second process with a storm of its own, killed when dropped.
struct Elsewhere(Child);

impl Elsewhere {
    fn start(test: &str, storm: Storm) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(STORM, format!("{storm:?}"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.ends_with("raging")));
        Self(child)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The median of single-page faults of a session that nobody else uses.
fn median_fault(pager: &Pager) -> Duration {
    const FAULTS: usize = 400;
    let member = Member::join(pager, 5, FAULTS * PAGE, Some(PAGE as u64)).unwrap();
    let mut times: Vec<Duration> = (0..FAULTS)
        .map(|page| {
            let start = Instant::now();
            let word = member.word(page);
            let time = start.elapsed();
            assert_eq!(word, member.source.word((page * PAGE) as u64));
            // Not one burst: the storm goes on meanwhile.
            thread::sleep(Duration::from_micros(200));
            time
        })
        .collect();
    times.sort_unstable();
    member.leave(pager);
    times[FAULTS / 2]
}

fn compare(test: &str, storm: Storm) {
    if std::env::var_os(STORM).is_some_and(|wanted| wanted == *format!("{storm:?}")) {
        storm.rage_on();
        return;
    }
    // One comparison at a time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    alone::alone(test, MINUTE, || {
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let Some(hostile) = Storm::member(&pager) else { return };
        // What else the machine does can spoil a comparison, but not all of them.
        for round in 1..=6 {
            let elsewhere = Elsewhere::start(test, storm);
            let apart = median_fault(&pager);
            drop(elsewhere);

            let stop = Arc::default();
            let threads = storm.rage(&hostile, &stop);
            let together = median_fault(&pager);
            stop.store(true, Ordering::Relaxed);
            threads.into_iter().for_each(|thread| thread.join().unwrap());

            println!("{storm:?}: median fault {together:?}, with the storm in a second process {apart:?}");
            if together <= 2 * apart {
                return;
            }
            assert!(round < 6, "a hostile session slows others down more than a hostile process does");
        }
    });
}

#[test]
fn a_storm_of_faults_slows_other_sessions_no_more_than_one_in_a_second_process() {
    compare("a_storm_of_faults_slows_other_sessions_no_more_than_one_in_a_second_process", Storm::Faults);
}

#[test]
fn a_storm_of_removals_slows_other_sessions_no_more_than_one_in_a_second_process() {
    compare("a_storm_of_removals_slows_other_sessions_no_more_than_one_in_a_second_process", Storm::Removals);
}
