//! Serving page faults: sessions, page states, the event loop, sources, supervision, statistics.
//!
//! A [`Pager`] is one native thread that answers the faults of any number of processes. Usable from Rust alone;
//! nothing here knows Node.

mod address_map;
mod ahead;
mod announced;
mod cause;
mod collapse;
mod deferred;
mod detach;
mod error;
mod event_loop;
mod failing;
mod fill;
mod firecracker;
mod first_page;
mod following;
mod guarded;
mod hand;
mod handler;
mod handler_queue;
mod holding;
mod huge_fill;
mod in_two;
mod joining;
mod keep;
mod last_words;
mod latency;
mod left;
mod mailbox;
mod modes;
mod notice;
mod offer;
mod owed;
mod page_index;
mod page_state;
mod pager;
mod placement;
mod policy;
mod reading;
mod record;
mod replay;
mod resolve;
mod self_fault;
mod server;
mod session;
mod session_info;
mod socket;
mod source;
mod spin;
mod staging;
mod stats;
mod stopping;
mod supervise;
mod sweep;
mod sync;
mod taking_over;
mod touching;
mod trace;
mod tracking;
mod turn;
mod window;
mod workers;
mod zero_runs;

pub use address_map::{AddressMap, Place, Region};
pub use ahead::{DeliverPopulated, PopulateOptions};
pub use announced::Announced;
pub use cause::{Cause, code_of};
pub use error::PagerError;
pub use fill::{FillMode, FillOptions, Filled};
pub use firecracker::{Handshake, parse_handshake};
pub use guarded::Guarded;
pub use handler::{Answered, Handler, HandlerOptions, Joining, Run, WakeUp};
pub use handler_queue::{Area, Delivery, HandlerQueue, OpenFault};
pub use holding::Backing;
pub use keep::{Keeper, KeptConnection, KeptDescriptors, KeptSession, Successor};
pub use latency::{Histogram, LATENCY_BUCKETS, Latencies};
pub use left::LeftBehind;
pub use modes::{MinorMemory, SessionModes};
pub use notice::{Notice, Observer};
pub use page_state::PageStates;
pub use pager::{Pager, PagerOptions, Prepared, SOURCE_TIMEOUT, SessionOptions};
pub use placement::pin;
pub use policy::{EndReason, FailurePolicy, Hold, Rest, SessionEnd};
pub use replay::Replay;
pub use self_fault::SelfFault;
pub use server::{Image, Images, ServerOptions};
pub use session_info::SessionInfo;
pub use socket::Listener;
pub use source::{
    CacheOptions, CachedSource, FileOptions, FileSource, LayeredSource, LostSource, MappingSource,
    MemorySource, Overlay, OverlaySource, PageSource, ReadNow, RetryOptions, RetrySource, ZeroSource,
};
pub use source::{CallbackOptions, CallbackSource, Fetch, Fetcher, read_source};
pub use stats::{Stats, StatsSnapshot};
pub use supervise::Peer;
pub use touching::{Touched, touch};
pub use trace::{
    MOST_FAULTS, RecordTo, RecordedBytes, Recording, RecordingKeeper, RecordingState, Room, Trace, TraceEnd,
    TraceFault, TraceHeader, TraceKind, WorkingSet, write_whole,
};
pub use tracking::{DeliverDirty, DirtyPages, DirtyRange, DirtyReply};
