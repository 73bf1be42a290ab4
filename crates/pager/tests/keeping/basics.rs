//! One death, and what is there afterwards.

use pager::{EndReason, Rest};
use uffd::Modes;

use crate::memory::{Served, page, resume, served};
use crate::support::area::{Made, all_events, ended};
use crate::support::finish;

const PAGES: usize = 64;

#[test]
fn what_was_given_back_before_the_pager_was_killed_reads_zero_after_it_and_all_else_the_image() {
    let Some(served) = served(PAGES, all_events(), Modes::MISSING, |_| {}) else { return };
    let Served { area, bytes, process, kept, .. } = served;
    // One that was there, and one that was not.
    assert!(area.part(3, 1).read() == page(&bytes, 3));
    assert!(area.part(5, 1).read() == page(&bytes, 5));
    area.part(3, 2).discard(Made::Private);
    process.kill();
    // Nobody answers it, and it does not read zeros either.
    let waiting = area.part(9, 1).peek();

    let resumed = resume(&kept, PAGES);

    let info = &resumed.info;
    assert_eq!((info.id, info.taken_over, info.lost_children), (kept.session.id, 1, 0));
    assert_eq!(info.label, "image");
    assert!(finish(&waiting).unwrap() == page(&bytes, 9));
    assert!(area.part(3, 2).is_zero());
    for at in (0..PAGES).filter(|at| !(3..5).contains(at)) {
        assert!(area.part(at, 1).read() == page(&bytes, at), "page {at}");
    }
    assert_eq!(info.stats.snapshot().pages_removed, 2, "the counters go on");
    resumed.pager.close_session(info.id, Rest::Poison);
    assert_eq!(ended(&resumed.notices, info.id).reason, EndReason::Closed);
}
