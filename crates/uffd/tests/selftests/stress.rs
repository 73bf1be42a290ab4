//! uffd-stress in short: on every CPU one thread counts in pages that it locks, one serves, and one fills the rest in the
//! background, protects half of it meanwhile, and fills on. Then source and destination change places.
//!
//! Every page arrives exactly once: its counter is always what a copy of it elsewhere says.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread;

use uffd::{AnonymousOptions, CopyOptions, CreateOptions, Factory, Mapping, Modes, UffdError, Userfaultfd};
use userfaultfd::{Event as Message, FaultKind};

use crate::memory::{Area, Memory, copy_page, value};
use crate::processes::{PAGE, until};
use crate::serving::{Faults, Server};

const THREADS: usize = 2;
const BYTES: usize = 8 << 20;
/// How a bounce goes, by the bits of its number: pages in random order, threads that race for the same pages, messages by
/// poll (else by blocking reads).
const BOUNCES: usize = 8;
const RANDOM: usize = 1;
const RACING: usize = 2;
const POLL: usize = 4;

/// Words of a page: who has it locked, how often it was counted up, and what never changes from here on.
const LOCK: usize = 0;
const COUNTER: usize = 1;
const CONSTANT: usize = 2;

/// What all threads of a bounce share. Lives as long as the process, as its memory does.
struct World {
    uffd: Userfaultfd,
    src: Area,
    dst: Area,
    /// A page for each reader that cannot be told to stop otherwise.
    bells: Mapping,
    /// COPYs that put a page in.
    arrived: AtomicUsize,
    filled: AtomicBool,
    /// Of each page, what its counter is.
    shadow: &'static [AtomicU64],
}

impl World {
    /// One page from the source, protected: the first write to it is a fault too.
    fn bring(&self, page: usize) {
        let source = self.src.bytes(page);
        let options = CopyOptions { write_protect: true, ..CopyOptions::default() };
        if copy_page(&self.uffd, self.dst.at(page), &source, options) {
            self.arrived.fetch_add(1, SeqCst);
        }
    }

    fn unprotect(&self, page: usize) {
        self.uffd.write_protect(self.dst.at(page), self.dst.page() as u64, false, true).unwrap();
    }

    /// Fills the thread's part of the area, in two halves; protects the first before the second.
    fn background(&self, thread: usize) {
        // Else it might bring everything before anybody asks.
        until("a page was asked for", || self.arrived.load(SeqCst) > 0);
        let (from, to) = part(self.dst.count, thread);
        let half = from + (to - from) / 2;
        (from..half).for_each(|page| self.bring(page));
        if half > from {
            let len = self.dst.at(half) - self.dst.at(from);
            self.uffd.write_protect(self.dst.at(from), len, true, true).unwrap();
        }
        (half..to).for_each(|page| self.bring(page));
    }

    /// Counts in pages until all have arrived, and long enough to have seen each.
    fn count(&self, bounce: usize, thread: usize) {
        let pages = self.dst.count;
        let start = if bounce & RACING != 0 { 0 } else { part(pages, thread).0 };
        let mut random = thread as u64 + bounce as u64 * 64 + 1;
        let mut done = 0;
        while done < 2 * pages || !self.filled.load(SeqCst) {
            let page = if bounce & RANDOM != 0 {
                // xorshift: all that is needed is an order that no two threads share.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                (random % pages as u64) as usize
            } else {
                (start + done) % pages
            };
            self.count_up(page);
            done += 1;
        }
    }

    fn count_up(&self, page: usize) {
        let span = self.dst.span();
        let lock = span.atomic(page, LOCK);
        while lock.compare_exchange(0, 1, SeqCst, SeqCst).is_err() {
            thread::yield_now();
        }
        let counter = span.peek(page, COUNTER);
        assert_eq!(counter, self.shadow[page].load(SeqCst), "page {page} of {:?}", self.dst.memory);
        span.poke(page, COUNTER, counter + 1);
        self.shadow[page].store(counter + 1, SeqCst);
        lock.store(0, SeqCst);
    }

    /// Blocking reads, one message each, until a bell is rung.
    fn serve_blocking(&self) -> Faults {
        let mut faults = Faults::default();
        loop {
            let message = self.uffd.as_upstream().read_event().unwrap();
            let Some(Message::Pagefault { kind, addr, .. }) = message else { panic!("{message:?}") };
            let address = addr as u64;
            if self.is_bell(address) {
                self.uffd.zero(address, PAGE as u64, true).unwrap();
                return faults;
            }
            let page = self.dst.index(address);
            match kind {
                FaultKind::Missing => {
                    faults.missing += 1;
                    self.bring(page);
                }
                FaultKind::WriteProtected => {
                    faults.write_protect += 1;
                    self.unprotect(page);
                }
                FaultKind::Minor => panic!("not registered for that"),
            }
        }
    }

