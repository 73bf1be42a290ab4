//! Recording a session's faults while it runs.
#![allow(clippy::single_range_in_vec_init, reason = "one range of pages, not its numbers")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use pager::{
    EndReason, Notice, PageSource, PagerError, RecordTo, RecordingState, Rest, SessionOptions, Trace,
    TraceEnd, TraceKind,
};
use uffd::{Features, Mapping, MappingKind, Modes};

use support::area::{Area, Gated, Made, all_events, new_uffd, register, serve_area};
use support::children::{Child, Steps, fork};
use support::{Bytes, DEADLINE, PAGE, Served, elsewhere, finish, image, read, serve};

const PAGES: usize = 64;

/// Windows of 16 pages, recorded to a file.
fn recorded(options: &mut SessionOptions, path: &Path) {
    options.window = Some(16 * PAGE as u64);
    options.working_set.record = Some(RecordTo::new(path, &options.source).unwrap());
}

fn serve_recorded(source: Arc<dyn PageSource>, path: &Path) -> Option<Served> {
    serve(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap(), source, |options| {
        recorded(options, path)
    })
}

/// What a fault on a page brings: windows are aligned in addresses.
fn window(served: &Served, page: u64) -> Range<u64> {
    let base = served.mapping.address() / PAGE as u64;
    let first = (base + page) / 16 * 16;
    first.saturating_sub(base)..(first + 16 - base).min(PAGES as u64)
}

fn state(served: &Served) -> RecordingState {
    served.info.recording.as_ref().unwrap().state()
}

#[test]
fn every_fault_is_in_the_file_when_the_end_is_told_in_the_order_it_came() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let source: Arc<dyn PageSource> = Arc::new(Bytes(image(PAGES)));
    let Some(served) = serve_recorded(Arc::clone(&source), &path) else { return };

    for page in [40, 3, 20] {
        read(&served.mapping, page * PAGE, 1);
    }
    read(&served.mapping, window(&served, 40).start as usize * PAGE, 1);
    assert!(!path.exists(), "a file of this name is whole");
    served.close();

    let trace = Trace::read(&path).unwrap();
    let brought: Vec<_> = trace.faults.iter().map(|fault| (fault.page, fault.brought())).collect();
    assert_eq!(brought, [40, 3, 20].map(|page| (page, window(&served, page))));
    assert!(trace.faults.iter().all(|fault| fault.kind == TraceKind::Missing && !fault.write));
    assert!(trace.faults.iter().all(|fault| fault.latency_ns > 0));
    assert!(trace.faults.is_sorted_by_key(|fault| fault.time_ns));
    assert_eq!((trace.end, trace.dropped, trace.header.page_size), (TraceEnd::Complete, 0, 4096));
    trace.check(&source).unwrap();
    let recording = served.info.recording.as_ref().unwrap();
    assert_eq!((recording.faults(), recording.dropped()), (3, 0));
    assert_eq!(recording.bytes(), std::fs::metadata(&path).unwrap().len());
    assert!(matches!(state(&served), RecordingState::Written));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn faults_that_wait_for_a_slow_source_are_recorded_with_how_long_they_waited() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let source = Gated::new(image(PAGES));
    let Some(served) = serve_recorded(Arc::<Gated>::clone(&source), &path) else { return };

    let gate = source.shut();
    let started = Instant::now();
    let (mut waiting, mut read_by) = (Vec::new(), Vec::new());
    // The last is in the window of the first.
    let pages = [window(&served, 20).start, 60, window(&served, 20).start + 1];
    for (nth, page) in pages.into_iter().enumerate() {
        let mapping = Arc::clone(&served.mapping);
        waiting.push(elsewhere(move || read(&mapping, page as usize * PAGE, 1)));
        while served.info.stats.snapshot().faults <= nth as u64 {
            assert!(started.elapsed() < DEADLINE);
            std::thread::yield_now();
        }
        read_by.push(Instant::now());
    }
    let least: Vec<_> = read_by.iter().map(|read| read.elapsed().as_nanos() as u64).collect();
    drop(gate);
    for one in &waiting {
        finish(one);
    }
    served.close();

    let trace = Trace::read(&path).unwrap();
    let brought: Vec<_> = trace.faults.iter().map(|fault| (fault.page, fault.brought())).collect();
    assert_eq!(brought, pages.map(|page| (page, window(&served, page))));
    let all = started.elapsed().as_nanos() as u64;
    for (fault, least) in trace.faults.iter().zip(least) {
        assert!((least..=all).contains(&fault.latency_ns), "{least} to {all}: {fault:?}");
    }
    assert!(trace.faults[0].latency_ns > trace.faults[2].latency_ns, "it came earlier, for the same window");
}

