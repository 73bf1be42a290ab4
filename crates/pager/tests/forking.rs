//! Forked children of a served process: sessions of their own, which begin with their parent's pages as they are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use nix::sys::wait::WaitStatus;
use pager::{EndReason, FileSource, Notice, Pager, PagerOptions, Rest, ServerOptions, SessionInfo};
use uffd::{Features, Modes, fd_passing};

use support::area::{Area, Gated, Made, Serving, all_events, ended, new_uffd, register, serve_area, started};
use support::children::{Steps, fork, fork_raw, turn};
use support::huge::HugePages;
use support::{Bytes, DEADLINE, PAGE, finish, image, told};

const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

/// Memory being served by a session that follows forks, one page at a time.
fn serving(made: Made, pages: usize) -> Option<(Area, Vec<u8>, Serving)> {
    let uffd = new_uffd(all_events() | Features::EVENT_FORK)?;
    let area = Area::new(made, pages);
    register(&uffd, area, Modes::MISSING);
    let bytes = image(area.len() / PAGE);
    let served = serve_area(uffd, area, Arc::new(Bytes(bytes.clone())), |options| {
        options.window = Some(options.page_size);
    });
    Some((area, bytes, served))
}

/// The session of a child that was just forked, and of nobody else.
fn child_of(notices: &Receiver<Notice>, parent: u64) -> Arc<SessionInfo> {
    let info = started(notices);
    assert_eq!((info.parent, info.peer.pid), (Some(parent), 0));
    info
}

fn word(area: Area, page: usize) -> u64 {
    u64::from_ne_bytes(area.part(page, 1).read()[..8].try_into().unwrap())
}

fn a_child_is_served(made: Made) {
    let Some((area, bytes, served)) = serving(made, 6) else { return };
    let source = |page: usize| bytes[page * area.page..(page + 1) * area.page].to_vec();
    assert!(area.part(0, 2).read()[..] == bytes[..2 * area.page]);
    area.part(1, 1).write(b"written!");
    area.part(2, 1).discard(made);
    let steps = Steps::new();
    let wait = steps.waiter();

    let act = move || {
        // Page 0 was there, page 1 written to, page 2 discarded, the others missing.
        let right = area.holds(0, 0) && area.zero(2) && area.holds(3, 3);
        wait();
        // What the parent did since is the parent's.
        let right = right && area.holds(0, 0) && area.holds(4, 4);
        let discarded = area.part(5, 1).discard_raw();
        wait();
        i32::from(!(right && discarded && area.zero(5) && area.holds(4, 4)))
    };
    // SAFETY: touches memory and makes bare system calls.
    let child = unsafe { fork(act) };
    let info = child_of(&served.notices, served.id);
    assert_eq!(info.regions, served.info.regions);
    area.part(0, 1).write(b"parent's");
    area.part(4, 1).discard(made);
    steps.step();
    assert!(area.part(4, 1).is_zero());
    assert!(area.part(5, 1).read() == source(5));
    steps.step();

    assert_eq!(child.exit_code(), 0);
    assert_eq!(ended(&served.notices, info.id).reason, EndReason::PeerExited);
    assert!(area.part(3, 1).read() == source(3));
    assert_eq!(&area.part(1, 1).read()[..8], b"written!");
    served.close(Rest::Poison);
}

#[test]
fn a_forked_child_and_its_parent_are_served_apart() {
    let _turn = turn();
    a_child_is_served(Made::Private);
}

#[test]
fn a_forked_child_and_its_parent_are_served_apart_on_huge_pages() {
    let _turn = turn();
    let Some(_pool) = HugePages::reserve(16) else { return };
    a_child_is_served(Made::Huge);
}

#[test]
fn a_child_forked_while_bytes_are_on_the_way_gets_them_too() {
    let _turn = turn();
    let Some(uffd) = new_uffd(all_events() | Features::EVENT_FORK) else { return };
    let area = Area::new(Made::Private, 4);
    register(&uffd, area, Modes::MISSING);
    let source = Gated::new(image(4));
    let served = serve_area(uffd, area, Arc::<Gated>::clone(&source), |_| {});
    let shut = source.shut();
    let waits = area.part(1, 1).peek();
    served.until("the read has begun", |stats| stats.worker_reads == 1);

    // SAFETY: touches memory only.
    let child = unsafe { fork(move || i32::from(!(0..4).all(|page| area.holds(page, page)))) };
    let info = child_of(&served.notices, served.id);
    // Removed in the parent, and only there.
    area.part(2, 1).discard(Made::Private);
    drop(shut);

    assert_eq!(child.exit_code(), 0);
    assert_eq!(ended(&served.notices, info.id).reason, EndReason::PeerExited);
    assert!(finish(&waits).unwrap() == image(4)[PAGE..2 * PAGE]);
    assert!(area.part(2, 1).is_zero());
    served.close(Rest::Poison);
}

