//! What a pager costs that nobody asks for anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use uffd::{Mapping, MappingKind};

use support::{Bytes, PAGE, elsewhere, finish, image, serve};

const PAGES: usize = 2048;
/// From the last fault to when nothing may be done any more.
const SETTLING: Duration = Duration::from_millis(10);
/// For how long nothing may be done.
const IDLE: Duration = Duration::from_millis(300);

/// The pager's event loop: there is one pager in this program.
fn event_loop() -> PathBuf {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named =
        |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "uffd-pager");
    tasks.into_iter().find(named).unwrap()
}

/// Nanoseconds that a thread has run, and how often it was put on a CPU.
fn ran(task: &Path) -> (u64, u64) {
    let text = fs::read_to_string(task.join("schedstat")).unwrap();
    let numbers: Vec<u64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    (numbers[0], numbers[2])
}

/// Page after page, so fast that it is looked for the next before sleeping, where there are two CPUs. Then nothing.
#[test]
fn ten_milliseconds_after_the_last_fault_a_pager_does_nothing_at_all() {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let source = Arc::new(Bytes(image(PAGES)));
    let Some(served) = serve(mapping, source, |options| options.window = Some(PAGE as u64)) else { return };
    let event_loop = event_loop();
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || {
        let mut byte = [0];
        for page in 0..PAGES {
            mapping.read(page * PAGE, &mut byte).unwrap();
        }
    }));
    assert_eq!(served.info.stats.snapshot().faults, PAGES as u64);

    thread::sleep(SETTLING);
    let before = ran(&event_loop);
    thread::sleep(IDLE);

    assert_eq!(ran(&event_loop), before, "nanoseconds, and how often it ran");
    served.close();
}