#[test]
fn what_its_owner_has_discarded_brings_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let Some(served) = serve_recorded(Arc::new(Bytes(image(PAGES))), &path) else { return };

    read(&served.mapping, 0, 1);
    let mapping = Arc::clone(&served.mapping);
    let gone = window(&served, 0).end as usize - 1;
    finish(&elsewhere(move || mapping.discard(gone * PAGE, PAGE).unwrap()));
    assert_eq!(read(&served.mapping, gone * PAGE, 1), [0]);
    served.close();

    let trace = Trace::read(&path).unwrap();
    let brought: Vec<_> = trace.faults.iter().map(|fault| (fault.page, fault.pages)).collect();
    assert_eq!(brought, [(0, window(&served, 0).end as u32), (gone as u64, 0)]);
    assert_eq!(trace.working_set(), [window(&served, 0)]);
}

#[test]
fn writes_and_faults_on_protected_pages_are_told_apart() {
    let Some(uffd) = new_uffd(all_events() | Features::PAGEFAULT_FLAG_WP) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING | Modes::WRITE_PROTECT);
    let served = serve_area(uffd, area, Arc::new(Bytes(image(PAGES))), |options| {
        recorded(options, &path);
        options.modes.write_protect = true;
    });

    area.part(0, 1).read();
    area.part(0, 1).write(b"there and protected");
    area.part(40, 1).write(b"not there");
    served.close(Rest::Zero);

    let trace = Trace::read(&path).unwrap();
    let kinds: Vec<_> =
        trace.faults.iter().map(|fault| (fault.page, fault.kind, fault.write, fault.pages > 0)).collect();
    let (missing, protected) = (TraceKind::Missing, TraceKind::WriteProtect);
    assert_eq!(kinds, [(0, missing, false, true), (0, protected, true, false), (40, missing, true, true)]);
}

#[test]
fn one_that_is_full_says_so_and_how_many_it_has_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let limited = |options: &mut SessionOptions| {
        recorded(options, &path);
        options.window = Some(PAGE as u64);
        options.working_set.record = options.working_set.record.take().map(|record| record.with_room(10));
    };
    let Some(served) = serve(mapping, Arc::new(Bytes(image(PAGES))), limited) else { return };

    for page in 0..25 {
        read(&served.mapping, page * PAGE, 1);
    }
    served.close();

    let trace = Trace::read(&path).unwrap();
    assert_eq!((trace.faults.len(), trace.end, trace.dropped), (10, TraceEnd::Full, 15));
    assert!(served.info.recording.as_ref().unwrap().is_full());
}

#[test]
fn a_recording_can_be_ended_while_its_session_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let Some(served) = serve_recorded(Arc::new(Bytes(image(PAGES))), &path) else { return };
    let stop = || {
        let (sender, answer) = channel();
        served.pager.stop_recording(served.id, Box::new(move |outcome| drop(sender.send(outcome))));
        answer.recv_timeout(DEADLINE).unwrap()
    };

    read(&served.mapping, 0, 1);
    stop().unwrap();
    assert_eq!(Trace::read(&path).unwrap().faults.len(), 1);
    read(&served.mapping, 20 * PAGE, 1);
    stop().unwrap();
    served.close();

    assert_eq!(Trace::read(&path).unwrap().faults.len(), 1, "what came afterwards is not in it");
    assert!(matches!(stop(), Err(PagerError::SessionOver)));
}