#[test]
fn a_grandchild_is_served_like_its_parent() {
    let _turn = turn();
    let Some((area, _, served)) = serving(Made::Private, 4) else { return };

    let act = move || {
        if !area.holds(0, 0) {
            return 1;
        }
        if fork_raw(|| area.holds(0, 0) && area.holds(1, 1)) && area.holds(2, 2) { 0 } else { 2 }
    };
    // SAFETY: touches memory and makes bare system calls.
    let child = unsafe { fork(act) };

    let of_child = child_of(&served.notices, served.id);
    let of_grandchild = child_of(&served.notices, of_child.id);
    assert_eq!(child.exit_code(), 0);
    let mut over = vec![of_child.id, of_grandchild.id];
    while !over.is_empty() {
        let Notice::SessionEnded { id, end } = served.notices.recv_timeout(DEADLINE).unwrap() else {
            continue;
        };
        assert_eq!(end.reason, EndReason::PeerExited);
        over.retain(|&waited| waited != id);
    }
    served.close(Rest::Poison);
}

#[test]
fn a_child_that_calls_exec_ends_its_session() {
    let _turn = turn();
    let Some((area, _, served)) = serving(Made::Private, 4) else { return };
    let steps = Steps::new();
    let wait = steps.waiter();

    let act = move || {
        wait();
        let path = c"/bin/sleep".as_ptr();
        let arguments = [path, c"1000".as_ptr(), std::ptr::null()];
        // SAFETY: both lists live across the call and end with a null pointer.
        unsafe { libc::execve(path, arguments.as_ptr(), [std::ptr::null()].as_ptr()) };
        1
    };
    // SAFETY: makes bare system calls with what lives for ever.
    let child = unsafe { fork(act) };
    let info = child_of(&served.notices, served.id);
    steps.step();

    assert_eq!(ended(&served.notices, info.id).reason, EndReason::PeerExited);
    assert!(area.part(1, 1).read() == image(4)[PAGE..2 * PAGE]);
    drop(child);
    served.close(Rest::Poison);
}

#[test]
fn a_child_forked_while_its_parent_is_being_closed_never_reads_zeros() {
    let _turn = turn();
    let pages = 64 * 1024;
    let Some((area, _, served)) = serving(Made::Private, pages) else { return };
    let steps = Steps::new();
    let wait = steps.waiter();

    served.pager.close_session(served.id, Rest::Poison);
    let act = move || {
        wait();
        i32::from(area.zero(pages - 1))
    };
    // SAFETY: touches memory and makes bare system calls.
    let child = unsafe { fork(act) };
    assert_eq!(ended(&served.notices, served.id).reason, EndReason::Closed);
    steps.step();

    let status = child.wait();
    assert!(matches!(status, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGBUS, _)), "{status:?}");
}

#[test]
fn one_child_too_many_is_poisoned_by_name_and_its_parent_goes_on() {
    let _turn = turn();
    let Some(uffd) = new_uffd(all_events() | Features::EVENT_FORK) else { return };
    let area = Area::new(Made::Private, 4);
    register(&uffd, area, Modes::MISSING);
    let dir = tempfile::tempdir().unwrap();
    let (image_path, socket_path) = (dir.path().join("image"), dir.path().join("socket"));
    std::fs::write(&image_path, image(4)).unwrap();
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let options = ServerOptions {
        window: Some(PAGE as u64),
        handshake_timeout: DEADLINE,
        max_sessions: 2,
        ..ServerOptions::new(pager::Images::One(Arc::new(FileSource::open(&image_path).unwrap())))
    };
    let listener = pager::Listener::bind(&socket_path, None).unwrap();
    let server = pager.serve_firecracker(listener, options, observer);
    let socket = UnixStream::connect(&socket_path).unwrap();
    let hello = format!(
        r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":{PAGE},"page_size_kib":{PAGE}}}]"#,
        area.address,
        area.len()
    );
    fd_passing::send(std::os::fd::AsFd::as_fd(&socket), hello.as_bytes(), &[std::os::fd::AsFd::as_fd(&uffd)])
        .unwrap();
    let parent = started(&notices);
    // The descriptor is the pager's now; an idle one more changes nothing.
    let (steps, more) = (Steps::new(), Steps::new());
    let (wait, wait_more) = (steps.waiter(), more.waiter());

    let act = move || {
        wait();
        i32::from(!area.holds(1, 1))
    };
    // SAFETY: touches memory and makes bare system calls.
    let first = unsafe { fork(act) };
    let of_first = child_of(&notices, parent.id);
    let act = move || {
        wait_more();
        i32::from(!area.zero(1))
    };
    // SAFETY: as above.
    let second = unsafe { fork(act) };
    let of_second = child_of(&notices, parent.id);
    let end = ended(&notices, of_second.id);
    assert_eq!(end.reason, EndReason::Exhausted);
    assert!(end.error.unwrap().to_string().contains("all 2 sessions of this server (`maxSessions`)"));
    more.step();
    let status = second.wait();
    assert!(matches!(status, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGBUS, _)), "{status:?}");
    steps.step();
    assert_eq!(first.exit_code(), 0);
    assert_eq!(ended(&notices, of_first.id).reason, EndReason::PeerExited);
    assert!(area.part(1, 1).read() == image(4)[PAGE..2 * PAGE]);
    pager.close_server(server, Rest::Poison);
    assert_eq!(ended(&notices, parent.id).reason, EndReason::Closed);
}

