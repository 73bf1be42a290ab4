//! Every kind of source gives the right bytes to real faults, in any order.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pager::{
    FileOptions, FileSource, LayeredSource, MappingSource, MemorySource, Overlay, OverlaySource, PageSource,
    PagerError, RetryOptions, RetrySource,
};
use uffd::{Mapping, MappingKind};

use crate::support::{Bytes, PAGE, image, read, serve};

const PAGES: usize = 512;

/// The pages `0..count` in an order of their own.
pub(super) fn shuffled(count: usize, mut state: u64) -> Vec<usize> {
    let mut pages: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(last, (state >> 33) as usize % (last + 1));
    }
    pages
}

/// Serves memory from `source` in random order, with small, adaptive and large windows.
pub(super) fn assert_serves(source: &Arc<dyn PageSource>, bytes: &[u8]) {
    for (seed, window) in [(1, Some(PAGE as u64)), (2, None), (3, Some(1 << 20))] {
        let mapping = Mapping::new(bytes.len(), MappingKind::Private).unwrap();
        let Some(served) = serve(mapping, Arc::clone(source), |options| options.window = window) else {
            return;
        };
        for page in shuffled(bytes.len() / PAGE, seed) {
            assert!(
                read(&served.mapping, page * PAGE, PAGE) == bytes[page * PAGE..(page + 1) * PAGE],
                "page {page}, window {window:?}"
            );
        }
        served.close();
    }
}

pub(super) fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}

/// A diff of `size` bytes with holes but for these pages, each filled with one byte.
pub(super) fn diff(path: &Path, size: usize, pages: &[(usize, u8)]) -> PathBuf {
    let file = File::create(path).unwrap();
    file.set_len(size as u64).unwrap();
    for &(page, byte) in pages {
        file.write_all_at(&[byte; PAGE], (page * PAGE) as u64).unwrap();
    }
    path.to_owned()
}

#[test]
fn memory_of_every_kind_is_a_source() {
    let bytes = image(PAGES);
    assert_serves(&(Arc::new(MemorySource::new(bytes.clone())) as Arc<dyn PageSource>), &bytes);

    let anonymous = Arc::new(Mapping::new(bytes.len(), MappingKind::Private).unwrap());
    anonymous.write(0, &bytes).unwrap();
    assert_serves(&(Arc::new(MappingSource::new(anonymous).unwrap()) as Arc<dyn PageSource>), &bytes);

    let shared = Mapping::new(bytes.len(), MappingKind::Shared).unwrap();
    shared.write(0, &bytes).unwrap();
    let memfd = shared.memfd().unwrap().as_fd().try_clone_to_owned().unwrap();
    let source = FileSource::of_fd(memfd, Path::new("(memfd)")).unwrap();
    assert_serves(&(Arc::new(source) as Arc<dyn PageSource>), &bytes);
}

#[test]
fn files_are_served_through_and_past_the_page_cache_also_their_ragged_ends() {
    let dir = dir();
    let bytes = image(PAGES);
    let path = dir.path().join("image");
    // The end is in the middle of a block, and no page of the memory.
    write(&path, &[&bytes[..], &[7; 1234]].concat());
    for options in [FileOptions::default(), FileOptions { direct: true, ..FileOptions::default() }] {
        let source = match FileSource::open_with(&path, options) {
            Err(error @ PagerError::NotAnImage { .. }) if options.direct => {
                return println!("skipped: {error}");
            }
            source => source.unwrap(),
        };
        assert_eq!(source.size(), (bytes.len() + PAGE) as u64, "whole pages");
        let mut end = [1; 66 + PAGE];
        source.read(source.size() - end.len() as u64, &mut end).unwrap();
        assert_eq!(end[..66], bytes[bytes.len() - 66..]);
        assert_eq!(end[66..1300], [7; 1234]);
        assert_eq!(end[1300..], [0; PAGE - 1234]);
        for (offset, len) in
            [(0, 1), (511, 2), (513, 5000), (4095, 4098), (1, (1 << 20) + 77), (0, PAGES * PAGE)]
        {
            let mut part = vec![0; len];
            source.read(offset as u64, &mut part).unwrap();
            assert!(part == bytes[offset..offset + len], "{offset}+{len}, {options:?}");
        }
        let whole = [&bytes[..], &end[66..]].concat();
        assert_serves(&(Arc::new(source) as Arc<dyn PageSource>), &whole);
    }
}

#[test]
fn a_file_read_past_the_page_cache_that_is_cut_short_is_an_error() {
    let dir = dir();
    let path = dir.path().join("image");
    write(&path, &image(PAGES));
    let source = match FileSource::open_with(&path, FileOptions { direct: true, ..FileOptions::default() }) {
        Err(error @ PagerError::NotAnImage { .. }) => return println!("skipped: {error}"),
        source => source.unwrap(),
    };
    File::options().write(true).open(&path).unwrap().set_len(10 * PAGE as u64 + 77).unwrap();

    for page in [0, 10, 11, PAGES - 1] {
        let error = source.read((page * PAGE) as u64, &mut [0; PAGE]).unwrap_err();
        assert!(matches!(error, PagerError::SourceTruncated { .. }), "page {page}: {error}");
    }
}

