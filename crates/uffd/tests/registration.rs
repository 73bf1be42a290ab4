//! Registering, registering again, and giving back: modes are added and never lost, waiters are woken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;

use nix::errno::Errno;
use uffd::{CopyOptions, FaultKind, Features, Ioctls, MappingKind, Modes, UffdError, Userfaultfd};

use support::{PAGE, elsewhere, fault, finish, pages, register, registered, uffd};

const M: Modes = Modes::MISSING;
const W: Modes = Modes::WRITE_PROTECT;
const C: Modes = Modes::MINOR;

fn try_register(uffd: &Userfaultfd, start: u64, len: u64, modes: Modes) -> Result<Ioctls, UffdError> {
    // SAFETY: no reference to the memory exists.
    unsafe { uffd.register(start, len, modes) }
}

#[test]
fn every_combination_of_modes_reports_the_ioctls_it_allows() {
    for kind in [MappingKind::Private, MappingKind::Shared] {
        for bits in 1..8 {
            let modes = Modes::from_bits_retain(bits);
            let Some(uffd) = uffd(Features::empty()) else { return };
            let mapping = pages(2, kind);

            let result = try_register(&uffd, mapping.address(), mapping.len() as u64, modes);

            if kind == MappingKind::Private && modes.contains(C) {
                assert_eq!(result.unwrap_err().errno(), Some(libc::EINVAL), "{kind:?} {modes:?}");
                continue;
            }
            let ioctls = result.unwrap();
            assert!(ioctls.contains(Ioctls::WAKE | Ioctls::COPY), "{kind:?} {modes:?}: {ioctls}");
            assert_eq!(
                ioctls.contains(Ioctls::WRITEPROTECT),
                modes.contains(W),
                "{kind:?} {modes:?}: {ioctls}"
            );
            assert_eq!(ioctls.contains(Ioctls::CONTINUE), modes.contains(C), "{kind:?} {modes:?}: {ioctls}");
        }
    }
}

#[test]
fn no_modes_and_impossible_ranges_are_refused() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let mapping = pages(2, MappingKind::Private);

    for (start, len, modes) in [
        (mapping.address(), PAGE, Modes::empty()),
        (mapping.address() + 1, PAGE, M),
        (mapping.address(), 100, M),
        (mapping.address(), 0, M),
        (u64::MAX - PAGE + 1, 2 * PAGE, M),
    ] {
        assert_eq!(
            try_register(&uffd, start, len, modes).unwrap_err().errno(),
            Some(libc::EINVAL),
            "{start:#x}+{len}"
        );
    }
}

#[test]
fn registering_for_writes_later_keeps_missing_faults() {
    let Some((uffd, mapping)) = registered(2, M, Features::empty()) else { return };
    register(&uffd, &mapping, W);
    let mapping = Arc::new(mapping);
    let writer = Arc::clone(&mapping);
    let written = elsewhere(move || writer.write(0, &[7]).unwrap());

    let missing = fault(&uffd);
    assert_eq!((missing.kind, missing.write), (FaultKind::Missing, true));
    let page = [5_u8; PAGE as usize];
    let options = CopyOptions { write_protect: true, ..CopyOptions::default() };
    // SAFETY: `page` lives across the call.
    unsafe { uffd.copy(mapping.address(), page.as_ptr(), page.len(), options) }.unwrap();
    let protected = fault(&uffd);
    assert_eq!((protected.kind, protected.write), (FaultKind::WriteProtect, true));
    uffd.write_protect(mapping.address(), PAGE, false, true).unwrap();

    finish(&written);
    let mut bytes = [0; 2];
    mapping.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [7, 5]);
}

#[test]
fn a_registration_that_fails_half_way_leaves_what_was_there() {
    let Some(owner) = uffd(Features::empty()) else { return };
    let Some(other) = uffd(Features::empty()) else { return };
    let mapping = pages(3, MappingKind::Private);
    let at = |page: u64| mapping.address() + page * PAGE;
    try_register(&owner, at(0), PAGE, M).unwrap();
    try_register(&other, at(2), PAGE, M).unwrap();

    let error = try_register(&owner, at(0), 3 * PAGE, W).unwrap_err();

    assert_eq!(error.errno(), Some(Errno::EBUSY as i32));
    // Still for missing faults only, and the page in between for nothing.
    assert_eq!(owner.write_protect(at(0), PAGE, true, true), Err(UffdError::NotRegistered));
    owner.zero(at(0), PAGE, true).unwrap();
    assert_eq!(owner.zero(at(1), PAGE, true), Err(UffdError::NotRegistered));
}

#[test]
fn unregistering_wakes_who_waits_for_a_protected_page() {
    let Some((uffd, mapping)) = registered(1, W, Features::empty()) else { return };
    mapping.write(0, &[1]).unwrap();
    uffd.write_protect(mapping.address(), PAGE, true, true).unwrap();
    let mapping = Arc::new(mapping);
    let writer = Arc::clone(&mapping);
    let written = elsewhere(move || writer.write(0, &[2]).unwrap());
    assert_eq!(fault(&uffd).kind, FaultKind::WriteProtect);

    uffd.unregister(mapping.address(), PAGE).unwrap();

    finish(&written);
}

#[test]
fn the_memory_of_a_process_that_is_gone_is_told_apart_from_a_lack_of_memory() {
    let Some(uffd) = support::of_the_dead() else { return };

    assert!(uffd.is_dead());
    assert_eq!(try_register(&uffd, 0x10_0000, PAGE, M), Err(UffdError::UffdClosed));
    assert_eq!(uffd.unregister(0x10_0000, PAGE), Err(UffdError::UffdClosed));
    assert_eq!(uffd.zero(0x10_0000, PAGE, true), Err(UffdError::UffdClosed));
}