/// What CRIU's `uffd-events` does to a task that is being restored lazily: every change of its memory there is, with its
/// contents checked after each.
fn every_event_in_a_child(made: Made) {
    let Some((area, _, served)) = serving(made, 8) else { return };
    let there = Area::reserve(area.page, 4);

    let act = move || {
        if !area.holds(0, 0) {
            return 1;
        }
        // mremap
        if area.part(0, 4).remap_raw(there, MOVE) != there.ptr() {
            return 2;
        }
        if !(0..4).all(|page| there.holds(page, page)) {
            return 3;
        }
        // munmap
        if !area.part(6, 2).unmap_raw() || !area.holds(5, 5) {
            return 4;
        }
        // MADV_DONTNEED
        if !there.part(1, 2).discard_raw() {
            return 5;
        }
        if !(there.holds(0, 0) && there.zero(1) && there.zero(2) && there.holds(3, 3)) {
            return 6;
        }
        // fork
        if fork_raw(|| area.holds(4, 4) && there.zero(2) && there.holds(3, 3)) { 0 } else { 7 }
    };
    // SAFETY: touches memory and makes bare system calls.
    let child = unsafe { fork(act) };

    child_of(&served.notices, served.id);
    assert_eq!(child.exit_code(), 0);
    assert!((0..8).all(|page| word(area, page) == u64::from_ne_bytes(first_word(page, area.page))));
    served.close(Rest::Poison);
}

fn first_word(page: usize, page_size: usize) -> [u8; 8] {
    support::word(page * page_size / 8).to_ne_bytes()
}

#[test]
fn a_task_that_forks_moves_unmaps_and_discards_finds_its_memory_right_each_time() {
    let _turn = turn();
    every_event_in_a_child(Made::Private);
}

#[test]
fn a_task_that_forks_moves_unmaps_and_discards_huge_pages_finds_them_right_each_time() {
    let _turn = turn();
    let Some(_pool) = HugePages::reserve(24) else { return };
    every_event_in_a_child(Made::Huge);
}

#[test]
fn a_pager_with_idle_children_sleeps() {
    let _turn = turn();
    let Some((_, _, served)) = serving(Made::Private, 4) else { return };
    let steps = Steps::new();
    let wait = steps.waiter();
    let act = move || {
        wait();
        0
    };
    // SAFETY: makes a bare system call.
    let child = unsafe { fork(act) };
    let info = child_of(&served.notices, served.id);
    let switches = || -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let is_pager = |path: &std::path::PathBuf| {
            std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "uffd-pager")
        };
        let status = |path: std::path::PathBuf| std::fs::read_to_string(path.join("status")).unwrap();
        let count = |status: String| -> u64 {
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
            line.split_whitespace().last().unwrap().parse().unwrap()
        };
        tasks.filter(is_pager).map(|path| count(status(path))).sum()
    };

    let before = switches();
    // Nothing happens: that is what is measured.
    assert!(served.notices.recv_timeout(Duration::from_millis(2500)).is_err());
    let woken = switches() - before;

    assert!((1..=6).contains(&woken), "woken {woken} times in 2.5 s");
    steps.step();
    assert_eq!(child.exit_code(), 0);
    assert_eq!(ended(&served.notices, info.id).reason, EndReason::PeerExited);
    served.close(Rest::Poison);
}
