//! Recording the faults of a session while it runs.
//!
//! The event loop notes when a fault was read and what its answer brought, and hands that to a thread of the recording's own
//! through a queue of [`QUEUE`] faults. It never waits: what finds the queue full is counted and not recorded. The thread
//! writes block after block to a file beside the one that is wanted, and gives it that name when the session has ended. So
//! a recording that has its name is whole; one whose writer was killed is left under the other name, and read as far as it goes.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::in_memory::{RecordedBytes, RecordingKeeper, Room};
use super::writing::{Kept, Target, Writing};
use super::{MOST_FAULTS, TraceFault, TraceHeader, TraceKind, create_partial, format, io_failed};
use crate::address_map::AddressMap;
use crate::deferred::{Kind, Wanted};
use crate::error::PagerError;
use crate::source::PageSource;

/// Faults that may wait to be written: a fifth of a second of the most there can be.
pub(super) const QUEUE: usize = 1 << 14;
/// Faults that wait for their answer and are remembered at one time.
const MOST_OPEN: usize = 4096;

/// Where the faults of a session go. One can be used for any number of sessions: each writes a file of its own, and the name
/// is that of the one that ends last.
#[derive(Debug, Clone)]
pub struct RecordTo {
    path: PathBuf,
    header: TraceHeader,
    most: u64,
    /// Where there may be no file: memory, in which the path is a word for others.
    memory: Option<(Arc<Room>, Arc<dyn RecordingKeeper>)>,
}

impl RecordTo {
    /// Checks that a file can be made there, and reads a few pages of the image: may wait for a disk.
    ///
    /// # Errors
    ///
    /// [`PagerError::TraceFile`]; what the source says when it cannot be read.
    pub fn new(path: &Path, source: &Arc<dyn PageSource>) -> Result<Self, PagerError> {
        let (_, partial) = create_partial(path, "check")?;
        std::fs::remove_file(&partial).map_err(|error| io_failed(path, "unlink", &error))?;
        let header = TraceHeader::of(source, 4096)?;
        Ok(Self { path: path.to_owned(), header, most: MOST_FAULTS as u64, memory: None })
    }

    /// Of a process that may open no file: each recording is a memfd of its own, at most 16 MiB of all the room there is, and `keeper`
    /// has it from its beginning on. `path` is what it is called; nothing is opened there.
    #[must_use]
    pub fn in_memory(
        path: &Path,
        header: TraceHeader,
        room: &Arc<Room>,
        keeper: Arc<dyn RecordingKeeper>,
    ) -> Self {
        let memory = Some((Arc::clone(room), keeper));
        Self { path: path.to_owned(), header, most: MOST_FAULTS as u64, memory }
    }

    /// What it will say of the image.
    #[must_use]
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// The same with room for fewer faults than [`MOST_FAULTS`].
    #[must_use]
    pub fn with_room(self, faults: usize) -> Self {
        Self { most: faults.min(MOST_FAULTS) as u64, ..self }
    }
}

/// How far a recording has come.
#[derive(Debug, Clone)]
pub enum RecordingState {
    /// Faults are being recorded.
    Running,
    /// The file is whole and has its name.
    Written,
    /// There is no file, or none that is whole.
    Failed(PagerError),
}

/// A recording as anybody sees it.
#[derive(Debug)]
pub struct Recording {
    /// What the file is called when it is whole.
    pub path: PathBuf,
    faults: AtomicU64,
    dropped: AtomicU64,
    bytes: AtomicU64,
    full: AtomicBool,
    state: Mutex<RecordingState>,
}

impl Recording {
    pub(crate) fn new(to: &RecordTo) -> Self {
        Self {
            path: to.path.clone(),
            faults: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            full: AtomicBool::new(false),
            state: Mutex::new(RecordingState::Running),
        }
    }

    /// Faults that were recorded.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Faults that were not: it is full, or they came faster than they could be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Bytes of the file so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether it has as many faults as it may have.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// How far it has come.
    #[must_use]
    pub fn state(&self) -> RecordingState {
        self.lock().clone()
    }

