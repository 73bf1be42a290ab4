//! Signals that end the program while it serves other processes: what they do is put off until the memory of these has met its
//! policy. Natively, because a worker's JavaScript cannot listen for signals, because a blocked event loop must not keep a program
//! from ending, and because nobody who counts listeners is to see any.
//!
//! Where JavaScript listens for a signal, libuv's handler is in the place of this one, and the program decides. When the last of
//! its listeners goes, libuv leaves the default behind; `src/signals.ts` tells.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;

use libc::{c_int, sigaction};
use napi::{Env, Result};
use napi_derive::napi;

use crate::environment;
use crate::exiting;

/// Those whose default ends a program, without SIGUSR1 (Node's inspector), SIGPROF (V8's profiler), SIGPIPE and SIGXFSZ
/// (ignored by Node), SIGABRT and what else tells of a crash: its cause goes on to be there while it is put off.
const SIGNALS: [c_int; 11] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGXCPU,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// In the masks of handlers of this package, of any version: how one copy of it knows another's. libuv and Node have all signals
/// in theirs.
const MARKS: [c_int; 2] = [45, 59];

#[derive(Default)]
struct Guarding {
    /// How often an environment has said that it serves others: two copies of this package may be in one.
    environments: HashMap<usize, usize>,
    /// What was there before, of each signal.
    before: HashMap<c_int, sigaction>,
    /// The thread that does what a handler of signals may not.
    thread: Option<JoinHandle<()>>,
}

static GUARDING: Mutex<Option<Guarding>> = Mutex::new(None);

/// The last signal that came.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// Threads that are to end.
static STOPS: AtomicUsize = AtomicUsize::new(0);

/// It can be posted in a handler of signals, and takes no descriptor.
struct Semaphore(UnsafeCell<MaybeUninit<libc::sem_t>>);
// SAFETY: initialised once, before anybody has it; the functions that take it are made for many threads.
unsafe impl Sync for Semaphore {}
static WAKE: Semaphore = Semaphore(UnsafeCell::new(MaybeUninit::uninit()));
static WAKE_IS_THERE: Once = Once::new();

impl Semaphore {
    fn get(&self) -> *mut libc::sem_t {
        self.0.get().cast()
    }

    fn post(&self) {
        // SAFETY: initialised before a handler was installed or a thread started; fails only where it is full.
        unsafe { libc::sem_post(self.get()) };
    }
}

extern "C" fn caught(signal: c_int) {
    CAUGHT.store(signal, Ordering::SeqCst);
    WAKE.post();
}

/// Only whole values are put in and taken out under this lock; a handler of signals never takes it.
fn lock() -> MutexGuard<'static, Option<Guarding>> {
    GUARDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This environment serves other processes, or serves them no more.
#[napi(catch_unwind)]
pub fn guard_signals(env: &Env, serves: bool) -> Result<()> {
    let id = environment::of(env)?;
    if serves {
        let mut guarding = lock();
        let guarding = guarding.get_or_insert_default();
        *guarding.environments.entry(id).or_default() += 1;
        guarding.install();
    } else {
        leave(id, 1);
    }
    Ok(())
}

/// Somebody has stopped listening: the default may be there again.
#[napi(catch_unwind)]
pub fn rearm_signals() {
    if let Some(guarding) = lock().as_mut().filter(|guarding| !guarding.environments.is_empty()) {
        guarding.install();
    }
}

/// An environment has ended.
pub(crate) fn forget(id: usize) {
    leave(id, usize::MAX);
}

fn leave(id: usize, times: usize) {
    let thread = lock().as_mut().and_then(|guarding| guarding.leave(id, times));
    // Not under the lock, which it takes itself.
    if let Some(thread) = thread {
        let _ = thread.join();
    }
}

impl Guarding {
    /// The thread, where it ends.
    fn leave(&mut self, id: usize, times: usize) -> Option<JoinHandle<()>> {
        let left = self.environments.get_mut(&id)?;
        *left = left.saturating_sub(times);
        if *left > 0 {
            return None;
        }
        self.environments.remove(&id);
        if self.environments.is_empty() { self.uninstall() } else { None }
    }

