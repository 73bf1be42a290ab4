//! A bounded pool for reads that can block: the event loop never waits for a disk.
//!
//! Workers only read. They hand the bytes back to the event loop, which looks at the page's state again before
//! it installs anything: a page that was discarded while its data was on the way is not filled with it, and no
//! lock is needed to know that. Reads for waiting faults go before reads in the background, always.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::PagerError;
use crate::source::{PageSource, panicked};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, thread};

/// How long stopping waits for a read that is under way. A thread stuck on a dead disk is then left behind:
/// it holds only its source and its buffer.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Whether a thread is waiting for these bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// A faulting thread sleeps until they are there.
    Demand,
    /// Nobody waits yet.
    Background,
}

/// One read.
#[derive(Debug)]
pub(crate) struct Job {
    /// The session it is for.
    pub(crate) session: u64,
    /// Which of the session's reads: an answer that comes after it was given up belongs to no other.
    pub(crate) number: u64,
    /// The pages that the bytes belong to.
    pub(crate) pages: Range<usize>,
    /// Where the first byte is in the source.
    pub(crate) offset: u64,
    /// Filled by the read; exactly as long as the pages.
    pub(crate) buffer: Vec<u8>,
    /// What is read.
    pub(crate) source: Arc<dyn PageSource>,
}

/// A finished read.
#[derive(Debug)]
pub(crate) struct Completion {
    /// The read; its buffer is filled if `result` says so.
    pub(crate) job: Job,
    /// Whether the bytes are good.
    pub(crate) result: Result<(), PagerError>,
}

/// Where finished reads go.
pub(crate) type Deliver = Arc<dyn Fn(Completion) + Send + Sync>;

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    background: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Threads that read in the background.
    background_running: usize,
    stopping: bool,
}

struct Shared {
    queues: Mutex<Queues>,
    changed: Condvar,
    deliver: Deliver,
    /// How many threads may read in the background at one time: the others are there for whoever waits.
    most_background: usize,
}

/// The pool. Threads are started when there is work for them and stay until it is dropped.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    most_threads: usize,
}

impl Workers {
    pub(crate) fn new(most_threads: usize, deliver: Deliver) -> Self {
        let most_threads = most_threads.max(1);
        let most_background = (most_threads - most_threads / 5).min(most_threads.saturating_sub(1)).max(1);
        let shared = Shared { queues: Mutex::default(), changed: Condvar::new(), deliver, most_background };
        Self { shared: Arc::new(shared), most_threads }
    }

    /// Where finished reads go, for those that are finished elsewhere.
    pub(crate) fn deliver(&self) -> Deliver {
        Arc::clone(&self.shared.deliver)
    }

    /// Queues a read. The caller bounds how many are under way.
    ///
    /// # Errors
    ///
    /// The job itself, when no thread could be started for it and none is running.
    pub(crate) fn submit(&self, job: Job, urgency: Urgency) -> Result<(), Job> {
        let mut queues = self.shared.lock();
        let waiting = queues.demand.len() + queues.background.len();
        if queues.idle <= waiting && queues.threads < self.most_threads {
            let shared = Arc::clone(&self.shared);
            match thread::Builder::new().name("uffd-worker".into()).spawn(move || shared.work()) {
                Ok(_) => queues.threads += 1,
                Err(_) if queues.threads == 0 => return Err(job),
                // The threads there are will come to it.
                Err(_) => {}
            }
        }
        match urgency {
            Urgency::Demand => queues.demand.push_back(job),
            Urgency::Background => queues.background.push_back(job),
        }
        drop(queues);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Somebody waits by now for what was to be read in the background.
    pub(crate) fn promote(&self, session: u64, pages: &Range<usize>) {
        let mut queues = self.shared.lock();
        let is_it = |job: &Job| job.session == session && job.pages == *pages;
        if let Some(job) =
            queues.background.iter().position(is_it).and_then(|index| queues.background.remove(index))
        {
            queues.demand.push_back(job);
            drop(queues);
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut queues = self.shared.lock();
        queues.stopping = true;
        queues.demand.clear();
        queues.background.clear();
        self.shared.changed.notify_all();
        let deadline = Instant::now() + STOP_DEADLINE;
        while queues.threads > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            queues = self
                .shared
                .changed
                .wait_timeout(queues, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(guard, _)| guard);
        }
    }
}

impl Shared {
    /// Nothing is left half-done under this lock, so a panic elsewhere does not spoil what it guards.
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some((mut job, urgency)) = self.next() {
            let source = Arc::clone(&job.source);
            let read = std::panic::AssertUnwindSafe(|| source.read(job.offset, &mut job.buffer));
            let result = std::panic::catch_unwind(read).unwrap_or_else(|_| Err(panicked()));
            if urgency == Urgency::Background {
                self.lock().background_running -= 1;
                // There may be one more, for a thread that found none allowed.
                self.changed.notify_one();
            }
            (self.deliver)(Completion { job, result });
        }
    }

