//! What the test suites of other userfaultfd libraries assert, asserted of this one: the cases that no other test here
//! covers already, by the library they are known from.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod crosvm;
mod go_userfaultfd;
mod userfaultfd_rs;

#[path = "../processes/mod.rs"]
mod processes;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use uffd::Mapping;

/// A thread that reads one byte, or waits for its page.
fn reader(mapping: &Arc<Mapping>, offset: u64) -> Receiver<u8> {
    let mapping = Arc::clone(mapping);
    support::elsewhere(move || {
        let mut byte = [0];
        mapping.read(offset as usize, &mut byte).unwrap();
        byte[0]
    })
}
