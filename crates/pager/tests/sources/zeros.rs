//! Pages that are zero in the source.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use pager::{FileSource, MemorySource, PageSource, PagerError, ReadNow, Region, Rest, ZeroSource};
use uffd::{Mapping, MappingKind, Residency};

use crate::support::huge::{HUGE, HugePages};
use crate::support::{Bytes, PAGE, Served, elsewhere, finish, image, read, serve};

/// An image whose pages are data or zero as the letters say.
fn mixed(letters: &str) -> Vec<u8> {
    let mut bytes = image(letters.len());
    for (page, _) in letters.char_indices().filter(|&(_, letter)| letter == '-') {
        bytes[page * PAGE..(page + 1) * PAGE].fill(0);
    }
    bytes
}

/// Memory of 16 pages that one window brings, and where it begins in its mapping.
fn whole_window(source: Arc<dyn PageSource>, kind: MappingKind) -> Option<(Served, usize)> {
    let len = 16 * PAGE;
    // Windows are aligned in addresses.
    let mapping = Mapping::new(2 * len, kind).unwrap();
    let address = mapping.address().next_multiple_of(len as u64);
    let base = (address - mapping.address()) as usize;
    let served = serve(mapping, source, |options| {
        options.window = Some(len as u64);
        options.regions = vec![Region { address, len: len as u64, source_offset: 0 }];
    })?;
    Some((served, base))
}

#[test]
fn one_window_of_data_and_zeros_reads_as_the_source_and_copies_the_data_only() {
    for kind in [MappingKind::Private, MappingKind::Shared] {
        for (letters, copied, zero) in [
            ("dddddddddddddddd", 16, 0),
            ("----------------", 0, 16),
            ("dd----dd-d------", 6, 10),
            ("d-d-d-d-d-d-d-d-", 16, 0),
            ("-----dddd------d", 5, 11),
        ] {
            let bytes = mixed(letters);
            let Some((served, base)) = whole_window(Arc::new(Bytes(bytes.clone())), kind) else { return };

            read(&served.mapping, base + 5 * PAGE, 1);
            assert!(read(&served.mapping, base, 16 * PAGE) == bytes, "{letters}");

            served.close();
            let stats = served.info.stats.snapshot();
            assert_eq!(
                (stats.pages_installed, stats.pages_zero, stats.pages_zeroed),
                (copied, zero, 0),
                "{letters}"
            );
            assert_eq!((stats.windows, stats.bytes_installed), (1, copied * PAGE as u64), "{letters}");
        }
    }
}

#[test]
fn a_zero_page_of_the_source_can_be_written_and_discarded_like_any_other() {
    let bytes = mixed("dddd--------dddd");
    let Some((served, base)) = whole_window(Arc::new(Bytes(bytes)), MappingKind::Private) else { return };
    read(&served.mapping, base, 1);

    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || {
        mapping.write_checked(base + 5 * PAGE, &[9; PAGE]).unwrap();
        mapping.discard(base + 6 * PAGE, PAGE).unwrap();
    }));

    assert_eq!(read(&served.mapping, base + 5 * PAGE, PAGE), [9; PAGE]);
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(base + 5 * PAGE, PAGE).unwrap()));
    assert_eq!(read(&served.mapping, base + 4 * PAGE, 4 * PAGE), [0; 4 * PAGE]);
    served.close();
    let stats = served.info.stats.snapshot();
    assert_eq!((stats.pages_zero, stats.pages_zeroed), (8, 2));
}

/// Knows that it is all zero; reading it would be wrong.
#[derive(Debug)]
struct Unread;

impl PageSource for Unread {
    fn size(&self) -> u64 {
        64 * PAGE as u64
    }
    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Err(PagerError::Internal("known zeros were read".to_owned()))
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), PagerError> {
        Err(PagerError::Internal("known zeros were read".to_owned()))
    }
    fn zeros(&self, _: u64, _: u64) -> bool {
        true
    }
}

