//! The peer against a receiver that is written here with raw system calls, so that neither side can hide a
//! mistake of the other. Every wait has a deadline; a test that fails kills the peer it started.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of tests say what they expect by panicking, too"
)]

mod command_line;
mod commands;
mod handshake;
mod paging;
mod support;