    fn next(&self) -> Option<(Job, Urgency)> {
        let mut queues = self.lock();
        loop {
            if queues.stopping {
                queues.threads -= 1;
                self.changed.notify_all();
                return None;
            }
            if let Some(job) = queues.demand.pop_front() {
                return Some((job, Urgency::Demand));
            }
            if queues.background_running < self.most_background
                && let Some(job) = queues.background.pop_front()
            {
                queues.background_running += 1;
                return Some((job, Urgency::Background));
            }
            queues.idle += 1;
            queues = self.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
            queues.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::ReadNow;
    use crate::sync::{check, mpsc};

    /// A source whose first byte comes only when the test lets it.
    #[derive(Debug)]
    struct Gated {
        gate: Mutex<mpsc::Receiver<()>>,
    }

    impl PageSource for Gated {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
            Ok(ReadNow::WouldBlock)
        }
        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
            if offset == 0 {
                self.gate.lock().unwrap().recv().unwrap();
            }
            assert_ne!(offset, 4096, "a source that panics");
            buffer.fill(9);
            Ok(())
        }
    }

    fn job(source: &Arc<Gated>, page: usize) -> Job {
        let source: Arc<dyn PageSource> = Arc::<Gated>::clone(source);
        Job {
            session: 1,
            number: 0,
            pages: page..page + 1,
            offset: page as u64 * 4096,
            buffer: vec![0; 4096],
            source,
        }
    }

    fn pool(threads: usize) -> (Workers, mpsc::Receiver<Completion>, mpsc::Sender<()>, Arc<Gated>) {
        let (open, gate) = mpsc::channel();
        let (done, completions) = mpsc::channel();
        let done = Mutex::new(done);
        let deliver: Deliver = Arc::new(move |completion| drop(done.lock().unwrap().send(completion)));
        (Workers::new(threads, deliver), completions, open, Arc::new(Gated { gate: Mutex::new(gate) }))
    }

    #[test]
    fn a_read_somebody_waits_for_goes_before_background_reads_queued_earlier() {
        check(|| {
            let (workers, completions, open, source) = pool(1);
            workers.submit(job(&source, 0), Urgency::Demand).unwrap();
            for page in 2..5 {
                workers.submit(job(&source, page), Urgency::Background).unwrap();
            }
            workers.submit(job(&source, 9), Urgency::Demand).unwrap();

            open.send(()).unwrap();

            let order: Vec<usize> = completions.iter().take(5).map(|done| done.job.pages.start).collect();
            assert_eq!(order, [0, 9, 2, 3, 4]);
        });
    }

    #[test]
    fn a_background_read_that_somebody_begins_to_wait_for_goes_before_the_others() {
        check(|| {
            let (workers, completions, open, source) = pool(1);
            workers.submit(job(&source, 0), Urgency::Demand).unwrap();
            for page in 2..5 {
                workers.submit(job(&source, page), Urgency::Background).unwrap();
            }
            workers.promote(1, &(4..5));
            // Not this session's, and not queued.
            workers.promote(2, &(3..4));
            workers.promote(1, &(9..10));

            open.send(()).unwrap();

            let order: Vec<usize> = completions.iter().take(4).map(|done| done.job.pages.start).collect();
            assert_eq!(order, [0, 4, 2, 3]);
        });
    }

    #[test]
    fn a_source_that_panics_is_an_error_and_the_pool_goes_on() {
        check(|| {
            let (workers, completions, _open, source) = pool(1);

            workers.submit(job(&source, 1), Urgency::Demand).unwrap();
            workers.submit(job(&source, 2), Urgency::Demand).unwrap();

            assert!(matches!(completions.recv().unwrap().result, Err(PagerError::Internal(_))));
            let good = completions.recv().unwrap();
            assert!(good.result.is_ok());
            assert_eq!(good.job.buffer, [9; 4096]);
        });
    }

    #[test]
    fn dropping_the_pool_ends_its_threads() {
        check(|| {
            let (workers, completions, _open, source) = pool(3);
            workers.submit(job(&source, 2), Urgency::Demand).unwrap();
            completions.recv().unwrap();
            let shared = Arc::downgrade(&workers.shared);

            drop(workers);

            assert!(shared.upgrade().is_none_or(|shared| shared.lock().threads == 0));
        });
    }
}
