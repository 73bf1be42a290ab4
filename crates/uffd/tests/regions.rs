//! Registering many ranges with many userfaultfds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::ops::Range;

use support::{PAGE, elsewhere, fault, finish, of_the_dead, pages, register, registered, uffd};
use uffd::regions::{register_regions, unregister_regions};
use uffd::{Features, Mapping, MappingKind, Modes, UffdError};

const M: Modes = Modes::MISSING;
const W: Modes = Modes::WRITE_PROTECT;

fn range(memory: &Mapping, first: u64, count: u64) -> Range<u64> {
    let start = memory.address() + first * PAGE;
    start..start + count * PAGE
}

/// Whether the page is registered: only then does the kernel know a range to wake that a fill is refused in.
fn is_registered(uffd: &uffd::Userfaultfd, address: u64) -> bool {
    uffd.zero(address, PAGE, true) != Err(UffdError::NotRegistered)
}

#[test]
fn ranges_of_several_are_registered_and_the_dead_are_passed_over_by_name() {
    let (Some(first), Some(dead), Some(last)) =
        (uffd(Features::empty()), of_the_dead(), uffd(Features::empty()))
    else {
        return;
    };
    let (a, b) = (pages(4, MappingKind::Private), pages(4, MappingKind::Shared));
    let of_first = [range(&a, 0, 1), range(&a, 2, 2)];
    let of_dead = [range(&a, 0, 1), range(&a, 1, 1)];
    let of_last = [range(&b, 0, 4)];

    // SAFETY: no reference to the memory exists.
    let passed_over =
        unsafe { register_regions(&[(&first, &of_first), (&dead, &of_dead), (&last, &of_last)], M) }.unwrap();

    assert_eq!(passed_over, [1]);
    assert!(is_registered(&first, a.address() + 3 * PAGE) && is_registered(&last, b.address()));
    assert!(!is_registered(&first, a.address() + PAGE), "the gap between two ranges");
    let reader = elsewhere(move || {
        let mut byte = [1];
        a.read(0, &mut byte).unwrap();
        (a, byte)
    });
    let address = fault(&first).address;
    let passed_over =
        unregister_regions(&[(&first, &of_first), (&dead, &of_dead), (&last, &of_last)]).unwrap();
    assert_eq!(passed_over, [1]);
    let (a, byte) = finish(&reader);
    assert_eq!((address, byte), (a.address(), [0]), "whoever waits is woken and reads zero");
    assert!(!is_registered(&first, a.address()) && !is_registered(&last, b.address()));
}

#[test]
fn a_refused_range_undoes_what_the_call_did_and_nothing_else() {
    let Some((uffd, memory)) = registered(1, M, Features::empty()) else { return };
    let (more, others) = (pages(4, MappingKind::Private), pages(1, MappingKind::Private));
    let Some(owner) = support::uffd(Features::empty()) else { return };
    register(&owner, &others, M);
    let ranges = [range(&memory, 0, 1), range(&more, 0, 2), range(&others, 0, 1), range(&more, 3, 1)];

    // SAFETY: no reference to the memory exists.
    let error = unsafe { register_regions(&[(&uffd, &ranges)], M | W) }.unwrap_err();

    assert_eq!((error.refused.target, error.refused.range), (0, range(&others, 0, 1)));
    assert_eq!(error.refused.error.errno(), Some(libc::EBUSY));
    assert!(error.others.is_empty() && error.dead.is_empty());
    assert!(!is_registered(&uffd, more.address()) && !is_registered(&uffd, more.address() + 3 * PAGE));
    assert!(is_registered(&uffd, memory.address()), "it was registered before the call");
    assert!(is_registered(&owner, others.address()));
}

#[test]
fn refused_ranges_do_not_keep_others_from_being_unregistered() {
    let Some((uffd, memory)) = registered(2, M, Features::empty()) else { return };
    let backwards = Range { start: memory.address(), end: memory.address() - PAGE };
    let ranges = [backwards.clone(), range(&memory, 0, 2)];

    let error = unregister_regions(&[(&uffd, &ranges)]).unwrap_err();

    assert_eq!(error.refused.range, backwards);
    assert!(!is_registered(&uffd, memory.address()));
}
