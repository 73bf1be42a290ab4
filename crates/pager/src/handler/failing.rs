//! The failure policy of a handler.

use std::time::Duration;

use uffd::UffdError;

use super::Handler;
use crate::handler_queue::OpenFault;
use crate::last_words::say;
use crate::policy::FailurePolicy;

/// Tries to poison while the address space is changing: first those that only yield, then one a millisecond.
const YIELDS: u32 = 100;
const PATIENCE: u32 = 2000;

impl Handler {
    /// What becomes of a fault that nobody answers. Its waiters never get zeros.
    pub(super) fn apply_policy(&self, fault: &OpenFault, why: &str) {
        if self.options.policy == FailurePolicy::Kill {
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
            // Whoever changes it has to run again.
            match round < YIELDS {
                true => std::thread::yield_now(),
                false => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        act()
    }
}
