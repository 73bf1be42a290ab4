//! Serving page faults: sessions, page states, the event loop, sources, supervision, statistics.
//!
//! A [`Pager`] is one native thread that answers the faults of any number of processes. Usable from Rust alone;
//! nothing here knows Node.

mod address_map;
mod deferred;
mod error;
mod event_loop;
mod firecracker;
mod following;
mod guarded;
mod modes;
mod notice;
mod page_state;
mod pager;
mod policy;
mod resolve;
mod server;
mod session;
mod socket;
mod source;
mod stats;
mod supervise;
mod sweep;
mod tracking;
mod window;
mod workers;

pub use address_map::{AddressMap, Place, Region};
pub use error::PagerError;
pub use firecracker::{Handshake, parse_handshake};
pub use guarded::Guarded;
pub use modes::{MinorMemory, SessionModes};
pub use notice::{Notice, Observer};
pub use page_state::PageStates;
pub use pager::{Pager, PagerOptions, SessionOptions};
pub use policy::{EndReason, FailurePolicy, Rest, SessionEnd};
pub use server::ServerOptions;
pub use session::SessionInfo;
pub use source::{FileSource, PageSource, ReadNow};
pub use stats::{Stats, StatsSnapshot};
pub use supervise::Peer;
pub use tracking::{DeliverDirty, DirtyPages, DirtyRange, DirtyReply};
