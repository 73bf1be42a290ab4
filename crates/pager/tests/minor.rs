//! Sessions that answer minor faults: the source is written to the memory's own file, and every process that maps it has
//! the page.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use pager::{
    EndReason, LostSource, MinorMemory, PageSource, Pager, PagerError, PagerOptions, Region, Rest,
    SessionModes, SessionOptions,
};
use uffd::{Features, Mapping, MappingKind, Modes};

use support::area::{Area, Gated, Serving, all_events, ended, new_uffd, started};
use support::children::{fork, turn};
use support::{Bytes, DEADLINE, PAGE, elsewhere, finish, image, read, told};

const BOTH: Modes = Modes::MISSING.union(Modes::MINOR);

/// Shared memory being served, and its file.
struct Shared {
    mapping: Arc<Mapping>,
    file: File,
    served: Serving,
}

fn memory(pages: usize) -> (Arc<Mapping>, File) {
    let mapping = Mapping::new(pages * PAGE, MappingKind::Shared).unwrap();
    let file = File::from(mapping.memfd().unwrap().try_clone_to_owned().unwrap());
    (Arc::new(mapping), file)
}

fn minor(file: &File) -> SessionModes {
    let memfd = file.as_fd().try_clone_to_owned().unwrap();
    SessionModes { minor: Some(MinorMemory { memfd, offsets: vec![0] }), ..SessionModes::default() }
}

fn options(mapping: &Mapping, source: Arc<dyn PageSource>, modes: SessionModes) -> SessionOptions {
    let region = Region { address: mapping.address(), len: mapping.len() as u64, source_offset: 0 };
    SessionOptions {
        source_timeout: std::time::Duration::from_secs(10),
        window: Some(4 * PAGE as u64),
        modes,
        ..SessionOptions::new(vec![region], PAGE as u64, source)
    }
}

fn serving(
    pages: usize,
    registered: Modes,
    source: Arc<dyn PageSource>,
    modes: impl FnOnce(&File) -> SessionModes,
) -> Option<Shared> {
    let (mapping, file) = memory(pages);
    let modes = modes(&file);
    let served = serve(&mapping, registered, options(&mapping, source, modes))?;
    Some(Shared { mapping, file, served })
}

fn serve(mapping: &Mapping, registered: Modes, options: SessionOptions) -> Option<Serving> {
    let uffd = new_uffd(all_events())?;
    // SAFETY: no reference to the mapping exists.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, registered) }.unwrap();
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let id = pager.adopt(uffd, options, observer).unwrap();
    let info = started(&notices);
    Some(Serving { pager, id, info, notices })
}

impl Shared {
    /// What the file has, whoever maps it.
    fn in_file(&self, page: usize, pages: usize) -> Vec<u8> {
        let mut bytes = vec![0; pages * PAGE];
        self.file.read_exact_at(&mut bytes, (page * PAGE) as u64).unwrap();
        bytes
    }

    fn write(&self, page: usize, bytes: &'static [u8]) {
        let mapping = Arc::clone(&self.mapping);
        finish(&elsewhere(move || mapping.write(page * PAGE, bytes).unwrap()));
    }

    fn discard(&self, page: usize) {
        let mapping = Arc::clone(&self.mapping);
        finish(&elsewhere(move || mapping.discard(page * PAGE, PAGE).unwrap()));
    }

    fn peek(&self, page: usize) -> Result<(), i32> {
        let mapping = Arc::clone(&self.mapping);
        let looked = elsewhere(move || mapping.read_checked(page * PAGE, &mut [0; 8]));
        finish(&looked).map_err(|error| error.errno())
    }
}

fn of(bytes: &[u8], page: usize, pages: usize) -> &[u8] {
    &bytes[page * PAGE..(page + pages) * PAGE]
}

