//! The words between a client and the daemon: JSON-RPC 2.0, one object a line. `docs/protocol.md` is about them.
//!
//! Members that are not known are passed over, in both directions: a version to come may have more.

use pager::SOURCE_TIMEOUT;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What this speaks. Raised only for changes that an older client could not live with.
pub(crate) const PROTOCOL: u64 = 1;

/// JSON-RPC's own codes.
pub(crate) const PARSE_ERROR: i64 = -32700;
pub(crate) const INVALID_REQUEST: i64 = -32600;
pub(crate) const METHOD_NOT_FOUND: i64 = -32601;
pub(crate) const INVALID_PARAMS: i64 = -32602;
/// Ours: `data` has a code of this package (`ERR_UFFD_*`).
pub(crate) const FAILED: i64 = -32000;

/// A request; without `id` nobody waits for its answer.
#[derive(Debug, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: Option<Value>,
    pub(crate) method: String,
    #[serde(default)]
    pub(crate) params: Value,
    /// Descriptors that rode with the line (an addition to JSON-RPC).
    #[serde(default)]
    pub(crate) fds: usize,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Hello {
    pub(crate) protocol: u64,
    /// Names the client over connections: what it has opened is found by it again.
    pub(crate) client: String,
    /// Sessions of which it wants to hear how they ended, if they have.
    #[serde(default)]
    pub(crate) sessions: Vec<u64>,
    /// Sources that it still has. Absent where it does not say so: then it may have all of them.
    pub(crate) sources: Option<Vec<u64>>,
    /// It writes recordings to their files.
    #[serde(default)]
    pub(crate) recordings: bool,
}

/// An address. Numbers of JSON are not exact for all of them in every language.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Address(pub(crate) u64);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        u64::from_str_radix(digits, 16).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RegionParams {
    pub(crate) address: Address,
    pub(crate) length: u64,
    pub(crate) source_offset: u64,
    pub(crate) memfd_offset: Option<u64>,
}

/// How memory is served, whosever it is. Times are milliseconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Serving {
    #[serde(default)]
    pub(crate) on_failure: Policy,
    pub(crate) window: Option<u64>,
    #[serde(default)]
    pub(crate) mode: Mode,
    #[serde(default)]
    pub(crate) collapse: bool,
    #[serde(default = "source_timeout")]
    pub(crate) source_timeout: u64,
    pub(crate) record: Option<Record>,
    /// What is to be replayed, packed in a memfd: its position.
    pub(crate) replay: Option<usize>,
    /// The same as this daemon has numbered it, for the next; whatever a client says is not looked at.
    pub(crate) plan: Option<u64>,
    /// Likewise whose program has asked for this.
    pub(crate) client_uid: Option<u32>,
}

/// Where faults are recorded to.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Record {
    /// What the client will call the file: a word to the daemon.
    pub(crate) path: String,
    /// What tells the image from others, in 64 hexadecimal digits.
    pub(crate) identity: String,
}

fn source_timeout() -> u64 {
    SOURCE_TIMEOUT.as_millis() as u64
}

