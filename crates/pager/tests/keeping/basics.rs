//! One death, and what is there afterwards.

use std::sync::Arc;

use pager::{Pager, PagerOptions, Rest, Successor};
use uffd::{Features, Modes, Userfaultfd};

use crate::support::area::{Area, Made, all_events, ended, new_uffd, register, started};
use crate::support::kept::{Kept, PagerProcess, Source, to_serve};
use crate::support::{PAGE, finish, image, told};

const PAGES: usize = 64;

/// An area that a process of its own serves.
struct Served {
    area: Area,
    bytes: Vec<u8>,
    process: PagerProcess,
    kept: Kept,
}

fn served(features: Features, modes: Modes, adjust: impl FnOnce(&mut pager::KeptSession)) -> Option<Served> {
    let uffd: Userfaultfd = new_uffd(features)?;
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, modes);
    let process = PagerProcess::start("pager_process");
    let mut session = to_serve(area);
    adjust(&mut session);
    process.serve(session, Source::AtHand(PAGES), &uffd, None);
    let kept = process.kept();
    process.started();
    Some(Served { area, bytes: image(PAGES), process, kept })
}

fn page(bytes: &[u8], page: usize) -> &[u8] {
    &bytes[page * PAGE..(page + 1) * PAGE]
}

#[test]
fn what_was_given_back_before_the_pager_was_killed_reads_zero_after_it_and_all_else_the_image() {
    let Some(Served { area, bytes, process, kept }) = served(all_events(), Modes::MISSING, |_| {}) else {
        return;
    };
    // One that was there, and one that was not.
    assert!(area.part(3, 1).read() == page(&bytes, 3));
    assert!(area.part(5, 1).read() == page(&bytes, 5));
    area.part(3, 2).discard(Made::Private);
    process.kill();
    // Nobody answers it, and it does not read zeros either.
    let waiting = area.part(9, 1).peek();

    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let successor = Successor { source: Source::AtHand(PAGES).open(), observer, server: None };
    pager.resume_session(&kept.session, kept.descriptors(), successor).unwrap();
    let info = started(&notices);

    assert_eq!((info.id, info.taken_over, info.lost_children), (kept.session.id, 1, 0));
    assert_eq!(info.label, "image");
    assert!(finish(&waiting).unwrap() == page(&bytes, 9));
    assert!(area.part(3, 2).is_zero());
    assert!(area.part(5, 1).read() == page(&bytes, 5));
    for at in (0..PAGES).filter(|at| !(3..5).contains(at)) {
        assert!(area.part(at, 1).read() == page(&bytes, at), "page {at}");
    }
    let stats = info.stats.snapshot();
    assert_eq!(stats.pages_removed, 2, "the counters go on");
    pager.close_session(info.id, Rest::Poison);
    assert_eq!(ended(&notices, info.id).reason, pager::EndReason::Closed);
    drop(Arc::clone(&info));
}