    /// Its file has so many more.
    pub(super) fn has_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// So many faults were taken, and could not be written.
    pub(super) fn has_no_room_for(&self, faults: usize) {
        self.full.store(true, Ordering::Relaxed);
        self.faults.fetch_sub(faults as u64, Ordering::Relaxed);
        self.dropped.fetch_add(faults as u64, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        !matches!(*self.lock(), RecordingState::Running)
    }

    /// The first end is the one that is told.
    pub(crate) fn ended(&self, outcome: Result<(), PagerError>) {
        let mut state = self.lock();
        if matches!(*state, RecordingState::Running) {
            *state = outcome.map_or_else(RecordingState::Failed, |()| RecordingState::Written);
        }
    }

    /// Only whole values are put in under this lock.
    fn lock(&self) -> MutexGuard<'_, RecordingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who records, where a session's faults are recorded: nobody does in a build without, which tells what asking costs.
pub(crate) fn recording(recorder: &mut Option<Box<Recorder>>) -> Option<&mut Recorder> {
    if cfg!(userfaultfd_without_recording) { None } else { recorder.as_deref_mut() }
}

/// A fault whose answer is on its way.
#[derive(Debug, Clone, Copy)]
struct Open {
    read: Instant,
    write: bool,
}

/// The event loop's side of a recording.
pub(crate) struct Recorder {
    recording: Arc<Recording>,
    queue: SyncSender<TraceFault>,
    writer: Thread,
    page_size: u64,
    started: Instant,
    most: u64,
    open: HashMap<(usize, Kind), Open>,
}

impl Recorder {
    /// Starts the thread that writes. `over` is called on it when the recording has come to its end, whichever that is.
    pub(crate) fn start(
        to: RecordTo,
        recording: &Arc<Recording>,
        session: u64,
        page_size: u64,
        over: impl FnOnce() + Send + 'static,
    ) -> Result<Self, PagerError> {
        let (queue, faults) = sync_channel(QUEUE);
        let RecordTo { mut header, most, memory, .. } = to;
        header.page_size = page_size as u32;
        header.started_ms = super::now_ms();
        let to = match memory {
            None => Target::File,
            Some((room, keeper)) => {
                let bytes = RecordedBytes::new(&format::encode_header(&header), &room)?;
                recording.has_bytes(bytes.len() as usize);
                Target::Memory(Kept::new(session, recording, bytes, keeper)?)
            }
        };
        let writing = Writing { session, recording: Arc::clone(recording), header, to };
        let write = move || {
            writing.run(faults);
            over();
        };
        let thread = thread::Builder::new().name("uffd-record".into()).spawn(write).map_err(|error| {
            PagerError::Exhausted(format!("no thread could be started to write the recording: {error}"))
        })?;
        Ok(Self {
            recording: Arc::clone(recording),
            queue,
            writer: thread.thread().clone(),
            page_size,
            started: Instant::now(),
            most,
            open: HashMap::new(),
        })
    }

    /// A fault has its turn.
    pub(crate) fn begin(&mut self, page: usize, wanted: &Wanted) {
        let Some(read) = wanted.read else { return };
        if self.open.len() >= MOST_OPEN {
            // Faults whose memory went away have no answer, and are forgotten with all others.
            self.recording.dropped.fetch_add(self.open.len() as u64, Ordering::Relaxed);
            self.open.clear();
        }
        self.open.entry((page, wanted.kind)).or_insert(Open { read, write: wanted.write });
    }

    /// Pages were filled, for faults on some of them: from the image, or else with nothing that is in there.
    pub(crate) fn filled(
        &mut self,
        pages: &Range<usize>,
        from_image: bool,
        waiting: &[usize],
        map: &AddressMap,
    ) {
        for &page in waiting.iter().filter(|page| pages.contains(page)) {
            let (before, count) = if from_image { (page - pages.start, pages.len()) } else { (0, 0) };
            for kind in [Kind::Missing, Kind::Minor] {
                self.answered(page, kind, before as u32, count as u32, map);
            }
        }
    }

    /// A fault was answered, and nothing had to be brought for it.
    pub(crate) fn answered_alone(&mut self, page: usize, kind: Kind, map: &AddressMap) {
        self.answered(page, kind, 0, 0, map);
    }

    fn answered(&mut self, page: usize, kind: Kind, before: u32, pages: u32, map: &AddressMap) {
        let Some(Open { read, write }) = self.open.remove(&(page, kind)) else { return };
        let Some(offset) = map.source_offset_of(page) else { return };
        let fault = TraceFault {
            time_ns: nanoseconds(read.saturating_duration_since(self.started)),
            kind: match kind {
                Kind::Missing => TraceKind::Missing,
                Kind::Minor => TraceKind::Minor,
                Kind::WriteProtect => TraceKind::WriteProtect,
            },
            write,
            page: offset / self.page_size,
            before,
            pages,
            latency_ns: nanoseconds(read.elapsed()),
        };
        if self.recording.is_full() || self.recording.faults() >= self.most {
            self.recording.full.store(true, Ordering::Relaxed);
        } else {
            match self.queue.try_send(fault) {
                Ok(()) => {
                    self.recording.faults.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
            }
        }
        self.recording.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// No more faults: the thread writes what it has and ends. Does not wait for it.
    pub(crate) fn finish(self) {
        let Self { queue, writer, .. } = self;
        drop(queue);
        writer.unpark();
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_map::Region;

    #[test]
    fn what_finds_the_queue_full_is_counted_and_nobody_waits() {
        let region = Region { address: 1 << 30, len: 4 * 4096, source_offset: 8 * 4096 };
        let map = AddressMap::new(&[region], 4096, 12 * 4096).unwrap();
        let header = TraceHeader { page_size: 4096, image_size: 12 * 4096, identity: [0; 32], started_ms: 0 };
        let to = RecordTo { path: PathBuf::from("unused"), header, most: 100, memory: None };
        let recording = Arc::new(Recording::new(&to));
        let (queue, faults) = sync_channel(2);
        let mut recorder = Recorder {
            recording: Arc::clone(&recording),
            queue,
            writer: thread::current(),
            page_size: 4096,
            started: Instant::now(),
            most: 100,
            open: HashMap::new(),
        };
        let mut fault = |page: usize, read: bool| {
            let address = (1 << 30) + page as u64 * 4096;
            let read = read.then(Instant::now);
            recorder.begin(page, &Wanted { read, ..Wanted::missing(address) });
            recorder.filled(&(0..4), true, &[page], &map);
        };

        for page in 0..4 {
            fault(page, true);
        }
        fault(0, false);

        assert_eq!(
            (recording.faults(), recording.dropped()),
            (2, 2),
            "one whose beginning nobody saw is none"
        );
        let taken: Vec<_> = faults.try_iter().map(|fault| (fault.page, fault.brought())).collect();
        assert_eq!(taken, [(8, 8..12), (9, 8..12)]);
    }
}
