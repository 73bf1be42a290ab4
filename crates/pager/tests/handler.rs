//! Faults that a thread of the program answers, while the guard looks on and memory goes away under them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/handshakes.rs"]
mod handshakes;
mod support;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pager::{Answered, FailurePolicy, Guarded, Handler, HandlerOptions, Joining, Run, SelfFault};
use uffd::{CopyOptions, Features, Modes, Userfaultfd};

use handshakes::Random;
use support::area::{Area, Made, new_uffd, register};
use support::{PAGE, elsewhere, finish};

const PAGES: usize = 64;
const FAULTING: u64 = 4;
const READS: usize = 20_000;

/// Every word of page `index` is `index + 1`.
fn fill(uffd: &Userfaultfd, run: Run, area: Area) -> Result<u64, uffd::UffdError> {
    let pages = (run.start..run.start + run.len).step_by(PAGE);
    let words: Vec<u64> =
        pages.flat_map(|page| [(page - area.address) / PAGE as u64 + 1; PAGE / 8]).collect();
    let options = CopyOptions { wake: run.wake, ..CopyOptions::default() };
    // SAFETY: the bytes live across the call and nobody writes them; no reference to the area exists.
    unsafe { uffd.copy(run.start, words.as_ptr().cast(), run.len as usize, options) }.map(|()| run.len)
}

/// One turn of the thread that answers: at once, all together, or later.
fn turn(handler: &Handler, area: Area, random: &mut Random, answered: &AtomicU64) {
    let mut fds = [
        PollFd::new(handler.as_fd(), PollFlags::POLLIN),
        PollFd::new(handler.wake().as_fd(), PollFlags::POLLIN),
    ];
    poll(&mut fds, PollTimeout::from(5u8)).unwrap();
    handler.wake().clear();
    let mut faults = Vec::new();
    handler.deliver(64, drop, |fault| faults.push(fault.id)).unwrap();
    let told = |given: Answered| match given {
        Answered::Done(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
        // Its memory went, or is going: it comes again.
        Answered::Later | Answered::Stale => {}
        Answered::Failed(error) => panic!("{error}"),
    };
    if random.one_in(2) {
        handler.answer_all(
            faults.into_iter(),
            if random.one_in(2) { Joining::Always } else { Joining::Never },
            |uffd, run| fill(uffd, run, area),
            |_, given| told(given),
        );
        return;
    }
    for id in faults {
        match random.one_in(10) {
            true => drop(handler.defer(id)),
            false => told(handler.answer(id, |uffd, fault| fill(uffd, Run::alone(fault), area))),
        }
    }
}

#[test]
fn a_handler_answers_everybody_while_memory_is_given_back_under_it() {
    let Some(uffd) = new_uffd(Features::EVENT_REMOVE | Features::THREAD_ID) else { return };
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING);
    let guarded = Arc::new(Guarded::new(uffd));
    guarded.guard().unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let answering = {
        let (over, answered) = (Arc::clone(&over), Arc::clone(&answered));
        thread::spawn(move || {
            let options = HandlerOptions {
                // SAFETY: takes nothing and cannot fail.
                thread: unsafe { libc::gettid() } as u32,
                deadline: Duration::from_secs(30),
                policy: FailurePolicy::Poison,
                on_self_fault: SelfFault::Abort,
                pidfd: None,
                stack: None,
            };
            let handler = Handler::attach(guarded, options).unwrap();
            let mut random = Random::new(0);
            while !over.load(Ordering::Relaxed) {
                turn(&handler, area, &mut random, &answered);
            }
            handler.end(true, "the test is over").unwrap();
        })
    };

    let faulting = (1..=FAULTING).map(|seed| {
        elsewhere(move || {
            let mut random = Random::new(seed);
            for read in 0..READS {
                let page = random.below(PAGES);
                assert_eq!(area.word(page * PAGE / 8 + random.below(PAGE / 8)), page as u64 + 1);
                if seed == 1 && read.is_multiple_of(4) {
                    area.part(random.below(PAGES), 1).discard_here(Made::Private);
                }
            }
        })
    });
    for thread in faulting.collect::<Vec<_>>() {
        finish(&thread);
    }

    over.store(true, Ordering::Relaxed);
    answering.join().unwrap();
    assert!(answered.load(Ordering::Relaxed) > PAGES as u64, "pages that were given back fault again");
}
