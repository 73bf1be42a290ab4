//! Recordings of a session's working set: which faults there were, in which order, and what each of them brought.
//!
//! A recording names pages by their offset in the image, so that it fits every process that is served from a copy of it,
//! wherever its memory lies. `format.rs` is the file, `tools.rs` makes recordings of recordings, `identity.rs` tells images
//! apart, `recorder.rs` notes what a running session does, and `writing.rs` writes it: to a file, or where there may be none, to memory
//! (`in_memory.rs`).

mod format;
mod identity;
mod in_memory;
mod recorder;
mod tools;
mod writing;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use uffd::errno_of;

use crate::error::PagerError;
use crate::replay::Replay;
use crate::source::PageSource;

pub use in_memory::{RecordedBytes, RecordingKeeper, Room};
pub use recorder::{RecordTo, Recording, RecordingState};
pub(crate) use recorder::{Recorder, recording};

/// Faults that one recording holds at most; what comes after them is counted, not recorded.
pub const MOST_FAULTS: usize = 1 << 22;
/// Bytes of a file beyond which it is no recording: more than [`MOST_FAULTS`] can take.
const LONGEST_FILE: u64 = 256 << 20;
/// Pages at most that one answer brings: a window of 2 MiB.
const MOST_BROUGHT: u32 = 512;

/// What a session does about its working set.
#[derive(Debug, Clone, Default)]
pub struct WorkingSet {
    /// Where its faults are recorded.
    pub record: Option<RecordTo>,
    /// What an earlier run wanted, to be brought before anybody asks.
    pub replay: Option<Arc<Replay>>,
}

/// What kind of access a fault was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceKind {
    /// The page was not there.
    Missing,
    /// It was in the page cache and not mapped.
    Minor,
    /// It was there and must not be written.
    WriteProtect,
}

/// One fault, as it was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceFault {
    /// Nanoseconds from the session's start to the moment its message was read.
    pub time_ns: u64,
    /// What kind of access.
    pub kind: TraceKind,
    /// Whether somebody wanted to write.
    pub write: bool,
    /// The page, counted in the image.
    pub page: u64,
    /// Pages that its answer brought before this one.
    pub before: u32,
    /// Pages that its answer brought from the image, this one included. 0 where none had to be: another fault's answer had
    /// brought it, its owner had discarded it, or it was protected.
    pub pages: u32,
    /// Nanoseconds from there to the moment its page was there.
    pub latency_ns: u64,
}

impl TraceFault {
    /// The pages that its answer brought, counted in the image.
    #[must_use]
    pub fn brought(&self) -> Range<u64> {
        let first = self.page.saturating_sub(u64::from(self.before));
        first..first + u64::from(self.pages)
    }
}

/// How a recording ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceEnd {
    /// With its session, or because it was told to.
    Complete,
    /// It was full; so many faults came afterwards.
    Full,
    /// In the middle: whoever wrote it ended, or its end is damaged. What was read of it is good.
    Torn,
}

/// What a recording is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceHeader {
    /// Bytes of a page.
    pub page_size: u32,
    /// Bytes of the image.
    pub image_size: u64,
    /// What tells the image from others of the same size: the digest of a few of its pages.
    pub identity: [u8; 32],
    /// When the session started, in milliseconds since the epoch.
    pub started_ms: u64,
}

impl TraceHeader {
    /// Of a session that starts now. Reads a few pages of the image: may wait for a disk.
    ///
    /// # Errors
    ///
    /// What the source says when it cannot be read.
    pub fn of(source: &Arc<dyn PageSource>, page_size: u32) -> Result<Self, PagerError> {
        let identity = identity::identify(source)?;
        Ok(Self { page_size, image_size: source.size(), identity, started_ms: now_ms() })
    }
}

/// A recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// What it is of.
    pub header: TraceHeader,
    /// Its faults, in the order in which they were read.
    pub faults: Vec<TraceFault>,
    /// How it ends.
    pub end: TraceEnd,
    /// Faults that are not in it: it was full, or they came faster than they could be written.
    pub dropped: u64,
}

impl Trace {
    /// Reads a recording. What lies behind the first damage is left out, and it counts as torn.
    ///
    /// # Errors
    ///
    /// [`PagerError::Trace`] when it cannot be read, is none, is of another version, or its very head is damaged.
    pub fn read(path: &Path) -> Result<Self, PagerError> {
        let failed = |syscall| move |error: std::io::Error| io_failed(path, syscall, &error);
        let file = File::open(path).map_err(failed("open"))?;
        let len = file.metadata().map_err(failed("fstat"))?.len();
        let refused = |reason| PagerError::Trace { path: path.to_owned(), reason };
        if len > LONGEST_FILE {
            return Err(refused(format!("it has {len} bytes, a recording has at most {LONGEST_FILE}")));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        // A file that grows meanwhile, or that has no length of its own (a device), is cut off here.
        file.take(LONGEST_FILE).read_to_end(&mut bytes).map_err(failed("read"))?;
        Self::parse(&bytes).map_err(refused)
    }

    /// The same of bytes.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        format::parse(bytes)
    }

