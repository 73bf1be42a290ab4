//! The end of a handler, and the failure policy that nobody's faults meet.

use std::time::{Duration, Instant};

use uffd::UffdError;

use super::Handler;
use crate::handler_queue::OpenFault;
use crate::last_words::say;
use crate::policy::FailurePolicy;

/// Tries to poison while the address space is changing, or others have not run yet: first those that only yield, then one a millisecond.
const YIELDS: u32 = 100;
const PATIENCE: u32 = 2000;

impl Handler {
    /// Nobody answers any more. What is open meets the failure policy, and what is missing is poisoned, or left to become
    /// zeros; then it is nobody's memory but its owner's again.
    ///
    /// # Errors
    ///
    /// Where the kernel cannot poison: everything is as it was.
    pub fn end(&self, poison: bool, why: &str) -> Result<(), UffdError> {
        if poison && !self.is_gone() {
            let waiting = self.guarded.waiting().map_or(0, |waiting| waiting.total);
            if self.is_own() && waiting > 0 {
                say(format_args!("{why}: pages that {waiting} threads wait for are poisoned"));
            }
            self.guarded.poison_missing()?;
            if self.guarded.origin().is_none() {
                self.fail_waiting(why);
            }
        }
        while let Some(fault) = self.take_open() {
            match poison && fault.is_write_protect() {
                true => self.apply_policy(&fault, why),
                false => fault.wake(&self.guarded),
            }
        }
        match self.guarded.unregister_all() {
            Ok(()) | Err(UffdError::UffdClosed) => {}
            Err(error) => return Err(error),
        }
        self.detach();
        Ok(())
    }

    fn take_open(&self) -> Option<OpenFault> {
        self.lock().queue.take_any()
    }

    /// What becomes of a fault that nobody answers. Its waiters never get zeros.
    pub(super) fn apply_policy(&self, fault: &OpenFault, why: &str) {
        self.apply(self.options.policy, fault, why);
    }

    /// As [`Handler::apply_policy`]. Another process that is not known cannot be killed.
    pub(super) fn apply(&self, policy: FailurePolicy, fault: &OpenFault, why: &str) {
        if policy == FailurePolicy::Kill && (self.is_own() || self.process.is_some()) {
            return self.kill(fault, why);
        }
        if self.is_own() {
            say(format_args!("the page at {:#x} of this process is poisoned: {why}", fault.page));
        }
        let poisoned = match fault.is_write_protect() {
            // The page is there: what must not be written cannot be made unreadable.
            true => return self.kill(fault, "a write to a protected page cannot be made to fail"),
            false => self.settled(|| self.guarded.poison(fault.page, fault.page_size, true)),
        };
        match poisoned {
            Ok(()) => {}
            // There by now, or not memory any more, or nobody's: whoever waits looks again.
            Err(UffdError::PageExist | UffdError::NotRegistered | UffdError::UffdClosed) => {
                fault.wake(&self.guarded);
            }
            Err(_) => self.kill(fault, "the kernel cannot poison (Linux 6.6 can)"),
        }
    }

    /// Every thread that waits meets the policy. What was registered before the userfaultfd came here is not known; its faults
    /// tell.
    pub(super) fn fail_waiting(&self, why: &str) {
        for round in 0..PATIENCE {
            let mut state = self.lock();
            // What cannot be read now is looked for again below.
            let _ = self.read(&mut state, Instant::now());
            drop(state);
            while let Some(fault) = self.take_open() {
                self.apply_policy(&fault, why);
            }
            if self.guarded.waiting().map_or(0, |waiting| waiting.total) == 0 {
                return;
            }
            pause(round);
        }
    }

    fn kill(&self, fault: &OpenFault, why: &str) {
        match &self.process {
            // Where that is not permitted it goes on waiting: zeros are worse.
            Some(process) => drop(process.kill()),
            None if self.is_own() => {
                say(format_args!("the page at {:#x} of this process cannot be served: {why}", fault.page));
                std::process::abort();
            }
            None => {}
        }
    }

    /// Repeats what is refused while the address space is changing, for as long as the guard may be away.
    fn settled(&self, act: impl Fn() -> Result<(), UffdError>) -> Result<(), UffdError> {
        for round in 0..PATIENCE {
            match act() {
                Err(UffdError::Changing) => self.guarded.read_unread(),
                result => return result,
            }
            pause(round);
        }
        act()
    }
}

/// Lets whoever is waited for run.
fn pause(round: u32) {
    match round < YIELDS {
        true => std::thread::yield_now(),
        false => std::thread::sleep(Duration::from_millis(1)),
    }
}