#[test]
fn diffs_over_a_base_are_served_latest_first_and_their_holes_fall_through() {
    let dir = dir();
    let mut bytes = image(PAGES);
    let base = dir.path().join("base");
    write(&base, &bytes);
    let size = bytes.len();
    let layers: [&[(usize, u8)]; 3] =
        [&[(0, 1), (1, 1), (2, 1), (100, 1)], &[(1, 2), (300, 2)], &[(2, 3), (300, 3), (511, 3), (40, 0)]];
    let diffs: Vec<PathBuf> =
        (0..3).map(|n| diff(&dir.path().join(format!("diff{n}")), size, layers[n])).collect();
    for &(page, byte) in layers.iter().copied().flatten() {
        bytes[page * PAGE..(page + 1) * PAGE].fill(byte);
    }
    let base = Arc::new(FileSource::open(&base).unwrap());

    let source = LayeredSource::new(base, &diffs).unwrap();

    let mut whole = vec![0; size];
    source.read(0, &mut whole).unwrap();
    if whole != bytes && whole[4 * PAGE..5 * PAGE] == [0; PAGE] {
        return println!("skipped: this file system does not tell where a file has holes");
    }
    for (offset, len) in [(0, 5 * PAGE), (PAGE - 1, 2), (99 * PAGE + 5, 2 * PAGE), (510 * PAGE, 2 * PAGE)] {
        let mut part = vec![0; len];
        source.read(offset as u64, &mut part).unwrap();
        assert!(part == bytes[offset..offset + len], "{offset}+{len}");
    }
    assert_serves(&(Arc::new(source) as Arc<dyn PageSource>), &bytes);
}

#[test]
fn a_diff_that_cannot_be_is_refused_by_its_position_and_one_cut_short_later_is_an_error() {
    let dir = dir();
    let size = 16 * PAGE;
    let base: Arc<dyn PageSource> = Arc::new(Bytes(image(16)));
    let good = diff(&dir.path().join("good"), size, &[(3, 3)]);
    let long = diff(&dir.path().join("long"), size + PAGE, &[(3, 3)]);

    let error = LayeredSource::new(Arc::clone(&base), &[good.clone(), long]).unwrap_err();
    assert!(matches!(error, PagerError::Layer { index: 1, .. }), "{error}");
    assert_eq!(error.code(), "ERR_UFFD_SOURCE");
    let missing = dir.path().join("missing");
    assert!(matches!(LayeredSource::new(Arc::clone(&base), &[missing]), Err(PagerError::Source { .. })));

    let source = LayeredSource::new(base, std::slice::from_ref(&good)).unwrap();
    File::options().write(true).open(good).unwrap().set_len(size as u64 - 1).unwrap();
    let error = source.read(0, &mut vec![0; size]).unwrap_err();
    assert!(matches!(error, PagerError::SourceTruncated { .. }), "{error}");
    assert!(!matches!(source.read_now(3 * PAGE as u64, &mut [0; PAGE]), Ok(pager::ReadNow::Done)));
    source.read(0, &mut [0; PAGE]).unwrap();
}

#[test]
fn each_clone_of_an_image_has_its_own_bytes_over_it() {
    let bytes = image(PAGES);
    let base: Arc<dyn PageSource> = Arc::new(MemorySource::new(bytes.clone()));
    for clone in 1..4_u8 {
        let identity = Overlay { offset: 5000 * u64::from(clone), bytes: vec![clone; 5000] };
        let mut expected = bytes.clone();
        expected[identity.offset as usize..identity.offset as usize + 5000].fill(clone);
        let source = OverlaySource::new(Arc::clone(&base), vec![identity]).unwrap();
        assert_serves(&(Arc::new(source) as Arc<dyn PageSource>), &expected);
    }
}

#[test]
fn one_source_feeds_several_sessions_at_once() {
    let dir = dir();
    let bytes = image(PAGES);
    let path = dir.path().join("image");
    write(&path, &bytes);
    let source: Arc<dyn PageSource> = Arc::new(FileSource::open(&path).unwrap());
    let sessions: Vec<_> = (0..4)
        .map_while(|_| {
            serve(Mapping::new(bytes.len(), MappingKind::Private).unwrap(), Arc::clone(&source), |_| {})
        })
        .collect();

    for page in shuffled(PAGES, 9) {
        for served in &sessions {
            assert!(read(&served.mapping, page * PAGE, PAGE) == bytes[page * PAGE..(page + 1) * PAGE]);
        }
    }
    for served in &sessions {
        served.close();
    }
}

#[test]
fn a_source_that_fails_for_a_while_is_tried_again_and_nobody_notices() {
    let bytes = image(PAGES);
    let options = RetryOptions { first_pause: Duration::from_micros(50), ..RetryOptions::default() };
    let flaky: Arc<dyn PageSource> = Arc::new(super::failing::Flaky::new(bytes.clone()));

    let source = RetrySource::new(flaky, options).unwrap();

    assert_serves(&(Arc::new(source) as Arc<dyn PageSource>), &bytes);
}
