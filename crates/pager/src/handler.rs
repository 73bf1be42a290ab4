//! A userfaultfd whose faults are answered outside of this crate, on one thread: JavaScript's.
//!
//! That thread reads messages and answers faults. What must not depend on it is done by the guard's thread: reading what has
//! stayed unread, deadlines, faults of the answering thread itself, and noticing that the process is gone.
//!
//! An answer looks at what is known of the fault and then acts, both inside the gate, where the guard reads nothing. The
//! kernel refuses to install anything while a message of the address space is unread; so memory that was removed before the
//! ioctl is known to be removed, and memory that is removed after it takes the page along.

use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uffd::liveness::PidFd;
use uffd::{Event, EventBuffer, UffdError, Userfaultfd, page_size};

use crate::error::PagerError;
use crate::guarded::{Guarded, Watcher};
use crate::handler_queue::{Area, Delivery, HandlerQueue, OpenFault};
use crate::policy::FailurePolicy;
use crate::self_fault::{self, SelfFault, Suspect};
use crate::spin::{Look, Spin, let_others_run};
use crate::supervise::{Supervised, check_policy};

pub use batch::{Joining, Run};

mod batch;
mod failing;

/// Messages of one read.
const MESSAGES: usize = 256;
/// Looks of the guard between two questions whether the process is still there.
const LIVENESS: u64 = 10;