#[test]
fn what_is_known_to_be_zero_is_not_read_neither_for_faults_nor_when_all_is_populated() {
    let sources: [Arc<dyn PageSource>; 2] = [Arc::new(Unread), Arc::new(ZeroSource::new(64 * PAGE as u64))];
    for source in sources {
        let mapping = Mapping::new(64 * PAGE, MappingKind::Private).unwrap();
        let Some(served) = serve(mapping, source, |_| {}) else { return };
        assert_eq!(read(&served.mapping, 40 * PAGE, PAGE), [0; PAGE]);

        served.pager.close_session(served.id, Rest::Populate);

        let end = served.end();
        assert!(end.error.is_none(), "{:?}", end.error);
        assert_eq!(served.info.stats.snapshot().pages_zero, 64);
        assert_eq!(served.info.stats.snapshot().pages_installed, 0);
        assert!(
            served.mapping.residency(0, 64 * PAGE).unwrap().iter().all(|&found| found == Residency::Present)
        );
        assert_eq!(read(&served.mapping, 0, 64 * PAGE), [0; 64 * PAGE]);
    }
}

#[test]
fn holes_of_a_sparse_file_are_zero_without_reading_until_somebody_writes_to_it() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image");
    let size = 256 * PAGE as u64;
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(&image(16), 32 * PAGE as u64).unwrap();
    let source = FileSource::open(&path).unwrap();
    if !source.zeros(128 * PAGE as u64, 16 * PAGE as u64) {
        println!("skipped: this file system does not tell where a file has holes");
        return;
    }
    assert!(source.zeros(48 * PAGE as u64, size - 48 * PAGE as u64));
    assert!(!source.zeros(32 * PAGE as u64, PAGE as u64));
    assert!(!source.zeros(0, size));

    let source = Arc::new(source);
    let Some((served, base)) = whole_window(Arc::<FileSource>::clone(&source) as _, MappingKind::Private)
    else {
        return;
    };
    assert_eq!(read(&served.mapping, base, 16 * PAGE), [0; 16 * PAGE]);
    served.close();
    assert_eq!(served.info.stats.snapshot().pages_zero, 16);

    file.write_all_at(&[5; PAGE], 128 * PAGE as u64).unwrap();
    assert!(
        !source.zeros(200 * PAGE as u64, PAGE as u64),
        "what was known of a file that has changed is void"
    );
    let error = source.read(128 * PAGE as u64, &mut [0; PAGE]).unwrap_err();
    assert!(matches!(error, PagerError::SourceChanged { .. }), "{error}");
}

#[test]
fn a_sparse_file_that_was_cut_short_is_a_failure_and_not_zeros() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 * PAGE as u64).unwrap();
    let source = FileSource::open(&path).unwrap();
    file.set_len(32 * PAGE as u64).unwrap();

    assert!(!source.zeros(0, PAGE as u64));
    let mapping = Mapping::new(64 * PAGE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, Arc::new(source), |_| {}) else { return };
    super::failing::assert_poisoned(&served, 0);
}

#[test]
fn huge_pages_that_are_zero_in_the_source_are_counted_as_such() {
    let Some(_pool) = HugePages::reserve(2) else { return };
    let mapping = match Mapping::new(2 * HUGE, MappingKind::Huge(HUGE)) {
        Ok(mapping) => mapping,
        Err(error) => return println!("skipped: {error}"),
    };
    let mut bytes = vec![0; 2 * HUGE];
    bytes[HUGE..].copy_from_slice(&image(HUGE / PAGE));
    let Some(served) = serve(mapping, Arc::new(MemorySource::new(bytes.clone())), |_| {}) else { return };

    assert!(read(&served.mapping, 0, 2 * HUGE) == bytes);

    served.close();
    let stats = served.info.stats.snapshot();
    assert_eq!((stats.pages_zero, stats.pages_installed), (1, 1));
}
