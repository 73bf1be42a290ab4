//! The thread of a recording: it writes what the event loop has noted, block after block.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::in_memory::{RecordedBytes, RecordingKeeper};
use super::recorder::{QUEUE, Recording};
use super::{TraceEnd, TraceFault, TraceHeader, format, io_failed, make_whole};
use crate::error::PagerError;

/// How long the thread lets faults gather, so that it is woken at most that often.
const GATHER: Duration = Duration::from_millis(20);
/// After that long a block is written although it is not full.
const OLDEST: Duration = Duration::from_secs(1);

/// What the thread is given.
pub(super) struct Writing {
    pub(super) session: u64,
    pub(super) recording: Arc<Recording>,
    pub(super) header: TraceHeader,
    pub(super) to: Target,
}

/// Where it writes.
pub(super) enum Target {
    /// A file, opened by the thread: it may have to wait for a disk.
    File,
    /// A memfd that has the head already.
    Memory(Kept),
}

/// A recording in memory. However its thread ends, or if none can be started, its keeper hears that it is over.
pub(super) struct Kept {
    session: u64,
    recording: Arc<Recording>,
    bytes: Option<RecordedBytes>,
    keeper: Arc<dyn RecordingKeeper>,
}

impl Kept {
    /// Has it kept.
    pub(super) fn new(
        session: u64,
        recording: &Arc<Recording>,
        bytes: RecordedBytes,
        keeper: Arc<dyn RecordingKeeper>,
    ) -> Result<Self, PagerError> {
        keeper.keep(session, bytes.as_fd())?;
        Ok(Self { session, recording: Arc::clone(recording), bytes: Some(bytes), keeper })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Unless it has ended otherwise.
        self.recording.ended(Err(PagerError::Exhausted("nothing could write the recording".to_owned())));
        if let Some(bytes) = self.bytes.take() {
            self.keeper.over(self.session, &self.recording, bytes);
        }
    }
}

impl Writing {
    /// Writes what comes until nobody sends any more.
    pub(super) fn run(self, faults: Receiver<TraceFault>) {
        let Self { session, recording, header, to } = self;
        match to {
            Target::File => {
                let written = write_file(session, &header, &faults, &recording);
                // From here on the event loop finds that nobody listens.
                drop(faults);
                recording.ended(written);
            }
            Target::Memory(mut kept) => {
                let written =
                    kept.bytes.as_mut().map_or(Ok(()), |bytes| write_blocks(bytes, &faults, &recording));
                drop(faults);
                recording.ended(written);
                drop(kept);
            }
        }
    }
}

/// Takes blocks.
trait Sink {
    /// `false` where there is no room for it.
    fn put(&mut self, block: &[u8]) -> Result<bool, (&'static str, std::io::Error)>;

    fn finish(&mut self, end: &[u8]) -> Result<(), (&'static str, std::io::Error)>;
}

impl Sink for File {
    fn put(&mut self, block: &[u8]) -> Result<bool, (&'static str, std::io::Error)> {
        self.write_all(block).map(|()| true).map_err(|error| ("write", error))
    }

    fn finish(&mut self, end: &[u8]) -> Result<(), (&'static str, std::io::Error)> {
        self.put(end)?;
        self.sync_data().map_err(|error| ("fdatasync", error))
    }
}

impl Sink for RecordedBytes {
    fn put(&mut self, block: &[u8]) -> Result<bool, (&'static str, std::io::Error)> {
        Self::put(self, block).map_err(|error| ("pwrite", error))
    }

    fn finish(&mut self, end: &[u8]) -> Result<(), (&'static str, std::io::Error)> {
        self.put_end(end).map_err(|error| ("pwrite", error))
    }
}

fn write_file(
    session: u64,
    header: &TraceHeader,
    faults: &Receiver<TraceFault>,
    recording: &Recording,
) -> Result<(), PagerError> {
    make_whole(&recording.path, &session.to_string(), |file| {
        let head = format::encode_header(header);
        file.write_all(&head).map_err(|error| io_failed(&recording.path, "write", &error))?;
        recording.has_bytes(head.len());
        write_blocks(file, faults, recording)
    })
}

fn write_blocks(
    sink: &mut dyn Sink,
    faults: &Receiver<TraceFault>,
    recording: &Recording,
) -> Result<(), PagerError> {
    let failed = |(syscall, error)| io_failed(&recording.path, syscall, &error);
    let put = |sink: &mut dyn Sink, faults: &[TraceFault]| -> Result<(), PagerError> {
        for faults in faults.chunks(format::FAULTS_PER_BLOCK) {
            let mut bytes = Vec::new();
            format::encode_block(&mut bytes, faults);
            if sink.put(&bytes).map_err(failed)? {
                recording.has_bytes(bytes.len());
            } else {
                recording.has_no_room_for(faults.len());
            }
        }
        Ok(())
    };
    let mut block: Vec<TraceFault> = Vec::new();
    // Since when there has been something to write.
    let mut since: Option<Instant> = None;
    loop {
        let first = match since {
            None => faults.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(since) => faults.recv_timeout(OLDEST.saturating_sub(since.elapsed())),
        };
        match first {
            Ok(fault) => {
                block.push(fault);
                // More come meanwhile, for which nobody has to be woken; whoever ends the recording ends this.
                thread::park_timeout(GATHER);
                block.extend(faults.try_iter().take(QUEUE));
                since.get_or_insert_with(Instant::now);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let late = since.is_some_and(|since| since.elapsed() >= OLDEST);
        let whole = if late { block.len() } else { block.len() - block.len() % format::FAULTS_PER_BLOCK };
        let rest = block.split_off(whole);
        put(sink, &block)?;
        block = rest;
        if block.is_empty() {
            since = None;
        }
    }
    put(sink, &block)?;
    let mut bytes = Vec::new();
    let end = if recording.is_full() { TraceEnd::Full } else { TraceEnd::Complete };
    format::encode_end(&mut bytes, end, recording.dropped());
    sink.finish(&bytes).map_err(failed)?;
    recording.has_bytes(bytes.len());
    Ok(())
}