/// What happens when memory cannot be served; with a time limit in milliseconds where it has one.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Policy {
    #[default]
    Poison,
    Kill,
    Hold {
        timeout: Option<u64>,
    },
    /// The client is asked.
    Ask {
        timeout: u64,
    },
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    #[default]
    Windows,
    Fill,
    HugeFill,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RestParams {
    #[default]
    Poison,
    Populate,
    Zero,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Adopt {
    pub(crate) source: u64,
    pub(crate) regions: Vec<RegionParams>,
    pub(crate) page_size: u64,
    /// Positions of descriptors among those of the line.
    pub(crate) uffd: usize,
    pub(crate) pidfd: Option<usize>,
    /// The memory is the client's own.
    #[serde(default)]
    pub(crate) own: bool,
    pub(crate) memfd: Option<usize>,
    #[serde(flatten)]
    pub(crate) serving: Serving,
    #[serde(default = "yes")]
    pub(crate) missing: bool,
    #[serde(default)]
    pub(crate) write_protect: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listen {
    /// The listening socket, by its position.
    #[serde(default)]
    pub(crate) socket: usize,
    /// What it serves, in words for whoever looks at it later.
    pub(crate) image: Option<String>,
    /// Absent where each process is asked about (`asking`).
    pub(crate) source: Option<u64>,
    #[serde(flatten)]
    pub(crate) serving: Serving,
    pub(crate) peer_uid: Option<u32>,
    pub(crate) handshake_timeout: u64,
    pub(crate) max_sessions: usize,
}

/// A server that is there already, and how it serves from now on.
#[derive(Debug, Deserialize)]
pub(crate) struct Attach {
    pub(crate) server: u64,
    #[serde(flatten)]
    pub(crate) listen: Listen,
}

/// Where bytes come from; positions of descriptors are those of the line.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Description {
    /// A file or block device; `direct` is the same, opened with `O_DIRECT`. `size`: what it had when it was opened first.
    File {
        fd: usize,
        path: String,
        direct: Option<usize>,
        #[serde(default, rename = "mayChange")]
        may_change: bool,
        size: Option<u64>,
    },
    Zero {
        size: u64,
    },
    /// The bytes of a memfd, taken when it is opened.
    Memory {
        fd: usize,
    },
    Layered {
        base: u64,
        diffs: Vec<Diff>,
    },
    /// Offset and length of each overlay, whose bytes are one after the other in a memfd.
    Overlay {
        base: u64,
        places: Vec<(u64, usize)>,
        fd: usize,
    },
    /// The client itself.
    #[serde(rename_all = "camelCase")]
    Callback {
        size: u64,
        chunk: usize,
        concurrency: usize,
        cache_bytes: usize,
    },
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Diff {
    pub(crate) fd: usize,
    pub(crate) path: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct OpenSource {
    pub(crate) source: u64,
    /// A [`Description`], kept as it came.
    pub(crate) description: Value,
}

#[derive(Debug, Deserialize)]
pub(crate) struct CloseSource {
    pub(crate) source: u64,
    /// Nobody answers any more; else sessions that have it go on.
    #[serde(default)]
    pub(crate) ended: bool,
}

/// The answer of a client's source: bytes in a memfd (the line's only descriptor), or why there are none.
#[derive(Debug, Deserialize)]
pub(crate) struct SourceAnswer {
    pub(crate) source: u64,
    pub(crate) request: u64,
    pub(crate) error: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct OfSession {
    pub(crate) session: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ReadRecording {
    pub(crate) session: u64,
    pub(crate) offset: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RecordingDone {
    pub(crate) session: u64,
    /// Whether there is a file now.
    pub(crate) written: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Close {
    pub(crate) session: u64,
    #[serde(default)]
    pub(crate) rest: RestParams,
}

#[derive(Debug, Deserialize)]
pub(crate) struct PopulateParams {
    pub(crate) session: u64,
    /// What it is given up by.
    pub(crate) request: u64,
    /// Address and bytes of each range; everything where absent.
    pub(crate) ranges: Option<Vec<(Address, u64)>>,
    pub(crate) rate: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct CancelPopulate {
    pub(crate) session: u64,
    pub(crate) request: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TakeDirty {
    pub(crate) session: u64,
    pub(crate) most: usize,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Resume {
    pub(crate) session: u64,
    /// Another source from now on.
    pub(crate) source: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Decide {
    pub(crate) session: u64,
    pub(crate) policy: Policy,
}

/// What the process of a question gets, or why it gets nothing.
#[derive(Debug, Deserialize)]
pub(crate) struct AnswerParams {
    pub(crate) session: u64,
    pub(crate) source: Option<u64>,
    pub(crate) error: Option<String>,
    /// Its code, where it has one.
    pub(crate) code: Option<String>,
    #[serde(flatten)]
    pub(crate) serving: Serving,
}

#[derive(Debug, Deserialize)]
pub(crate) struct OfServer {
    pub(crate) server: u64,
    #[serde(default)]
    pub(crate) rest: RestParams,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct Shutdown {
    #[serde(default)]
    pub(crate) rest: RestParams,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Upgrade {
    /// Its absolute path, as the holder sees it.
    pub(crate) executable: String,
}
