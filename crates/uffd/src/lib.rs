//! userfaultfd(2) as the kernel gives it, with honest results: creation, registration, resolving, events,
//! liveness, descriptor passing. No threads, no policy, nothing of Node.
//!
//! It wraps the `userfaultfd` crate. What that crate gets wrong (the count of a refused COPY, the count of a
//! partial ZEROPAGE, interrupted reads, the descriptor of an unread FORK event) is issued here.

pub mod error;
pub mod event;
pub mod fd_passing;
mod fill;
mod ioctl;
pub mod liveness;
mod page;
mod userfaultfd;

pub use error::{AdoptError, Operation, UffdError};
pub use event::{Event, EventBuffer, Fault, FaultKind};
pub use fill::CopyOptions;
pub use page::page_size;
pub use userfaultfd::{Userfaultfd, Waiting};
