//! userfaultfd(2) as the kernel gives it, with honest results: creation, registration, resolving, events,
//! liveness, descriptor passing. No threads, no policy, nothing of Node.
//!
//! It wraps the `userfaultfd` crate. What that crate gets wrong (the count of a refused COPY, the count of a
//! partial ZEROPAGE, interrupted reads, the descriptor of an unread FORK event) is issued here.

mod deadline;
pub mod error;
pub mod event;
pub mod factory;
pub mod fd_passing;
mod features;
mod fill;
pub mod floor;
mod ioctl;
mod limits;
pub mod liveness;
mod mapping;
mod mapping_access;
mod mapping_advice;
mod mapping_options;
mod mapping_place;
mod ownership;
mod page;
pub mod pagemap;
mod process_memory;
pub mod regions;
mod registering;
mod registrations;
mod userfaultfd;
mod words;
mod zeros;

pub use error::{AdoptError, Operation, UffdError, errno_of};
pub use event::{Event, EventBuffer, Fault, FaultKind, Left, left_in};
pub use factory::{Backend, CreateError, CreateOptions, Factory, Faults, Supported};
pub use features::{Features, Ioctls, Modes};
pub use fill::{ContinueOptions, CopyOptions, MoveOptions};
pub use limits::limit_behind;
pub use mapping::Mapping;
pub use mapping_advice::{Collapsed, Populate, Residency};
pub use mapping_options::{
    AnonymousOptions, FileAccess, FileOptions, MappingError, MappingKind, MemfdOptions, Pages,
    transparent_huge_page_size,
};
pub use page::page_size;
pub use userfaultfd::{Origin, Userfaultfd, Waiting};
pub use words::Words;