    fn install(&mut self) {
        WAKE_IS_THERE.call_once(|| {
            // SAFETY: nobody else has it yet.
            unsafe { libc::sem_init(WAKE.get(), 0, 0) };
        });
        if self.thread.is_none() {
            self.thread = std::thread::Builder::new().name("uffd-signals".into()).spawn(wait).ok();
        }
        // Without a thread, a signal does what it did before.
        for signal in SIGNALS.into_iter().filter(|_| self.thread.is_some()) {
            if let Some(now) = action_of(signal).filter(ends_the_program)
                && set(signal, &ours())
            {
                self.before.insert(signal, now);
            }
        }
    }

    fn uninstall(&mut self) -> Option<JoinHandle<()>> {
        // Where another copy is in front of this one, it will give the signal back to it.
        self.before.retain(|&signal, before| !restore(signal, before));
        let thread = self.thread.take_if(|_| self.before.is_empty())?;
        STOPS.fetch_add(1, Ordering::SeqCst);
        WAKE.post();
        Some(thread)
    }
}

fn handler() -> libc::sighandler_t {
    caught as extern "C" fn(c_int) as *const () as libc::sighandler_t
}

fn ours() -> sigaction {
    let mut action = default_action();
    action.sa_sigaction = handler();
    action.sa_flags = libc::SA_RESTART;
    for mark in MARKS {
        // SAFETY: a mask that is there, and a signal that there is.
        unsafe { libc::sigaddset(&raw mut action.sa_mask, mark) };
    }
    action
}

fn default_action() -> sigaction {
    // SAFETY: all zeros is a `sigaction`: the default, no flags, an empty mask.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn action_of(signal: c_int) -> Option<sigaction> {
    let mut now = default_action();
    // SAFETY: valid for the call, which fills it.
    let asked = unsafe { sigaction(signal, std::ptr::null(), &raw mut now) };
    (asked == 0).then_some(now)
}

fn set(signal: c_int, action: &sigaction) -> bool {
    // SAFETY: valid for the call; a handler of ours only does what a handler may, any other is given back as it was.
    unsafe { sigaction(signal, action, std::ptr::null_mut()) == 0 }
}

/// Nobody listens. There is the default; or what Node has of its own for SIGINT and SIGTERM, which resets the terminal, once, and
/// ends; or another copy of this package.
fn ends_the_program(action: &sigaction) -> bool {
    let has = |signal| {
        // SAFETY: a mask that is there, and a signal that there is.
        unsafe { libc::sigismember(&raw const action.sa_mask, signal) == 1 }
    };
    match action.sa_sigaction {
        // The first process of a container does not hear of these at all.
        libc::SIG_DFL => !is_first(),
        libc::SIG_IGN => false,
        other if other == handler() => false,
        _ => action.sa_flags & libc::SA_RESETHAND != 0 || (MARKS.into_iter().all(has) && !has(libc::SIGTERM)),
    }
}

/// Whether this is the first process of its namespace, which no signal ends that it does not listen for.
fn is_first() -> bool {
    std::process::id() == 1
}

/// Puts back what was there. Whether it could: somebody else may have taken the place of a default, or be in front of it.
fn restore(signal: c_int, before: &sigaction) -> bool {
    match action_of(signal) {
        Some(now) if now.sa_sigaction == handler() => set(signal, before),
        Some(now) => now.sa_sigaction == libc::SIG_DFL || !ends_the_program(&now),
        None => true,
    }
}

fn wait() {
    let mut done = false;
    loop {
        // SAFETY: initialised before this thread was started.
        if unsafe { libc::sem_wait(WAKE.get()) } != 0 {
            continue;
        }
        let signal = CAUGHT.swap(0, Ordering::SeqCst);
        if signal == 0 {
            let stop = STOPS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |stops| stops.checked_sub(1));
            if stop.is_ok() {
                return;
            }
            continue;
        }
        exiting::abandoning(|| {
            let before = lock().as_ref().and_then(|guarding| guarding.before.get(&signal).copied());
            // Two copies may each have been in front of the other.
            let before = before.filter(|_| !done).unwrap_or_else(default_action);
            done = true;
            restore(signal, &before);
            // More of them came meanwhile: none ends the program in the middle, and one is enough.
            CAUGHT.store(0, Ordering::SeqCst);
            let process = std::process::id().cast_signed();
            // SAFETY: sends a signal to this process, and touches nothing.
            unsafe { libc::kill(process, signal) };
            if is_first() {
                // That was passed over, and what was served is gone: to go on would be to serve nobody.
                // SAFETY: ends the process without running anything of it.
                unsafe { libc::_exit(128 + signal) };
            }
        });
    }
}
