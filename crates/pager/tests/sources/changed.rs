//! A file that is written to while it is served: neither its old bytes nor its new ones are the image any more.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use nix::fcntl::{FallocateFlags, fallocate};
use pager::{FileOptions, FileSource, LayeredSource, PageSource, PagerError, ReadNow};
use uffd::{Mapping, MappingKind};

use super::failing::assert_poisoned;
use crate::support::{PAGE, image, serve};

const SIZE: usize = 16 * PAGE;

fn file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image");
    fs::write(&path, image(16)).unwrap();
    long_ago(&File::options().write(true).open(&path).unwrap());
    (dir, path)
}

/// Written at a time that no clock's tick takes for now.
fn long_ago(file: &File) {
    file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
}

type Change = fn(&File);

/// Each leaves a file that is as long as before, or longer.
const CHANGES: [(&str, Change); 4] = [
    ("cut short, and long again", |file| {
        file.set_len(0).unwrap();
        file.set_len(SIZE as u64).unwrap();
    }),
    ("a byte", |file| file.write_all_at(&[1], 5000).unwrap()),
    ("longer", |file| file.set_len(2 * SIZE as u64).unwrap()),
    ("a hole", |file| {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, hole, 4096, 4096).unwrap();
    }),
];

#[test]
fn a_file_that_was_written_to_gives_no_page_any_more() {
    for (what, change) in CHANGES {
        let (_dir, path) = file();
        let source = FileSource::open(&path).unwrap();
        source.read(0, &mut [0; PAGE]).unwrap();
        change(&File::options().write(true).open(&path).unwrap());

        for page in [0, 15] {
            let offset = (page * PAGE) as u64;
            let error = source.read(offset, &mut [0; PAGE]).unwrap_err();
            assert!(matches!(error, PagerError::SourceChanged { .. }), "{what}: {error}");
            assert_eq!(error.code(), "ERR_UFFD_SOURCE");
            assert!(!matches!(source.read_now(offset, &mut [0; PAGE]), Ok(ReadNow::Done)), "{what}");
            assert!(!source.zeros(offset, PAGE as u64), "{what}");
        }
        source.put_right();
        source.read(0, &mut [0; PAGE]).unwrap();
    }
}

#[test]
fn who_waits_for_a_page_of_a_file_that_was_cut_short_and_is_long_again_gets_no_zeros() {
    let (_dir, path) = file();
    let source = FileSource::open(&path).unwrap();
    let mapping = Mapping::new(SIZE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, Arc::new(source), |_| {}) else { return };
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(0).unwrap();
    file.set_len(SIZE as u64).unwrap();

    assert_poisoned(&served, 3);
}

#[test]
fn a_diff_that_was_written_to_gives_no_page_any_more_whatever_is_said_of_it() {
    let (dir, base) = file();
    let path = dir.path().join("diff");
    let diff = File::create_new(&path).unwrap();
    diff.set_len(SIZE as u64).unwrap();
    diff.write_all_at(&image(1), 0).unwrap();
    long_ago(&diff);
    let base = Arc::new(FileSource::open(&base).unwrap());
    let source = match LayeredSource::new(base, &[path]) {
        Ok(source) => source,
        Err(error) => return println!("skipped: {error}"),
    };
    diff.write_all_at(&image(1), PAGE as u64).unwrap();

    for _ in 0..2 {
        let error = source.read(0, &mut [0; PAGE]).unwrap_err();
        assert!(matches!(error, PagerError::SourceChanged { .. }), "{error}");
        // Where it has data was found before.
        source.put_right();
    }
}

#[test]
fn a_file_that_may_change_gives_what_it_has_and_fails_where_it_is_cut_short() {
    let (_dir, path) = file();
    let options = FileOptions { may_change: true, ..FileOptions::default() };
    let source = FileSource::open_with(&path, options).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[5; PAGE], PAGE as u64).unwrap();

    let mut page = [0; PAGE];
    source.read(PAGE as u64, &mut page).unwrap();
    assert_eq!(page, [5; PAGE]);
    file.set_len(PAGE as u64).unwrap();
    let error = source.read(0, &mut page).unwrap_err();
    assert!(matches!(error, PagerError::SourceTruncated { .. }), "{error}");
}

#[test]
fn a_file_that_was_cut_short_before_it_is_opened_again_fails_until_it_is_whole() {
    let (_dir, path) = file();
    let whole = |len: usize| fs::write(&path, vec![7; len]).unwrap();
    for len in [0, SIZE - 77] {
        whole(len);
        let fd = File::open(&path).unwrap().into();
        let source = FileSource::of_fds(fd, None, &path, Some(SIZE as u64)).unwrap();
        assert_eq!(source.size(), SIZE as u64);

        let error = source.read(0, &mut [0; PAGE]).unwrap_err();

        assert!(matches!(error, PagerError::SourceTruncated { .. }), "{error}");
        assert!(!source.zeros(PAGE as u64, PAGE as u64));
        whole(SIZE);
        let mut page = [0; PAGE];
        source.read(PAGE as u64, &mut page).unwrap();
        assert_eq!(page, [7; PAGE]);
    }
}

#[test]
fn other_names_and_rights_are_no_change() {
    let (dir, path) = file();
    let source = FileSource::open(&path).unwrap();
    let name = |name| dir.path().join(name);
    fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    fs::hard_link(&path, name("link")).unwrap();
    fs::rename(&path, name("other")).unwrap();
    source.read(0, &mut [0; PAGE]).unwrap();
    fs::remove_file(name("other")).unwrap();
    fs::remove_file(name("link")).unwrap();

    source.read(0, &mut [0; PAGE]).unwrap();
}