#[test]
fn missing_pages_are_written_to_the_file_and_the_window_with_them() {
    let bytes = image(16);
    let Some(shared) = serving(16, BOTH, Arc::new(Bytes(bytes.clone())), minor) else { return };

    assert!(read(&shared.mapping, 5 * PAGE, PAGE) == of(&bytes, 5, 1));

    let first =
        (shared.mapping.address() as usize / PAGE + 5) / 4 * 4 - shared.mapping.address() as usize / PAGE;
    assert!(shared.in_file(first, 4) == of(&bytes, first, 4));
    assert!(read(&shared.mapping, 0, 16 * PAGE) == bytes);
    assert!(shared.in_file(0, 16) == bytes);
    shared.write(5, b"written!");
    assert_eq!(&shared.in_file(5, 1)[..8], b"written!");
    shared.served.until_filled(16, 0);
    shared.served.close(Rest::Poison);
}

#[test]
fn memory_that_is_all_there_but_not_right_yet_is_brought_on_minor_faults_alone() {
    let bytes = image(8);
    let (mapping, file) = memory(8);
    file.write_all_at(&[0xee; 8 * PAGE], 0).unwrap();
    let modes = SessionModes { missing: false, ..minor(&file) };
    let source = Arc::new(Bytes(bytes.clone()));
    let Some(served) = serve(&mapping, Modes::MINOR, options(&mapping, source, modes)) else { return };

    assert!(read(&mapping, 3 * PAGE, PAGE) == of(&bytes, 3, 1));
    assert!(read(&mapping, 0, 8 * PAGE) == bytes);
    served.close(Rest::Poison);
    assert!(read(&mapping, 0, 8 * PAGE) == bytes);
}

#[test]
fn pages_brought_once_are_mapped_as_they_are_when_they_fault_again() {
    let bytes = image(8);
    let Some(shared) = serving(8, BOTH, Arc::new(Bytes(bytes)), minor) else { return };
    assert!(read(&shared.mapping, 0, 8 * PAGE) == *image(8));
    shared.write(2, b"written!");
    let (address, len) = (shared.mapping.address(), shared.mapping.len());

    // Paged out of the mapping, not of the file, which no event tells.
    // SAFETY: takes numbers, and changes no byte of the memory.
    let advised =
        elsewhere(move || unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_PAGEOUT) });
    finish(&advised);
    shared.file.write_all_at(b"by file!", 3 * PAGE as u64).unwrap();

    assert_eq!(read(&shared.mapping, 2 * PAGE, 8), b"written!");
    assert_eq!(read(&shared.mapping, 3 * PAGE, 8), b"by file!");
    shared.served.close(Rest::Poison);
}

#[test]
fn discarded_pages_read_zero_and_are_never_written_again() {
    let bytes = image(8);
    let Some(shared) = serving(8, BOTH, Arc::new(Bytes(bytes.clone())), minor) else { return };
    assert!(read(&shared.mapping, 0, PAGE) == of(&bytes, 0, 1));

    // One that was there, one that was missing.
    shared.discard(0);
    shared.discard(6);

    assert!(read(&shared.mapping, 0, PAGE) == [0; PAGE]);
    assert!(read(&shared.mapping, 4 * PAGE, 2 * PAGE) == of(&bytes, 4, 2));
    assert!(read(&shared.mapping, 6 * PAGE, PAGE) == [0; PAGE]);
    // What somebody wrote to the file since is what is there.
    shared.discard(0);
    shared.file.write_all_at(b"by file!", 0).unwrap();
    assert_eq!(read(&shared.mapping, 0, 8), b"by file!");
    shared.served.close(Rest::Populate);
    assert!(shared.in_file(6, 1) == [0; PAGE]);
}

