//! Pagers that are killed, and others that go on where they were.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

#[path = "keeping/basics.rs"]
mod basics;

/// Not a test: what a pager process runs (see `support/kept.rs`).
#[test]
fn pager_process() {
    support::kept::run_if_asked("pager_process");
}
