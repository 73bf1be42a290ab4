//! FORK events: a fork is told to every userfaultfd of the process that asked for it, so these tests run one at a time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};

use uffd::{Event, EventBuffer, Features, Mapping, Modes, Userfaultfd};

use support::{DEADLINE, events, finish, fork_and_exit, registered};

const M: Modes = Modes::MISSING;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn forking(features: Features) -> Option<(Userfaultfd, Mapping)> {
    registered(1, M, Features::EVENT_FORK | features)
}

#[test]
fn a_fork_gives_a_descriptor_of_the_childs_memory_with_the_parents_features() {
    let _alone = alone();
    let Some((uffd, _mapping)) = forking(Features::THREAD_ID) else { return };
    let pid = fork_and_exit();

    let Event::Fork { child } = events(&uffd, 1).remove(0) else { panic!("no FORK event") };

    finish(&pid);
    assert_eq!(child.enabled_features(), uffd.enabled_features());
    assert!(child.is_dead());
    assert!(!uffd.is_dead());
}

#[test]
fn the_descriptor_of_a_fork_nobody_took_is_closed() {
    let _alone = alone();
    let Some((uffd, _mapping)) = forking(Features::empty()) else { return };
    let pid = fork_and_exit();
    let mut buffer = EventBuffer::new(4);
    let until = std::time::Instant::now() + DEADLINE;
    while uffd.read_events(&mut buffer).unwrap() == 0 {
        assert!(std::time::Instant::now() < until);
    }
    finish(&pid);
    let before = userfaultfds();

    drop(buffer);

    assert_eq!(userfaultfds() + 1, before);
    drop(uffd);
}

/// Userfaultfds open in this process: those of the one test that runs.
fn userfaultfds() -> usize {
    let links = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.as_os_str() == "anon_inode:[userfaultfd]").count()
}