#[test]
fn a_page_discarded_while_its_bytes_are_on_the_way_is_not_written() {
    let bytes = image(4);
    let source = Gated::new(bytes.clone());
    let Some(shared) = serving(4, BOTH, Arc::<Gated>::clone(&source), minor) else { return };
    let shut = source.shut();
    let mapping = Arc::clone(&shared.mapping);
    let waits = elsewhere(move || {
        let mut bytes = vec![0; 4 * PAGE];
        mapping.read_checked(0, &mut bytes).unwrap();
        bytes
    });
    shared.served.until("the read has begun", |stats| stats.worker_reads == 1);

    shared.discard(2);
    drop(shut);

    let found = finish(&waits);
    assert!(found[..2 * PAGE] == *of(&bytes, 0, 2) && found[3 * PAGE..] == *of(&bytes, 3, 1));
    assert!(found[2 * PAGE..3 * PAGE] == [0; PAGE]);
    assert!(shared.in_file(2, 1) == [0; PAGE]);
    shared.served.close(Rest::Poison);
}

#[test]
fn a_child_forked_from_memory_that_is_brought_to_its_file_is_poisoned_by_name() {
    let _turn = turn();
    let Some(uffd) = new_uffd(all_events() | Features::EVENT_FORK) else { return };
    let bytes = image(4);
    let (mapping, file) = memory(4);
    // SAFETY: no reference to the mapping exists.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, BOTH) }.unwrap();
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let mut options = options(&mapping, Arc::new(Bytes(bytes.clone())), minor(&file));
    options.window = Some(PAGE as u64);
    let id = pager.adopt(uffd, options, observer).unwrap();
    let area = Area { address: mapping.address(), pages: 4, page: PAGE };
    assert!(area.part(0, 1).read() == of(&bytes, 0, 1));
    let act = move || i32::from(area.holds(0, 0)) + i32::from(area.zero(2));
    // SAFETY: touches memory only.
    let child = unsafe { fork(act) };

    assert_eq!(started(&notices).id, id);
    let of_child = started(&notices).id;
    let end = ended(&notices, of_child);
    assert!(matches!(end.error, Some(PagerError::Unsupported(_))), "{end:?}");
    assert!(matches!(child.wait(), WaitStatus::Signaled(_, Signal::SIGBUS, _)));
    assert!(area.read() == bytes);
    pager.close_session(id, Rest::Poison);
    ended(&notices, id);
}

#[test]
fn without_the_file_what_the_page_cache_has_is_what_is_there() {
    let bytes = image(4);
    let Some(shared) = serving(4, BOTH, Arc::new(Bytes(bytes.clone())), |_| SessionModes::default()) else {
        return;
    };
    shared.file.write_all_at(b"by file!", PAGE as u64).unwrap();

    assert_eq!(read(&shared.mapping, PAGE, 8), b"by file!");
    assert!(read(&shared.mapping, 2 * PAGE, PAGE) == of(&bytes, 2, 1));
    shared.served.close(Rest::Poison);
}

#[test]
fn writes_to_pages_of_a_file_are_tracked() {
    let bytes = image(8);
    let modes = |file: &File| SessionModes { write_protect: true, ..minor(file) };
    let registered = BOTH | Modes::WRITE_PROTECT;
    let Some(shared) = serving(8, registered, Arc::new(Bytes(bytes.clone())), modes) else { return };
    let dirty = || -> Vec<u64> {
        let told = shared.served.pager.take_dirty(shared.served.id, 100).wait(DEADLINE).unwrap();
        told.ranges
            .iter()
            .flat_map(|range| (range.source_offset.unwrap()..).step_by(PAGE).take(range.len as usize / PAGE))
            .collect()
    };

    assert!(read(&shared.mapping, 0, 8 * PAGE) == bytes);
    assert_eq!(dirty(), [0; 0]);
    shared.write(3, b"written!");
    assert_eq!(dirty(), [3 * PAGE as u64]);
    shared.discard(5);
    shared.write(5, b"anew");
    assert_eq!(dirty(), [5 * PAGE as u64]);
    shared.served.close(Rest::Poison);
}

#[test]
fn what_cannot_be_had_is_poisoned_also_where_the_file_has_something() {
    let broken = LostSource::new(PagerError::Exhausted("a source that is broken".to_owned()));
    let Some(shared) = serving(4, BOTH, Arc::new(broken), minor) else { return };
    shared.file.write_all_at(&[0xee; PAGE], PAGE as u64).unwrap();

    assert_eq!(shared.peek(1), Err(libc::EFAULT));
    assert_eq!(shared.peek(2), Err(libc::EFAULT));
    assert_eq!(ended(&shared.served.notices, shared.served.id).reason, EndReason::SourceFailed);
}

