//! Memory of this process that a pager serves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;

use pager::{EndReason, Rest};
use uffd::{Mapping, MappingKind, Residency};

use support::{Bytes, PAGE, elsewhere, finish, image, read, serve};

#[test]
fn every_page_reads_as_the_source_whatever_the_order() {
    let bytes = image(64);
    let mapping = Mapping::new(64 * PAGE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, Arc::new(Bytes(bytes.clone())), |_| {}) else { return };

    for page in [63, 0, 31, 32, 1] {
        assert!(
            read(&served.mapping, page * PAGE, PAGE) == bytes[page * PAGE..(page + 1) * PAGE],
            "page {page}"
        );
    }
    assert!(read(&served.mapping, 0, 64 * PAGE) == bytes);
    served.close();
}

#[test]
fn memory_given_back_reads_zero_and_never_the_source_again() {
    let bytes = image(16);
    let mapping = Mapping::new(16 * PAGE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, Arc::new(Bytes(bytes.clone())), |_| {}) else { return };
    assert!(read(&served.mapping, 0, PAGE) == bytes[..PAGE]);

    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(0, 2 * PAGE).unwrap()));

    assert!(read(&served.mapping, 0, 2 * PAGE) == [0; 2 * PAGE]);
    assert!(read(&served.mapping, 2 * PAGE, 14 * PAGE) == bytes[2 * PAGE..]);
    served.close();
}

#[test]
fn closing_does_with_what_is_missing_as_it_is_told() {
    let bytes = image(8);
    for (rest, state) in [
        (Rest::Populate, Residency::Present),
        (Rest::Poison, Residency::Noted),
        (Rest::Zero, Residency::Absent),
    ] {
        let mapping = Mapping::new(8 * PAGE, MappingKind::Private).unwrap();
        let Some(served) = serve(mapping, Arc::new(Bytes(bytes.clone())), |options| {
            options.window = Some(PAGE as u64);
        }) else {
            return;
        };
        read(&served.mapping, 0, 1);

        served.pager.close_session(served.id, rest);

        assert_eq!(served.end().reason, EndReason::Closed);
        let states = served.mapping.residency(0, 8 * PAGE).unwrap();
        assert_eq!(states[0], Residency::Present);
        assert!(states[1..].iter().all(|&found| found == state), "{rest:?}: {states:?}");
    }
}