    /// The bytes of the file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = format::encode_header(&self.header);
        for faults in self.faults.chunks(format::FAULTS_PER_BLOCK) {
            format::encode_block(&mut bytes, faults);
        }
        if self.end != TraceEnd::Torn {
            format::encode_end(&mut bytes, self.end, self.dropped);
        }
        bytes
    }

    /// Writes it to a file, which is what it was until it is whole: under another name first, then renamed.
    ///
    /// # Errors
    ///
    /// [`PagerError::TraceFile`]; nothing is left behind.
    pub fn write(&self, path: &Path) -> Result<(), PagerError> {
        write_whole(path, &self.encode())
    }

    /// Refuses an image that is not the one recorded, or a copy of it. Reads a few pages of it: may wait for a disk.
    ///
    /// # Errors
    ///
    /// [`PagerError::TraceImage`]; what the source says when it cannot be read.
    pub fn check(&self, source: &Arc<dyn PageSource>) -> Result<(), PagerError> {
        let TraceHeader { image_size, identity, .. } = self.header;
        let size = source.size();
        if size != image_size {
            return Err(PagerError::TraceImage(format!(
                "the recording is of an image of {image_size} bytes, this one has {size}"
            )));
        }
        let here = identity::identify(source)?;
        if here != identity {
            return Err(PagerError::TraceImage(format!(
                "the recording is of another image of {size} bytes: its identity is {}, that of this one {}",
                short(&identity),
                short(&here)
            )));
        }
        Ok(())
    }

    /// Pages of the image.
    pub(crate) fn image_pages(&self) -> u64 {
        self.header.image_size.div_ceil(u64::from(self.header.page_size))
    }
}

/// Writes the bytes of a recording as [`Trace::write`] does.
///
/// # Errors
///
/// [`PagerError::TraceFile`]; nothing is left behind.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), PagerError> {
    // Several threads of a process may write the same, each for a client of its own: the last to end has the name.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let failed = |syscall| move |error: std::io::Error| io_failed(path, syscall, &error);
    make_whole(path, &format!("tool{nth}"), |file| {
        file.write_all(bytes).map_err(failed("write"))?;
        file.sync_data().map_err(failed("fdatasync"))
    })
}

/// Has `write` write a file beside `path`, which takes its name when it is whole.
pub(crate) fn make_whole(
    path: &Path,
    who: &str,
    write: impl FnOnce(&mut File) -> Result<(), PagerError>,
) -> Result<(), PagerError> {
    let (mut file, partial) = create_partial(path, who)?;
    let rename = || std::fs::rename(&partial, path).map_err(|error| io_failed(path, "rename", &error));
    let written = write(&mut file).and_then(|()| rename());
    if written.is_err() {
        // It may be gone already; there is no more to be done about it.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

fn short(identity: &[u8; 32]) -> String {
    identity.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn io_failed(path: &Path, syscall: &'static str, error: &std::io::Error) -> PagerError {
    PagerError::TraceFile { path: path.to_owned(), syscall, errno: errno_of(error) }
}

/// A file beside `path` that nobody else writes to, to be renamed when it is whole.
fn create_partial(path: &Path, who: &str) -> Result<(File, PathBuf), PagerError> {
    // Renaming would fail on a folder when all is written, and would take the place of a device.
    match std::fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => {
            return Err(PagerError::TraceFile {
                path: path.to_owned(),
                syscall: "open",
                errno: Errno::EISDIR,
            });
        }
        Ok(there) if !there.is_file() && !there.is_symlink() => {
            return Err(PagerError::Trace {
                path: path.to_owned(),
                reason: "something that is no file has that name".to_owned(),
            });
        }
        _ => {}
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}-{who}.partial", std::process::id()));
    let partial = PathBuf::from(name);
    // New, so that it is no link that somebody has put there. One that is there was left by a process that had this number.
    let create = || File::create_new(&partial);
    let created = create().or_else(|error| match error.kind() {
        ErrorKind::AlreadyExists => std::fs::remove_file(&partial).and_then(|()| create()),
        _ => Err(error),
    });
    let file = created.map_err(|error| io_failed(path, "open", &error))?;
    Ok((file, partial))
}