    fn is_bell(&self, address: u64) -> bool {
        (self.bells.address()..self.bells.address() + self.bells.len() as u64).contains(&address)
    }

    fn start_polling(&'static self) -> Server {
        Server::start(&self.uffd, move |fault| {
            let page = self.dst.index(fault.address);
            match fault.kind {
                uffd::FaultKind::Missing => self.bring(page),
                uffd::FaultKind::WriteProtect => self.unprotect(page),
                uffd::FaultKind::Minor => panic!("not registered for that"),
            }
        })
    }

    /// All have arrived, once, with the right counters and everything else as it was.
    fn verify(&self) {
        assert_eq!(self.arrived.load(SeqCst), self.dst.count, "pages that were put in");
        let span = self.dst.span();
        for page in 0..self.dst.count {
            assert_eq!(span.peek(page, COUNTER), self.shadow[page].load(SeqCst), "page {page}");
            let words = self.dst.page() / size_of::<u64>();
            assert!((CONSTANT..words).all(|word| span.peek(page, word) == value(page, word)));
            let (to, from) = (self.dst.at(page), self.src.mapping.as_ptr());
            // SAFETY: the source has a page there and is not written to; no reference to the destination exists.
            let again = unsafe { self.uffd.copy(to, from, self.dst.page(), CopyOptions::default()) };
            assert_eq!(again, Err(UffdError::PageExist), "page {page}");
        }
    }
}

fn part(pages: usize, thread: usize) -> (usize, usize) {
    (pages * thread / THREADS, pages * (thread + 1) / THREADS)
}

fn bounce(world: &'static World, bounce: usize) -> Faults {
    let polling: Vec<_> =
        (0..THREADS).filter(|_| bounce & POLL != 0).map(|_| world.start_polling()).collect();
    let blocking: Vec<_> = (0..THREADS)
        .filter(|_| bounce & POLL == 0)
        .map(|_| thread::spawn(|| world.serve_blocking()))
        .collect();
    let together = Barrier::new(2 * THREADS);
    thread::scope(|scope| {
        let together = &together;
        let background: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    together.wait();
                    world.background(thread);
                })
            })
            .collect();
        for thread in 0..THREADS {
            scope.spawn(move || {
                together.wait();
                world.count(bounce, thread);
            });
        }
        background.into_iter().for_each(|thread| thread.join().unwrap());
        world.filled.store(true, SeqCst);
    });
    for bell in 0..blocking.len() {
        world.bells.read(bell * PAGE, &mut [0]).unwrap();
    }
    let seen = polling.into_iter().map(Server::stop);
    let seen = seen.chain(blocking.into_iter().map(|thread| thread.join().unwrap()));
    seen.fold(Faults::default(), |all, one| Faults {
        missing: all.missing + one.missing,
        minor: 0,
        write_protect: all.write_protect + one.write_protect,
    })
}

fn case(memory: Memory) {
    let pages = BYTES / memory.page();
    let (mut src, mut dst) = (Area::new(memory, pages), Area::new(memory, pages));
    src.fill();
    let shadow: &'static [AtomicU64] =
        Vec::leak((0..pages).map(|page| AtomicU64::new(value(page, COUNTER))).collect());
    (0..pages).for_each(|page| src.span().poke(page, LOCK, 0));
    for number in 0..BOUNCES {
        let options = CreateOptions { non_blocking: number & POLL != 0, ..CreateOptions::default() };
        let uffd = match Factory::open().create(&options) {
            Ok(uffd) => uffd,
            Err(error) => {
                println!("skipped: {error}");
                return;
            }
        };
        let bells = Mapping::anonymous(THREADS * PAGE, AnonymousOptions::default()).unwrap();
        dst.release();
        dst.register(&uffd, Modes::MISSING | Modes::WRITE_PROTECT);
        crate::support::register(&uffd, &bells, Modes::MISSING);
        let (arrived, filled) = (AtomicUsize::new(0), AtomicBool::new(false));
        let world = World { uffd, src, dst, bells, arrived, filled, shadow };
        let world: &'static World = Box::leak(Box::new(world));

        let faults = bounce(world, number);

        world.verify();
        let written = if number & RANDOM != 0 { 1 } else { pages };
        assert!(faults.missing > 0, "pages are asked for: {faults:?}");
        assert!(faults.write_protect >= written, "pages arrive protected: {faults:?}");
        world.uffd.unregister(dst.start(), dst.len()).unwrap();
        (src, dst) = (dst, src);
    }
    let counted: u64 =
        shadow.iter().enumerate().map(|(page, now)| now.load(SeqCst) - value(page, COUNTER)).sum();
    assert!(counted >= (BOUNCES * THREADS * 2 * pages) as u64);
}

cases!(case; all);