#[test]
fn what_cannot_be_written_is_said_and_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let source: Arc<dyn PageSource> = Arc::new(Bytes(image(PAGES)));
    let nowhere = RecordTo::new(&folder.path().join("no/such/folder"), &source).unwrap_err();
    assert_eq!((nowhere.code(), nowhere.errno()), ("ERR_UFFD_TRACE", Some(libc::ENOENT)));

    let refused = RecordTo::new(folder.path(), &source).unwrap_err();
    assert_eq!((refused.code(), refused.errno()), ("ERR_UFFD_TRACE", Some(libc::EISDIR)));
    let device = RecordTo::new(Path::new("/dev/null"), &source).unwrap_err();
    assert!(matches!(device, PagerError::Trace { .. }), "{device}");

    // Seen only when all is written: a folder has that name by then. And at once: the folder has gone.
    let taken = folder.path().join("folder");
    let gone = folder.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    let vanish = |options: &mut SessionOptions| {
        recorded(options, &gone.join("recording"));
        std::fs::remove_dir(&gone).unwrap();
    };
    let mapping = || Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let Some(late) = serve_recorded(Arc::clone(&source), &taken) else { return };
    let Some(early) = serve(mapping(), source, vanish) else { return };
    std::fs::create_dir_all(taken.join("within")).unwrap();

    for (served, errno) in [(late, libc::EISDIR), (early, libc::ENOENT)] {
        assert!(read(&served.mapping, 0, PAGES * PAGE) == image(PAGES));
        served.close();
        let RecordingState::Failed(error) = state(&served) else { panic!("{:?}", state(&served)) };
        assert_eq!((error.code(), error.errno()), ("ERR_UFFD_TRACE", Some(errno)));
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn a_pager_that_ends_without_being_told_leaves_whole_recordings() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let Some(served) = serve_recorded(Arc::new(Bytes(image(PAGES))), &path) else { return };
    read(&served.mapping, 0, 1);
    let Served { pager, notices, mapping, .. } = served;

    drop(pager);

    assert_eq!(Trace::read(&path).unwrap().faults.len(), 1);
    let end = notices.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(end, Notice::SessionEnded { end, .. } if end.reason == EndReason::Closed));
    drop(mapping);
}

/// Stops the thread that writes the recording, as a disk would that does not answer, until the child is gone.
fn hang_the_disk() -> Child {
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap());
    let named = |thread: &std::fs::DirEntry| {
        std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name == "uffd-record\n")
    };
    let thread: i32 = threads().find(named).unwrap().file_name().to_str().unwrap().parse().unwrap();
    let steps = Steps::new();
    let (stopped, go_on) = (steps.stepper(), steps.waiter());
    let request = move |request| {
        // SAFETY: takes numbers.
        unsafe { libc::ptrace(request, thread, 0_usize, 0_usize) }
    };
    let is_held = move || {
        let mut status = 0;
        // SAFETY: writes to a variable that lives across the call.
        unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) == thread }
    };
    let hold = move || {
        if request(libc::PTRACE_SEIZE) == 0 && request(libc::PTRACE_INTERRUPT) == 0 && is_held() {
            stopped();
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
        1
    };
    // SAFETY: bare system calls on numbers and on the child's own stack.
    let child = unsafe { fork(hold) };
    finish(&elsewhere(go_on));
    child
}

#[test]
fn a_disk_that_hangs_holds_up_no_fault_and_no_end() {
    let test = "a_disk_that_hangs_holds_up_no_fault_and_no_end";
    alone::alone(test, Duration::from_secs(60), || {
        // More than may wait to be written.
        const MANY: usize = 20_000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recording");
        let mapping = Mapping::new(MANY * PAGE, MappingKind::Private).unwrap();
        let bytes = image(MANY);
        let Some(served) = serve(mapping, Arc::new(Bytes(bytes.clone())), |options| {
            recorded(options, &path);
            options.window = Some(PAGE as u64);
        }) else {
            return;
        };
        let disk = hang_the_disk();

        assert!(read(&served.mapping, 0, MANY * PAGE) == bytes);

        let recording = Arc::clone(served.info.recording.as_ref().unwrap());
        assert_eq!(recording.faults() + recording.dropped(), MANY as u64);
        assert!(recording.dropped() > 0, "what is not written piles up");
        served.pager.close_session(served.id, Rest::Zero);
        assert_eq!(served.end().reason, EndReason::Closed);
        let RecordingState::Failed(error) = state(&served) else { panic!("{:?}", state(&served)) };
        assert_eq!(error.code(), "ERR_UFFD_TIMEOUT", "{error}");
        assert!(!path.exists());
        drop(disk);
    });
}