#[test]
fn a_file_that_is_not_the_one_mapped_ends_the_session_and_nothing_reads_zero() {
    let (_, other) = memory(8);
    let Some(shared) = serving(8, BOTH, Arc::new(Bytes(image(8))), |_| minor(&other)) else { return };

    assert_eq!(shared.peek(1), Err(libc::EFAULT));

    let end = ended(&shared.served.notices, shared.served.id);
    assert_eq!(end.reason, EndReason::Protocol);
    assert!(end.error.unwrap().to_string().contains("mapped something else"));
    for page in 0..8 {
        assert_eq!(shared.peek(page), Err(libc::EFAULT));
    }
}

#[test]
fn a_file_that_cannot_be_written_to_is_refused_by_name() {
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let refused = |made: &dyn Fn(&File) -> MinorMemory, page_size: usize| -> Option<String> {
        let (mapping, file) = memory(512);
        let modes = SessionModes { minor: Some(made(&file)), ..SessionModes::default() };
        let mut options = options(&mapping, Arc::new(Bytes(vec![1; 512 * PAGE])), modes);
        options.page_size = page_size as u64;
        if page_size != PAGE {
            options.regions[0].address = options.regions[0].address.next_multiple_of(page_size as u64);
        }
        let uffd = new_uffd(Features::empty())?;
        Some(pager.adopt(uffd, options, told().0).unwrap_err().to_string())
    };
    let clone = |file: &File| -> OwnedFd { file.as_fd().try_clone_to_owned().unwrap() };
    let with =
        |offsets: Vec<u64>| move |file: &File| MinorMemory { memfd: clone(file), offsets: offsets.clone() };
    let sealed = |file: &File| {
        let copy =
            nix::sys::memfd::memfd_create(c"sealed", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
        File::from(copy.try_clone().unwrap()).set_len(file.metadata().unwrap().len()).unwrap();
        fcntl(&copy, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        MinorMemory { memfd: copy, offsets: vec![0] }
    };
    let read_only = |file: &File| {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        MinorMemory { memfd: OwnedFd::from(File::open(path).unwrap()), offsets: vec![0] }
    };

    let (mapping, file) = memory(4);
    file.write_all_at(&[1; 3 * PAGE], 0).unwrap();
    let modes = SessionModes { missing: false, ..minor(&file) };
    let with_holes = options(&mapping, Arc::new(Bytes(vec![1; 4 * PAGE])), modes);
    let Some(uffd) = new_uffd(Features::empty()) else { return };
    let error = pager.adopt(uffd, with_holes, told().0).unwrap_err().to_string();
    assert!(error.contains("holes (0x3000 bytes of 0x4000 are there)"), "{error}");
    let of_disk = |_: &File| {
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.set_len(512 * PAGE as u64).unwrap();
        MinorMemory { memfd: file.into(), offsets: vec![0] }
    };
    let error = refused(&of_disk, PAGE).unwrap();
    assert!(error.contains("it is none, nor a file of tmpfs"), "{error}");
    let Some(error) = refused(&with(vec![]), PAGE) else { return };
    assert!(error.contains("0 offsets for 1 regions"), "{error}");
    for offset in [1, PAGE as u64, u64::MAX - 4095] {
        let error = refused(&with(vec![offset]), PAGE).unwrap();
        assert!(error.starts_with("region 0") && error.contains("unaligned or too high"), "{error}");
    }
    let error = refused(&read_only, PAGE).unwrap();
    assert!(error.contains("reading only"), "{error}");
    let error = refused(&sealed, PAGE).unwrap();
    assert!(error.contains("sealed"), "{error}");
    let error = refused(&with(vec![0]), 2 << 20).unwrap();
    assert!(error.contains("minor faults of huge pages"), "{error}");
}
