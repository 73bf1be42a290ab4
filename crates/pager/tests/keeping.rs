//! Pagers that are killed, and others that go on where they were.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

#[path = "keeping/basics.rs"]
mod basics;
#[path = "keeping/connections.rs"]
mod connections;
#[path = "keeping/damaged.rs"]
mod damaged;
#[path = "keeping/ending.rs"]
mod ending;
#[path = "support/handshakes.rs"]
mod handshakes;
#[path = "keeping/kills.rs"]
mod kills;
#[path = "keeping/kinds.rs"]
mod kinds;
#[path = "keeping/left.rs"]
mod left;
#[path = "keeping/memory.rs"]
mod memory;

/// Not a test: what a pager process runs (see `support/kept.rs`).
#[test]
fn pager_process() {
    support::kept::inside::run_if_asked("pager_process");
}
