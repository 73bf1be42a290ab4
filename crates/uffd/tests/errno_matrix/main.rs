//! What the kernel answers to every wrong (and some right) use, as tables: each row makes the real call on memory of
//! its own and says what must come of it, classified. A row that differs on the running kernel is named, not hidden.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod arguments;
mod collapse;
mod copy;
mod gone;
mod handshake;
mod hugetlb;
mod memory;
mod minor;
mod moving;
mod outputs;
mod poison;
mod poll;
mod read;
mod register;
mod scan;
mod tables;
mod world;
mod write_protect;
mod zeropage;

#[path = "../processes/mod.rs"]
mod processes;
#[path = "../support/mod.rs"]
mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};

use hugetlb::Pool;
use processes::alone;
use support::DEADLINE;
use tables::{Row, Stop, answer_as_recorded, answer_within};
use world::dead;

/// One table at a time. Others would map something where a row has unmapped a page; and starting a process holds the
/// descriptors of rows for a moment, so that closing one would not end what it has registered.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rows on threads of this process.
fn in_process(rows: Vec<Row>) {
    let _turn = turn();
    // The one fork of this process, and before the first row: the pages of rows are shared with nobody.
    if dead().is_some() {
        answer_as_recorded(rows);
    }
}

/// With exactly one free page in the pool.
fn huge_pages(size: usize) {
    let _turn = turn();
    if dead().is_none() {
        return;
    }
    match Pool::with(size, 1) {
        // A busy machine copies 1 GiB for seconds.
        Ok(_pool) => answer_within(6 * DEADLINE, hugetlb::rows(size)),
        Err(Stop::Skipped(reason)) => println!("skipped: {reason}"),
        Err(stop) => panic!("{stop:?}"),
    }
}

/// Rows that fork, or change the whole process: in one of its own.
fn apart(test: &str, rows: impl FnOnce() -> Vec<Row>) {
    let _turn = turn();
    alone(test, || answer_as_recorded(rows()));
}

#[test]
fn the_handshake_is_answered_as_recorded() {
    in_process(handshake::rows());
}

#[test]
fn arguments_of_every_ioctl_are_answered_as_recorded() {
    in_process(arguments::rows());
}

#[test]
fn register_unregister_and_wake_answer_as_recorded() {
    in_process(register::rows());
}

#[test]
fn every_kind_of_memory_registers_as_recorded() {
    in_process(memory::rows());
}

#[test]
fn copy_answers_as_recorded() {
    in_process(copy::rows());
}

#[test]
fn zeropage_answers_as_recorded() {
    in_process(zeropage::rows());
}

#[test]
fn poison_answers_as_recorded() {
    in_process(poison::rows());
}

#[test]
fn continue_answers_as_recorded() {
    in_process(minor::rows());
}

#[test]
fn write_protect_answers_as_recorded() {
    in_process(write_protect::rows());
}

#[test]
fn collapse_answers_as_recorded() {
    in_process(collapse::rows());
}

#[test]
fn move_answers_as_recorded() {
    in_process(moving::rows());
}

#[test]
fn read_answers_as_recorded() {
    in_process(read::rows());
}

#[test]
fn poll_answers_as_recorded() {
    in_process(poll::rows());
}

#[test]
fn outputs_of_the_filling_ioctls_are_as_recorded() {
    in_process(outputs::rows());
}

#[test]
fn pagemap_scan_answers_as_recorded() {
    in_process(scan::rows());
}

#[test]
fn huge_pages_of_2_mib_answer_as_recorded() {
    huge_pages(2 << 20);
}

#[test]
fn huge_pages_of_1_gib_answer_as_recorded() {
    huge_pages(1 << 30);
}

#[test]
fn the_uffd_of_a_process_that_is_gone_answers_as_recorded() {
    apart("the_uffd_of_a_process_that_is_gone_answers_as_recorded", gone::rows);
}

#[test]
fn what_is_shared_with_a_child_answers_as_recorded() {
    apart("what_is_shared_with_a_child_answers_as_recorded", || {
        let [moving, poison] = [moving::rows_with_a_child(), poison::rows_with_a_child()];
        let [collapse, scan] = [collapse::rows_with_a_child(), scan::rows_with_a_child()];
        [moving, poison, collapse, scan].into_iter().flatten().collect()
    });
}

#[test]
fn limits_of_the_process_answer_as_recorded() {
    apart("limits_of_the_process_answer_as_recorded", || {
        let rows = [register::rows_at_the_limit(), read::rows_at_the_limit()];
        rows.into_iter().flatten().collect()
    });
}
