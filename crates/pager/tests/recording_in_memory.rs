//! Recordings where no file may be opened: in memfds, bounded, and readable whenever their process dies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pager::{
    PageSource, PagerError, RecordTo, RecordedBytes, Recording, RecordingKeeper, RecordingState, Room, Trace,
    TraceEnd, TraceHeader,
};
use uffd::{Mapping, MappingKind};

use support::{Bytes, DEADLINE, PAGE, Served, image, read, serve};

const PAGES: usize = 64;
const MIB: u64 = 1 << 20;

/// Holds duplicates of what it is given, as the parent of a daemon does.
#[derive(Debug, Default)]
struct Holder {
    refuses: bool,
    kept: Mutex<Vec<(u64, OwnedFd)>>,
    over: Mutex<Vec<(u64, RecordedBytes)>>,
}

impl RecordingKeeper for Holder {
    fn keep(&self, session: u64, memfd: BorrowedFd<'_>) -> Result<(), PagerError> {
        if self.refuses {
            return Err(PagerError::Exhausted("the holder takes nothing".to_owned()));
        }
        self.kept.lock().unwrap().push((session, memfd.try_clone_to_owned().unwrap()));
        Ok(())
    }

    fn over(&self, session: u64, recording: &Arc<Recording>, bytes: RecordedBytes) {
        assert!(!matches!(recording.state(), RecordingState::Running), "it is told when it is so");
        self.over.lock().unwrap().push((session, bytes));
    }
}

/// A session page by page, recorded into so much room.
fn recorded(holder: &Arc<Holder>, room: &Arc<Room>) -> Option<Served> {
    let source: Arc<dyn PageSource> = Arc::new(Bytes(image(PAGES)));
    let header = TraceHeader::of(&source, 4096).unwrap();
    serve(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap(), source, |options| {
        options.window = Some(PAGE as u64);
        let keeper: Arc<dyn RecordingKeeper> = Arc::<Holder>::clone(holder);
        options.working_set.record =
            Some(RecordTo::in_memory(Path::new("/no/such/file"), header, room, keeper));
    })
}

fn all_of(bytes: &RecordedBytes) -> Trace {
    let read = bytes.read(0, usize::MAX).unwrap();
    assert_eq!(read.len() as u64, bytes.len());
    Trace::parse(&read).unwrap()
}

/// What a duplicate shows: what a successor would have.
fn left_in(memfd: impl AsFd) -> Result<Trace, String> {
    let file = File::from(memfd.as_fd().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    Trace::parse(&bytes)
}

fn pages(trace: &Trace) -> Vec<u64> {
    trace.faults.iter().map(|fault| fault.page).collect()
}

#[test]
fn a_recording_in_memory_has_the_faults_of_its_session_and_whoever_keeps_it_has_them_too() {
    let (holder, room) = (Arc::new(Holder::default()), Room::new(MIB));
    let Some(served) = recorded(&holder, &room) else { return };
    let id = served.info.id;
    let begun = left_in(&holder.kept.lock().unwrap()[0].1).unwrap();
    assert_eq!((begun.end, begun.faults.len()), (TraceEnd::Torn, 0), "it can be read from the beginning on");

    for page in [40, 3, 20] {
        read(&served.mapping, page * PAGE, 1);
    }
    // What has gathered is written within a second, for whoever reads it when this process is dead.
    let started = Instant::now();
    while left_in(&holder.kept.lock().unwrap()[0].1).unwrap().faults.is_empty() {
        assert!(started.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    read(&served.mapping, 21 * PAGE, 1);
    served.close();

    let over = holder.over.lock().unwrap();
    let [(of, bytes)] = over.as_slice() else { panic!("{over:?}") };
    let trace = all_of(bytes);
    assert_eq!((*of, pages(&trace), trace.end), (id, vec![40, 3, 20, 21], TraceEnd::Complete));
    assert_eq!(left_in(bytes).unwrap(), trace);
    assert_eq!(left_in(&holder.kept.lock().unwrap()[0].1).unwrap(), trace, "it is the same memory");
    let recording = served.info.recording.as_ref().unwrap();
    assert_eq!((recording.bytes(), recording.faults()), (bytes.len(), 4));
    assert!(matches!(recording.state(), RecordingState::Written));
    assert!(bytes.read(bytes.len(), 10).unwrap().is_empty(), "nothing lies behind it");
    assert!(bytes.read(u64::MAX, 10).unwrap().is_empty());
}

#[test]
fn recordings_share_their_room_and_one_that_finds_none_is_full_and_says_so() {
    // The ends of two, and hardly a block of the first.
    let (holder, room) = (Arc::new(Holder::default()), Room::new(2 * 128 + 30));
    let Some(one) = recorded(&holder, &room) else { return };
    let Some(other) = recorded(&holder, &room) else { return };
    let Some(third) = recorded(&holder, &room) else { return };
    let refused = third.info.recording.as_ref().unwrap().state();
    assert!(matches!(refused, RecordingState::Failed(PagerError::Exhausted(_))), "{refused:?}");
    assert_eq!(read(&third.mapping, 0, 1), read(&one.mapping, 0, 1), "it is served all the same");
    one.close();
    for page in 0..PAGES {
        read(&other.mapping, page * PAGE, 1);
    }
    other.close();
    third.close();

    let over = holder.over.lock().unwrap();
    let [(_, first), (_, second)] = over.as_slice() else { panic!("{over:?}") };
    let (first, second) = (all_of(first), all_of(second));
    assert_eq!((first.end, pages(&first)), (TraceEnd::Complete, vec![0]));
    assert_eq!((second.end, second.faults.len(), second.dropped), (TraceEnd::Full, 0, PAGES as u64));
    let recording = other.info.recording.as_ref().unwrap();
    assert_eq!((recording.faults(), recording.dropped(), recording.is_full()), (0, PAGES as u64, true));
}

#[test]
fn room_comes_back_with_the_bytes_also_of_what_a_dead_process_has_left() {
    let (holder, room) = (Arc::new(Holder::default()), Room::new(128));
    for _ in 0..3 {
        let Some(served) = recorded(&holder, &room) else { return };
        served.close();
        let (_, bytes) = holder.over.lock().unwrap().pop().expect("there was room for it");
        let memfd = bytes.as_fd().try_clone_to_owned().unwrap();
        drop(bytes);
        let left = RecordedBytes::of_memfd(memfd, &room).unwrap();
        assert_eq!(all_of(&left).end, TraceEnd::Complete);
        let Some(none) = recorded(&holder, &room) else { return };
        assert!(matches!(none.info.recording.as_ref().unwrap().state(), RecordingState::Failed(_)));
        none.close();
    }
}

#[test]
fn a_session_whose_recording_cannot_be_kept_is_served_and_says_why() {
    let holder = Arc::new(Holder { refuses: true, ..Holder::default() });
    let Some(served) = recorded(&holder, &Room::new(MIB)) else { return };

    assert_eq!(read(&served.mapping, 0, PAGE), image(PAGES)[..PAGE]);

    let state = served.info.recording.as_ref().unwrap().state();
    assert!(matches!(state, RecordingState::Failed(PagerError::Exhausted(_))), "{state:?}");
    served.close();
    assert!(holder.over.lock().unwrap().is_empty());
}
