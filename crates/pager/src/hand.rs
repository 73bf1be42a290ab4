//! A second thread for the event loop: it does a part of something while the loop does the other.
//!
//! What it is given is done before the loop goes on, or is given back: so it is, to everybody else, as if the loop itself had done it,
//! and nothing that belongs to the loop needs a lock. A thread that has not begun by the time the loop is done with its own part is not
//! waited for. One that has is, as long as one piece takes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::sync::{Arc, AtomicU8, Condvar, Mutex, MutexGuard, Ordering, PoisonError, look, thread};

/// How long the thread looks for another part before it sleeps: longer than it takes to wake it, so that it is there for the next one
/// if it came too late for this one.
const LOOK: Duration = Duration::from_micros(200);
/// How long the loop looks whether it is done before it sleeps.
const LOOK_FOR_END: Duration = Duration::from_micros(50);

/// A part, done with the thread's own buffer.
pub(crate) type Part<T> = Box<dyn FnOnce(&mut [u8]) -> T + Send>;

/// What became of a part.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome<T> {
    /// Nobody had begun with it. It is gone.
    NotBegun,
    /// It panicked.
    Panicked,
    Done(T),
}

enum Place<T> {
    Empty,
    Given(Part<T>),
    Begun,
    Over(Outcome<T>),
    Stop,
}

/// The same, to be looked at without the lock.
const EMPTY: u8 = 0;
const GIVEN: u8 = 1;
const BEGUN: u8 = 2;
const OVER: u8 = 3;
const STOP: u8 = 4;

struct Shared<T> {
    place: Mutex<Place<T>>,
    /// One of the two waits for the other, never both.
    changed: Condvar,
    glance: AtomicU8,
}

/// The thread, started when it is given the first part.
pub(crate) struct Hand<T: Send + 'static> {
    shared: Arc<Shared<T>>,
    buffer: usize,
    thread: Option<thread::JoinHandle<()>>,
}

impl<T: Send + 'static> Hand<T> {
    /// Its buffer has so many bytes.
    pub(crate) fn new(buffer: usize) -> Self {
        let shared =
            Shared { place: Mutex::new(Place::Empty), changed: Condvar::new(), glance: AtomicU8::new(EMPTY) };
        Self { shared: Arc::new(shared), buffer, thread: None }
    }

    /// Has `part` done, while this thread does `own`. What `own` came to, and what became of the part: by then nothing
    /// of it is left.
    pub(crate) fn beside<R>(&mut self, part: Part<T>, own: impl FnOnce() -> R) -> (R, Outcome<T>) {
        if !self.start() {
            return (own(), Outcome::NotBegun);
        }
        self.shared.put(Place::Given(part), GIVEN);
        let taking = Taking(&self.shared);
        let own = own();
        let outcome = taking.0.take_back();
        std::mem::forget(taking);
        (own, outcome)
    }

    fn start(&mut self) -> bool {
        if self.thread.is_none() {
            let (shared, buffer) = (Arc::clone(&self.shared), self.buffer);
            let begun = thread::Builder::new().name("uffd-hand".into()).spawn(move || shared.work(buffer));
            self.thread = begun.ok();
        }
        self.thread.is_some()
    }
}

impl<T: Send + 'static> Drop for Hand<T> {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.put(Place::Stop, STOP);
        // It has nothing to do, so that it comes to that at once; whether it panicked no longer matters.
        let _ = thread.join();
    }
}

/// Takes the part back in any case, so that nothing is done on behalf of a thread that has unwound.
struct Taking<'a, T>(&'a Shared<T>);

impl<T> Drop for Taking<'_, T> {
    fn drop(&mut self) {
        self.0.take_back();
    }
}

impl<T> Shared<T> {
    /// Nothing is left half-done under this lock.
    fn lock(&self) -> MutexGuard<'_, Place<T>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, place: Place<T>, glance: u8) {
        *self.lock() = place;
        self.glance.store(glance, Ordering::Release);
        self.changed.notify_one();
    }

    fn take_back(&self) -> Outcome<T> {
        let mut looked = false;
        let mut place = self.lock();
        loop {
            match std::mem::replace(&mut *place, Place::Empty) {
                Place::Begun => {
                    *place = Place::Begun;
                    if looked {
                        place = self.changed.wait(place).unwrap_or_else(PoisonError::into_inner);
                        continue;
                    }
                    looked = true;
                    drop(place);
                    look(LOOK_FOR_END, || self.glance.load(Ordering::Acquire) == OVER);
                    place = self.lock();
                }
                Place::Over(outcome) => return outcome,
                Place::Given(_) | Place::Empty | Place::Stop => return Outcome::NotBegun,
            }
        }
    }

    fn work(&self, buffer: usize) {
        let mut buffer = crate::staging::Staging::new(buffer);
        while let Some(part) = self.next() {
            let done = catch_unwind(AssertUnwindSafe(|| part(buffer.bytes())));
            self.put(Place::Over(done.map_or(Outcome::Panicked, Outcome::Done)), OVER);
        }
    }

    fn next(&self) -> Option<Part<T>> {
        let mut looked = false;
        let mut place = self.lock();
        loop {
            match std::mem::replace(&mut *place, Place::Empty) {
                Place::Given(part) => {
                    *place = Place::Begun;
                    self.glance.store(BEGUN, Ordering::Release);
                    return Some(part);
                }
                Place::Stop => return None,
                other => *place = other,
            }
            if !looked {
                looked = true;
                drop(place);
                look(LOOK, || matches!(self.glance.load(Ordering::Acquire), GIVEN | STOP));
                place = self.lock();
                continue;
            }
            looked = false;
            place = self.changed.wait(place).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
