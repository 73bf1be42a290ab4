//! Dirty tracking without messages, and what is told about pages.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::num::NonZeroU64;

use support::{PAGE, pages, register, registered, uffd};
use uffd::pagemap::{Categories, Pagemap, PagemapError, ScanOptions};
use uffd::{AnonymousOptions, Features, Mapping, MappingKind, Modes, Pages, Residency};

const W: Modes = Modes::WRITE_PROTECT;

/// `count` pages whose writes are tracked, all protected.
fn tracked(count: usize) -> Option<(uffd::Userfaultfd, Mapping)> {
    let uffd = uffd(Features::WP_ASYNC)?;
    // Page by page: a huge page would be written as a whole.
    let options = AnonymousOptions { pages: Pages::Small, shared: false };
    let memory = Mapping::anonymous(count * PAGE as usize, options).unwrap();
    register(&uffd, &memory, W);
    uffd.write_protect(memory.address(), memory.len() as u64, true, false).unwrap();
    Some((uffd, memory))
}

fn end(memory: &Mapping) -> u64 {
    memory.address() + memory.len() as u64
}

/// Pages of regions, relative to the mapping.
fn found(memory: &Mapping, regions: &[uffd::pagemap::Region]) -> Vec<(u64, u64)> {
    let page = |address: u64| (address - memory.address()) / PAGE;
    regions.iter().map(|region| (page(region.start), page(region.end))).collect()
}

#[test]
fn what_was_written_is_found_once_and_protected_in_the_same_step() {
    let Some((_uffd, memory)) = tracked(16) else { return };
    let map = Pagemap::of_self().unwrap();
    for page in [1, 2, 9] {
        memory.write(page * PAGE as usize, &[1]).unwrap();
    }

    let first = map.scan_to_end(memory.address(), end(&memory), &ScanOptions::written()).unwrap();
    let taken = map.scan_to_end(memory.address(), end(&memory), &ScanOptions::take_written()).unwrap();
    let none = map.scan_to_end(memory.address(), end(&memory), &ScanOptions::take_written()).unwrap();
    memory.write(2 * PAGE as usize, &[2]).unwrap();
    let again = map.scan_to_end(memory.address(), end(&memory), &ScanOptions::take_written()).unwrap();

    assert_eq!(found(&memory, &first.regions), [(1, 3), (9, 10)]);
    assert_eq!(found(&memory, &taken.regions), [(1, 3), (9, 10)]);
    assert_eq!(found(&memory, &none.regions), []);
    assert_eq!(found(&memory, &again.regions), [(2, 3)]);
    assert_eq!(again.walk_end, end(&memory));
}

#[test]
fn a_scan_with_limits_stops_and_goes_on_from_there() {
    let Some((_uffd, memory)) = tracked(16) else { return };
    let map = Pagemap::of_self().unwrap();
    for page in (0..16).step_by(2) {
        memory.write(page * PAGE as usize, &[1]).unwrap();
    }
    let two = ScanOptions { max_regions: 2, ..ScanOptions::written() };
    let three_pages = ScanOptions { max_pages: NonZeroU64::new(3), ..ScanOptions::written() };

    let step = map.scan(memory.address(), end(&memory), &two).unwrap();
    let rest = map.scan_to_end(step.walk_end, end(&memory), &two).unwrap();
    let few = map.scan_to_end(memory.address(), end(&memory), &three_pages).unwrap();

    assert_eq!(found(&memory, &step.regions), [(0, 1), (2, 3)]);
    assert!(step.walk_end < end(&memory));
    assert_eq!(found(&memory, &rest.regions).len(), 6);
    assert_eq!(found(&memory, &few.regions), [(0, 1), (2, 3), (4, 5)]);
}

#[test]
fn memory_whose_writes_are_not_tracked_is_an_error_and_not_clean() {
    let Some((_uffd, memory)) = registered(4, W, Features::empty()) else { return };
    let map = Pagemap::of_self().unwrap();
    memory.write(0, &[1]).unwrap();

    let error = map.scan_to_end(memory.address(), end(&memory), &ScanOptions::take_written()).unwrap_err();

    assert!(matches!(error, PagemapError::NotTracked { .. }), "{error}");
}

#[test]
fn categories_tell_what_a_page_is() {
    let memory = pages(4, MappingKind::Private);
    memory.write(0, &[1]).unwrap();
    memory.read(PAGE as usize, &mut [0]).unwrap();
    let options = ScanOptions {
        any_of: Categories::PRESENT,
        report: Categories::PRESENT | Categories::ZERO | Categories::FILE,
        ..ScanOptions::default()
    };

    let scan = Pagemap::of_self().unwrap().scan(memory.address(), end(&memory), &options).unwrap();

    let categories: Vec<_> = scan.regions.iter().map(|region| region.categories).collect();
    assert_eq!(found(&memory, &scan.regions), [(0, 1), (1, 2)]);
    assert_eq!(categories, [Categories::PRESENT, Categories::PRESENT | Categories::ZERO]);
}

#[test]
fn ranges_that_end_before_they_start_are_refused() {
    let map = Pagemap::of_self().unwrap();

    let error = map.scan(2 * PAGE, PAGE, &ScanOptions::written()).unwrap_err();

    assert!(matches!(error, PagemapError::Range { .. }), "{error}");
    assert_eq!(error.errno(), libc::EINVAL);
}

#[test]
fn a_poisoned_page_is_an_error_where_the_kernel_does_the_copying() {
    let Some((uffd, memory)) = registered(3, Modes::MISSING, Features::POISON) else { return };
    uffd.zero(memory.address(), PAGE, true).unwrap();
    memory.write_checked(0, &[5; 8]).unwrap();
    uffd.poison(memory.address() + PAGE, PAGE, true).unwrap();
    let mut bytes = [0; 8];

    memory.read_checked(0, &mut bytes).unwrap();

    assert_eq!(bytes, [5; 8]);
    let refused = [
        memory.read_checked(PAGE as usize - 4, &mut bytes).unwrap_err(),
        memory.write_checked(PAGE as usize, &bytes).unwrap_err(),
    ];
    assert_eq!(refused.map(|error| error.errno()), [libc::EFAULT; 2]);
}

#[test]
fn residency_tells_absent_cached_noted_and_present_apart() {
    let memory = pages(4, MappingKind::Shared);
    memory.write(0, &[1]).unwrap();
    nix::sys::uio::pwrite(memory.memfd().unwrap(), &[2], PAGE as i64).unwrap();
    let Some((uffd, private)) = registered(2, Modes::MISSING, Features::POISON) else { return };
    uffd.poison(private.address(), PAGE, true).unwrap();

    let shared = memory.residency(0, memory.len()).unwrap();
    let poisoned = private.residency(0, private.len()).unwrap();

    assert_eq!(shared, [Residency::Present, Residency::Cached, Residency::Absent, Residency::Absent]);
    assert_eq!(poisoned, [Residency::Noted, Residency::Absent]);
}
