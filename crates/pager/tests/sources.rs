//! Where pages come from: every kind of source behind real faults, and everything a source can do wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod sources {
    pub(crate) mod asked;
    pub(crate) mod cached;
    mod changed;
    pub(crate) mod failing;
    pub(crate) mod kinds;
    pub(crate) mod zeros;
}
mod support;
