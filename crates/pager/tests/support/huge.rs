//! The pool of huge pages, which all tests of a machine share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::area::Area;

pub const HUGE: usize = 2 << 20;

/// Where huge pages may be mapped.
pub static AREAS: Mutex<Vec<Area>> = Mutex::new(Vec::new());

/// Huge pages of 2 MiB that a test may use, given back when dropped; one test has them at a time.
pub struct HugePages {
    before: Option<String>,
    _turn: MutexGuard<'static, ()>,
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

impl HugePages {
    /// `count` free ones, or a printed reason why not.
    pub fn reserve(count: usize) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |name: &str| -> usize {
            let text = std::fs::read_to_string(format!("{POOL}/{name}")).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        // What is promised to somebody is not free.
        let free = || number("free_hugepages").saturating_sub(number("resv_hugepages"));
        let mut pool = Self { before: None, _turn: turn };
        if free() < count {
            let before = number("nr_hugepages");
            let wanted = before + count - free();
            if let Err(error) = std::fs::write(format!("{POOL}/nr_hugepages"), wanted.to_string()) {
                println!("skipped: no {count} free huge pages of 2 MiB, and no more can be had: {error}");
                return None;
            }
            pool.before = Some(before.to_string());
        }
        let free = free();
        if free < count {
            println!("skipped: {free} huge pages of 2 MiB could be had, {count} are needed");
            return None;
        }
        Some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Nobody uses them any more: the test is over, and its pager was dropped before this.
        for area in AREAS.lock().unwrap().drain(..) {
            // SAFETY: the area's own memory, to which no reference exists.
            unsafe { libc::munmap(area.ptr(), area.len()) };
        }
        if let Some(before) = &self.before {
            std::fs::write(format!("{POOL}/nr_hugepages"), before).unwrap();
        }
    }
}
