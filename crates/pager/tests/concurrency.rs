//! What threads of a pager share, run by a model in which every lock, wait and message is a point where another thread may go
//! on: the pool of workers and the mailbox, from the very source files that the pager is made of.
//!
//! The counters of a session are not here: one thread adds to each, and nobody draws conclusions from two of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]
#![allow(dead_code, reason = "the model uses a part of the files")]

#[path = "../src/hand.rs"]
mod hand;
#[path = "../src/mailbox.rs"]
mod mailbox;
#[path = "../src/staging.rs"]
mod staging;
#[path = "../src/workers.rs"]
mod workers;

/// The files' own words for what they use of the crate.
mod error {
    pub(crate) use pager::PagerError;
}
mod source {
    pub(crate) use pager::{PageSource, ReadNow};

    pub(crate) fn panicked() -> pager::PagerError {
        pager::PagerError::Internal("a source panicked".to_owned())
    }
}

/// In the place of the pager's: the model's.
mod sync {
    pub(crate) use shuttle::sync::atomic::{AtomicU8, Ordering};
    pub(crate) use shuttle::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
    pub(crate) use shuttle::thread;
    pub(crate) use std::sync::PoisonError;

    const ORDERS: usize = 2000;

    /// Looks twice; how long that takes means nothing here.
    pub(crate) fn look(_: std::time::Duration, is: impl Fn() -> bool) {
        for _ in 0..2 {
            if is() {
                return;
            }
            thread::yield_now();
        }
    }

    /// Runs it in many orders of its threads, the same ones every time.
    pub(crate) fn check(test: impl Fn() + Send + Sync + 'static) {
        let scheduler = shuttle::scheduler::PctScheduler::new_from_seed(7, 3, ORDERS / 2);
        let test = Arc::new(test);
        let again = Arc::clone(&test);
        shuttle::Runner::new(scheduler, shuttle::Config::default()).run(move || test());
        let scheduler = shuttle::scheduler::RandomScheduler::new_from_seed(7, ORDERS / 2);
        shuttle::Runner::new(scheduler, shuttle::Config::default()).run(move || again());
    }

    /// An eventfd, as far as it matters here: a count that can be waited for.
    #[derive(Default)]
    pub(crate) struct Bell {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Bell {
        pub(crate) fn ring(&self) {
            *self.rung.lock().unwrap() = true;
            self.changed.notify_all();
        }

        pub(crate) fn silence(&self) {
            *self.rung.lock().unwrap() = false;
        }

        /// As epoll does: returns at once when it has rung and was not silenced.
        pub(crate) fn wait(&self) {
            let mut rung = self.rung.lock().unwrap();
            while !*rung {
                rung = self.changed.wait(rung).unwrap();
            }
        }
    }
}

use hand::{Hand, Outcome};
use mailbox::Mailbox;
use pager::{PageSource, PagerError, ReadNow};
use sync::{Arc, Bell, Mutex, check, mpsc, thread};
use workers::{Deliver, Job, Urgency, Workers};

#[test]
fn no_message_is_left_lying_by_a_loop_that_sleeps() {
    check(|| {
        let (mailbox, inbox) = Mailbox::new(Bell::default());
        let senders: Vec<_> = (0..3)
            .map(|sender| {
                let mailbox = mailbox.clone();
                thread::spawn(move || (0..2).for_each(|number| mailbox.send((sender, number))))
            })
            .collect();
        let mut next = [0; 3];
        // A message whose ring is lost would leave this waiting for ever, which the model reports.
        while next != [2; 3] {
            inbox.bell().wait();
            inbox.silence();
            while let Some((sender, number)) = inbox.take() {
                assert_eq!(number, next[sender], "in the order sent");
                next[sender] += 1;
            }
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

#[derive(Debug)]
struct Ready;

impl PageSource for Ready {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        thread::yield_now();
        buffer.fill(offset as u8);
        Ok(())
    }
}

fn job(page: usize) -> Job {
    Job {
        session: 1,
        number: 0,
        pages: page..page + 1,
        offset: page as u64,
        buffer: vec![0; 8],
        source: Arc::new(Ready),
    }
}

fn pool(threads: usize) -> (Workers, mpsc::Receiver<usize>) {
    let (done, completions) = mpsc::channel();
    let done = Mutex::new(done);
    let deliver = move |completion: workers::Completion| {
        assert!(completion.result.is_ok());
        assert_eq!(completion.job.buffer, [completion.job.offset as u8; 8]);
        let _ = done.lock().unwrap().send(completion.job.pages.start);
    };
    (Workers::new(threads, deliver_from(deliver)), completions)
}

fn deliver_from(deliver: impl Fn(workers::Completion) + Send + Sync + 'static) -> Deliver {
    Arc::from(Box::new(deliver) as Box<dyn Fn(workers::Completion) + Send + Sync>)
}

#[test]
fn every_read_is_done_once_whoever_asks_and_however_many_threads_there_are() {
    for threads in [1, 2, 3] {
        check(move || {
            let (workers, completions) = pool(threads);
            let workers = Arc::new(workers);
            let askers: Vec<_> = (0..2)
                .map(|asker| {
                    let workers = Arc::clone(&workers);
                    thread::spawn(move || {
                        workers.submit(job(2 * asker), Urgency::Demand).unwrap();
                        workers.submit(job(2 * asker + 1), Urgency::Background).unwrap();
                    })
                })
                .collect();
            askers.into_iter().for_each(|asker| asker.join().unwrap());
            let mut pages: Vec<usize> = (0..4).map(|_| completions.recv().unwrap()).collect();
            pages.sort_unstable();
            assert_eq!(pages, [0, 1, 2, 3]);
            drop(workers);
            assert!(completions.recv().is_err(), "nothing is done twice, and no thread is left");
        });
    }
}

#[test]
fn dropping_the_pool_in_the_middle_of_reads_waits_for_its_threads() {
    check(|| {
        let (workers, completions) = pool(2);
        for page in 0..3 {
            workers.submit(job(page), Urgency::Demand).unwrap();
        }
        drop(workers);
        let done: Vec<usize> = completions.iter().collect();
        assert!(done.len() <= 3, "{done:?}");
    });
}

#[test]
fn a_part_is_done_or_was_never_begun_when_the_loop_goes_on() {
    check(|| {
        let mut hand = Hand::new(4);
        for number in 0..3_usize {
            let steps = Arc::new(Mutex::new(0));
            let taken = Arc::clone(&steps);
            let part = move |buffer: &mut [u8]| {
                *taken.lock().unwrap() += 1;
                thread::yield_now();
                *taken.lock().unwrap() += 1;
                buffer.len() + number
            };
            let (own, outcome) = hand.beside(Box::new(part), || {
                thread::yield_now();
                number
            });
            assert_eq!(own, number);
            match outcome {
                Outcome::Done(value) => assert_eq!((value, *steps.lock().unwrap()), (4 + number, 2)),
                Outcome::NotBegun => assert_eq!(*steps.lock().unwrap(), 0),
                Outcome::Panicked => panic!("it did not"),
            }
        }
        // A thread that was not told to stop would leave this waiting for ever, which the model reports.
        drop(hand);
    });
}