/// How faults are handled.
pub struct HandlerOptions {
    /// Id of the thread that answers.
    pub thread: u32,
    /// How long a fault may stay unanswered, from the moment it is read.
    pub deadline: Duration,
    /// What becomes of faults that are not answered.
    pub policy: FailurePolicy,
    /// What becomes of faults of the answering thread.
    pub on_self_fault: SelfFault,
    /// The process, where it is another one and may be killed.
    pub pidfd: Option<PidFd>,
    /// Has the answering thread write its stack and end the program as soon as it runs again; whether it could be asked.
    pub stack: Option<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl HandlerOptions {
    /// Makes sure that the policy can be kept, while there is time to do something about it.
    ///
    /// # Errors
    ///
    /// [`PagerError::NoRight`] names the right.
    pub fn check(&self, uffd: &Userfaultfd) -> Result<(), PagerError> {
        match &self.pidfd {
            Some(process) => check_policy(self.policy, Some(process), uffd),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for HandlerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerOptions").field("thread", &self.thread).finish_non_exhaustive()
    }
}

/// A descriptor to be polled: readable from the time it is rung until it is cleared.
#[derive(Debug)]
pub struct WakeUp(EventFd);

impl WakeUp {
    fn new() -> std::io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Makes it readable.
    pub fn ring(&self) {
        // A full counter is readable as well.
        let _ = self.0.write(1);
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        // Nothing to read where it was not rung.
        let _ = self.0.read();
    }
}

impl AsFd for WakeUp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an answer came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// The page is there, with so many bytes behind it; or it was there already (0).
    Done(u64),
    /// The address space is changing: it will be delivered again.
    Later,
    /// Too late: it was answered before, its memory went, or its time was up.
    Stale,
    /// The kernel refuses; the fault is still open.
    Failed(UffdError),
}

/// See the module.
#[derive(Debug)]
pub struct Handler {
    guarded: Arc<Guarded>,
    options: HandlerOptions,
    process: Option<Supervised>,
    state: Mutex<State>,
    /// Readable when there is something to deliver that the userfaultfd itself does not show.
    wake: Arc<WakeUp>,
    /// Counts what the answering thread does.
    turns: AtomicU64,
    looks: AtomicU64,
    gone: AtomicBool,
    own: bool,
}

#[derive(Debug)]
struct State {
    queue: HandlerQueue,
    buffer: EventBuffer,
    suspect: Suspect,
    /// Whether others are let run before it is said that there is nothing.
    spin: Spin,
}

impl Handler {
    /// Takes over the messages of a userfaultfd. It is nonblocking from then on.
    ///
    /// # Errors
    ///
    /// EBUSY when it has a handler already; else when no thread or descriptor is to be had.
    pub fn attach(guarded: Arc<Guarded>, mut options: HandlerOptions) -> std::io::Result<Arc<Self>> {
        let flags = OFlag::from_bits_retain(fcntl(&**guarded, FcntlArg::F_GETFL)?);
        fcntl(&**guarded, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let state = State {
            queue: HandlerQueue::new(page_size() as u64, Instant::now()),
            buffer: EventBuffer::new(MESSAGES),
            suspect: Suspect::default(),
            spin: Spin::new(),
        };
        let handler = Arc::new(Self {
            own: guarded.is_of_this_process(),
            guarded,
            process: options.pidfd.take().map(Supervised::new),
            options,
            state: Mutex::new(state),
            wake: Arc::new(WakeUp::new()?),
            turns: AtomicU64::new(0),
            looks: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        });
        handler.guarded.attach(Arc::<Self>::clone(&handler))?;
        Ok(handler)
    }

    /// Gives the messages up. Whatever is open is nobody's from then on.
    pub fn detach(&self) {
        self.guarded.detach();
    }

    /// Readable when there is something to deliver that the userfaultfd itself does not show.
    #[must_use]
    pub fn wake(&self) -> &Arc<WakeUp> {
        &self.wake
    }

    /// Which memory has larger pages.
    pub fn set_areas(&self, areas: Vec<Area>) {
        self.lock().queue.set_areas(areas);
    }

    /// Only whole steps are taken under this lock. The answering thread may allocate under it, so the guard never waits
    /// for it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the messages that are there, as far as there is room, and hands out at most `most` deliveries and, behind them,
    /// faults. Never waits.
    ///
    /// # Errors
    ///
    /// When the descriptor has become something else, or has none left for a forked child. Reading can go on.
    pub fn deliver(
        &self,
        most: usize,
        mut take: impl FnMut(Delivery),
        mut take_fault: impl FnMut(&OpenFault),
    ) -> Result<usize, UffdError> {
        // This thread alone writes it.
        self.turns.store(self.turns.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        let now = Instant::now();
        let mut state = self.lock();
        state.queue.unpark(now);
        let mut read = self.read(&mut state, now);
        if read.is_ok() && !state.queue.has_deliveries() && state.spin.is_due() {
            drop(state);
            let look = let_others_run(now);
            state = self.lock();
            read = self.read(&mut state, now);
            let hit = state.queue.has_deliveries();
            state.spin.looked(if hit { look } else { Look::Miss });
        }
        let mut count = 0;
        while count < most {
            let Some(delivery) = state.queue.deliver() else { break };
            if let Delivery::Event(Event::Fork { child }) = &delivery {
                child.inherit(&self.guarded);
            }
            take(delivery);
            count += 1;
        }
        while count < most
            && let Some(fault) = state.queue.deliver_fault()
        {
            take_fault(&fault);
            count += 1;
        }
        drop(state);
        match read {
            Err(error) if count == 0 => Err(error),
            _ => Ok(count),
        }
    }

    fn read(&self, state: &mut State, now: Instant) -> Result<(), UffdError> {
        let State { queue, buffer, .. } = state;
        while queue.room() >= MESSAGES {
            let count = self.guarded.take_events(MESSAGES, buffer, |event| queue.push(event, now))?;
            // The kernel had no more when it gave fewer than there was room for.
            if count < MESSAGES && !self.guarded.has_kept() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// When a fault that was put off is due; now, where there is something to deliver.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        let now = Instant::now();
        let mut state = self.lock();
        let next = state.queue.unpark(now);
        if state.queue.has_deliveries() {
            return Some(Duration::ZERO);
        }
        next.map(|due| due.saturating_duration_since(now))
    }

    /// Faults that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.lock().queue.open()
    }

    /// Answers a fault that was delivered. `act` gets the userfaultfd and the fault; it fills or wakes its page.
    pub fn answer(
        &self,
        id: u64,
        act: impl FnOnce(&Userfaultfd, &OpenFault) -> Result<u64, UffdError>,
    ) -> Answered {
        let gate = self.guarded.gate();
        let answered = self.answer_in_gate(id, act);
        drop(gate);
        answered
    }

    fn answer_in_gate(
        &self,
        id: u64,
        act: impl FnOnce(&Userfaultfd, &OpenFault) -> Result<u64, UffdError>,
    ) -> Answered {
        let Some(fault) = self.known(id) else { return Answered::Stale };
        let result = act(&self.guarded, &fault);
        if self.guarded.was_forced() && self.known(id).is_none() {
            return Answered::Stale;
        }
        let wakes = !matches!(result, Ok(_) | Err(UffdError::PartiallyCopied { .. }));
        let mut state = self.lock();
        let answered = settle(&mut state.queue, &fault, result);
        drop(state);
        // Neither the kernel nor an operation that was refused has woken anybody.
        if wakes && matches!(answered, Answered::Done(_)) {
            fault.wake(&self.guarded);
        }
        answered
    }

    /// A fault that is to be answered, as of all messages that have been read.
    fn known(&self, id: u64) -> Option<OpenFault> {
        self.current().queue.given(id)
    }

    /// The state as of all messages that have been read.
    fn current(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        if self.guarded.has_kept() {
            self.take_kept(&mut state, Instant::now());
        }
        state
    }

    fn take_kept(&self, state: &mut State, now: Instant) {
        let queue = &mut state.queue;
        while queue.room() >= MESSAGES {
            if self.guarded.take_kept(MESSAGES, |event| queue.push(event, now)) == 0 {
                return;
            }
        }
    }

    /// Puts a fault off: it is delivered again after a pause. Whether it was there to be put off.
    pub fn defer(&self, id: u64) -> bool {
        self.lock().queue.park(id, Instant::now())
    }

    /// Applies a failure policy to a fault that was delivered; whether it was still open.
    pub fn fail(&self, id: u64, why: &str, policy: FailurePolicy) -> bool {
        let _gate = self.guarded.gate();
        let Some(fault) = self.known(id) else { return false };
        self.lock().queue.close(id);
        self.apply(policy, &fault, why);
        true
    }

    /// Whether the process whose memory it is has gone. As of some 100 ms ago.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Whether it is this very process that faults.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// A fault of the thread that answers. It is looked at again if it is still there, and comes back if it is not.
    fn look_at_own(&self, state: &mut State, now: Instant) {
        while let Some(fault) = state.queue.take_of_thread(self.options.thread) {
            if !state.suspect.is_again(&fault) {
                fault.wake(&self.guarded);
                continue;
            }
            self.answer_own(state, &fault);
        }
        // Without thread ids: nobody has taken a turn, and the thread sleeps in a fault.
        let turns = self.turns.load(Ordering::Relaxed);
        if let Some((0, since)) = state.queue.oldest_unseen()
            && self.is_own()
            && state.suspect.is_stuck(turns, now.duration_since(since), self.options.thread)
            && let Some(fault) = state.queue.take_unseen()
        {
            self.answer_own(state, &fault);
        }
    }

    fn answer_own(&self, state: &mut State, fault: &OpenFault) {
        if self.options.on_self_fault == SelfFault::Zero {
            self_fault::give_zeros(&self.guarded, fault);
            return state.queue.tell(Delivery::SelfFault(*fault));
        }
        let area = state.queue.area_of(fault.address);
        self_fault::end(&self.guarded, fault, area, self.options.thread, self.options.stack.as_deref());
    }
}

/// What an operation on a fault came to, and what becomes of the fault. Done, but not done by the operation: who waits is to be
/// woken.
fn settle(queue: &mut HandlerQueue, fault: &OpenFault, result: Result<u64, UffdError>) -> Answered {
    if let Ok(done) = result {
        queue.close(fault.id);
        return Answered::Done(done);
    }
    let done = match result {
        Ok(done) | Err(UffdError::PartiallyCopied { done }) => done,
        // The kernel leaves its waiters asleep.
        Err(UffdError::PageExist) => 0,
        // Memory that went: whoever waits looks again, and finds that out.
        Err(UffdError::NotRegistered) if fault.is_removed() => 0,
        Err(UffdError::Changing) => {
            queue.park(fault.id, Instant::now());
            return Answered::Later;
        }
        Err(error) => return Answered::Failed(error),
    };
    queue.close(fault.id);
    Answered::Done(done)
}

impl Deref for Handler {
    type Target = Guarded;

    fn deref(&self) -> &Guarded {
        &self.guarded
    }
}

impl Watcher for Handler {
    fn look(&self) {
        let now = Instant::now();
        let looks = self.looks.fetch_add(1, Ordering::Relaxed);
        let Ok(mut state) = self.state.try_lock() else { return };
        if self.guarded.has_kept() {
            self.take_kept(&mut state, now);
        }
        self.look_at_own(&mut state, now);
        // Not while one is being answered: the next look comes soon.
        if let Ok(_gate) = self.guarded.try_gate() {
            while let Some(fault) = state.queue.expire(now, self.options.deadline) {
                self.apply_policy(&fault, "nobody answered its fault in time");
                state.queue.tell(Delivery::Expired(fault));
            }
        }
        let mut news = state.queue.has_deliveries();
        drop(state);
        if looks.is_multiple_of(LIVENESS) && !self.is_own() && !self.is_gone() && self.guarded.is_dead() {
            self.gone.store(true, Ordering::Relaxed);
            news = true;
        }
        if news {
            self.wake.ring();
        }
    }
}
