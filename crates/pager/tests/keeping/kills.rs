//! Many deaths under load: readers and a thread that gives memory back go on all the while, and every word is looked at.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uffd::{Left, Modes, left_in};

use crate::handshakes::Random;
use crate::memory::at;
use crate::support::area::{Area, Made, all_events, new_uffd, register};
use crate::support::kept::{Kept, PagerProcess, Source, to_serve};
use crate::support::{PAGE, elsewhere, word};

/// 128 MiB.
const PAGES: usize = 1 << 15;
const KILLS: usize = 100;
/// Of these, so many are to fall between a read and its marking.
const FROZEN: usize = 10;
const READERS: u64 = 3;
/// The longest that nobody may be served, with everything that runs beside this test.
const LONGEST: Duration = Duration::from_secs(5);

/// What a page reads.
const IMAGE: u8 = 0;
const GOING: u8 = 1;
const ZERO: u8 = 2;

struct World {
    area: Area,
    states: Vec<AtomicU8>,
    over: AtomicBool,
    reads: AtomicU64,
    longest_ns: AtomicU64,
    /// Odd while the process is being stopped, again and again.
    frozen: AtomicU64,
}

impl World {
    /// Looks at one word of a page.
    fn look(&self, page: usize, within: usize) {
        let index = page * PAGE / 8 + within;
        let before = self.states[page].load(Ordering::SeqCst);
        let (frozen, began) = (self.frozen.load(Ordering::SeqCst), Instant::now());
        let found = self.area.word(index);
        let took = began.elapsed().as_nanos() as u64;
        if frozen.is_multiple_of(2) && self.frozen.load(Ordering::SeqCst) == frozen {
            self.longest_ns.fetch_max(took, Ordering::Relaxed);
        }
        let after = self.states[page].load(Ordering::SeqCst);
        let right = match (before, after) {
            (ZERO, _) => found == 0,
            (_, IMAGE) => found == word(index),
            _ => found == 0 || found == word(index),
        };
        assert!(right, "page {page}: {found:#x}, {} from {before} to {after}", word(index));
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    fn discard(&self, first: usize, pages: usize) {
        for page in first..first + pages {
            // What is zero stays so.
            let _ = self.states[page].compare_exchange(IMAGE, GOING, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.area.part(first, pages).discard_here(Made::Private);
        for page in first..first + pages {
            self.states[page].store(ZERO, Ordering::SeqCst);
        }
    }
}

/// Messages in the ring that are not marked, and whether one of them is a removal.
fn unmarked(kept: &Kept) -> (usize, bool) {
    let words = kept.ring();
    let left: Vec<_> = left_in(&words).collect();
    let removal = |(_, left): &(usize, Left)| matches!(left, Left::Event(uffd::Event::Remove { .. }));
    (left.len(), left.iter().any(removal))
}

/// Stops the process until it has read a removal and not marked it, for a while. Whether it has.
fn freeze(process: &PagerProcess, kept: &Kept) -> bool {
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        process.signal(libc::SIGSTOP);
        process.until_stopped();
        if unmarked(kept).1 {
            return true;
        }
        process.signal(libc::SIGCONT);
        std::thread::sleep(Duration::from_micros(100));
    }
    false
}

#[test]
fn killed_a_hundred_times_under_load_no_word_is_wrong_and_nobody_waits_for_ever() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING);
    let start = || PagerProcess::start("pager_process");
    let mut process = start();
    process.serve(to_serve(area), Source::Made(PAGES), &uffd, None);
    let kept = process.kept();
    process.started();
    drop(uffd);

    let world = Arc::new(World {
        area,
        states: (0..PAGES).map(|_| AtomicU8::new(IMAGE)).collect(),
        over: AtomicBool::new(false),
        reads: AtomicU64::new(0),
        longest_ns: AtomicU64::new(0),
        frozen: AtomicU64::new(0),
    });
    let work = |seed: u64, act: fn(&World, &mut Random)| {
        let world = Arc::clone(&world);
        elsewhere(move || {
            let mut random = Random::new(seed);
            while !world.over.load(Ordering::Relaxed) {
                act(&world, &mut random);
            }
        })
    };
    let mut workers: Vec<_> = (0..READERS)
        .map(|seed| work(seed, |world, random| world.look(random.below(PAGES), random.below(PAGE / 8))))
        .collect();
    workers.push(work(77, |world, random| {
        let pages = 1 + random.below(4);
        world.discard(random.below(PAGES - pages), pages);
    }));

    let mut random = Random::new(4711);
    let (mut between, mut removals, mut outage) = (0, 0, Duration::ZERO);
    for kill in 1..=KILLS {
        let next = start();
        std::thread::sleep(Duration::from_micros(random.below(15_000) as u64));
        if kill % (KILLS / FROZEN) == 0 {
            world.frozen.fetch_add(1, Ordering::SeqCst);
            freeze(&process, &kept);
            world.frozen.fetch_add(1, Ordering::SeqCst);
        }
        let since = Instant::now();
        process.kill();
        let (left, removal) = unmarked(&kept);
        between += usize::from(left > 0);
        removals += usize::from(removal);
        next.resume(&kept, Source::Made(PAGES));
        assert_eq!(next.started(), (kept.session.id, kill as u64));
        outage = outage.max(since.elapsed());
        process = next;
    }
    world.over.store(true, Ordering::Relaxed);
    for worker in &workers {
        worker.recv_timeout(LONGEST).expect("somebody waits for ever, or has found what is wrong");
    }
    for page in 0..PAGES {
        world.look(page, page % (PAGE / 8));
    }
    let longest = Duration::from_nanos(world.longest_ns.load(Ordering::Relaxed));
    println!(
        "{KILLS} kills: {between} left messages unmarked, {removals} of them a removal; {} reads, the longest took {longest:?}, \
         the longest outage {outage:?}",
        world.reads.load(Ordering::Relaxed)
    );
    assert!(removals > 0, "no kill fell between reading a removal and marking it");
    assert!(longest < LONGEST, "{longest:?}");
    let ring = kept.words();
    assert_eq!(crate::memory::get(&ring, at::SESSION), kept.session.id);
}
