//! pagemap_ioctl on transparent huge pages: whole, in halves, with limits that end inside one, and never touched.

use std::num::NonZeroU64;

use uffd::Features;
use uffd::pagemap::{Categories, ScanOptions};

use crate::memory::Area;
use crate::tracked::{Found, Tracked, transparent};

const NONE: Found = Found::new();

/// Two huge pages, written and protected, and the ordinary pages that one has.
fn huge() -> Option<(Tracked, usize)> {
    let (area, unit) = transparent(2)?;
    area.fill();
    let tracked = Tracked::new(area)?;
    if huge_pages(&tracked) != area.count {
        println!("skipped: no transparent huge pages could be had");
        return None;
    }
    Some((tracked, unit))
}

/// Ordinary pages that are parts of huge ones.
fn huge_pages(tracked: &Tracked) -> usize {
    let options =
        ScanOptions { all_of: Categories::HUGE, report: Categories::HUGE, ..ScanOptions::default() };
    tracked.found(&tracked.scan(&options).regions).iter().map(|(from, to)| to - from).sum()
}

fn rewrite(area: &Area) {
    (0..area.count).for_each(|page| area.span().poke(page, 0, 7));
}

case!(whole, 0, || {
    let Some((tracked, unit)) = huge() else { return };
    assert_eq!(tracked.written(), NONE);

    tracked.write([unit / 2]);

    // It was split to know: exactly one page of the one that was written to.
    assert_eq!(tracked.take(), [(unit / 2, unit / 2 + 1)]);
    assert_eq!(huge_pages(&tracked), unit);
    assert_eq!(tracked.take(), NONE);
    rewrite(&tracked.area);
    assert_eq!(tracked.take(), [(0, 2 * unit)]);
});

case!(half, 0, || {
    for first in [true, false] {
        let Some((area, unit)) = transparent(1) else { return };
        let Some(tracked) = Tracked::unprotected(area, Features::empty()) else { return };
        area.fill();
        let half = unit / 2;
        let (from, to, left) = if first { (0, half, (half, unit)) } else { (half, unit, (0, half)) };

        let taken = tracked.scan_part(from, to, &ScanOptions::take_written());

        assert_eq!(tracked.found(&taken.regions), [(from, to)]);
        assert_eq!(tracked.written(), [left], "the other half still is");
        assert_eq!(tracked.take(), [left]);
        assert_eq!(tracked.take(), NONE);
    }
});

case!(limited, 0, || {
    let Some((area, unit)) = transparent(2) else { return };
    let Some(tracked) = Tracked::unprotected(area, Features::empty()) else { return };
    area.fill();
    let limit = unit + unit / 4;
    let options = ScanOptions { max_pages: NonZeroU64::new(limit as u64), ..ScanOptions::take_written() };

    let taken = tracked.scan(&options);

    assert_eq!(tracked.found(&taken.regions), [(0, limit)]);
    assert_eq!(tracked.stopped(&taken), limit);
    assert_eq!(tracked.take(), [(limit, 2 * unit)], "nothing behind the limit was protected");
});

case!(unpopulated, 0, || {
    let Some((area, unit)) = transparent(2) else { return };
    let Some(tracked) = Tracked::unprotected(area, Features::empty()) else { return };

    let part = tracked.scan_part(1, 3, &ScanOptions::written());

    assert_eq!(tracked.found(&part.regions), [(1, 3)], "never protected is written");
    assert_eq!(tracked.take(), [(0, 2 * unit)]);
    assert_eq!(tracked.take(), NONE, "holes were protected like pages");
    tracked.write([unit + 3]);
    assert_eq!(tracked.take(), [(unit + 3, unit + 4)]);
});

case!(zero, 0, || {
    let Some((area, unit)) = transparent(2) else { return };
    let Some(tracked) = Tracked::unprotected(area, Features::empty()) else { return };
    assert!(area.span().is_zero(0));
    area.span().poke(unit, 0, 7);
    let zeros = ScanOptions {
        all_of: Categories::ZERO,
        report: Categories::ZERO | Categories::PRESENT | Categories::HUGE,
        ..ScanOptions::default()
    };

    let found = tracked.scan(&zeros);

    let categories: Vec<_> = found.regions.iter().map(|region| region.categories).collect();
    if categories == [Categories::ZERO | Categories::PRESENT] {
        println!("skipped: the kernel makes no huge page of zeros");
        return;
    }
    assert_eq!(tracked.found(&found.regions), [(0, unit)], "read, and never written to");
    assert_eq!(categories, [Categories::ZERO | Categories::PRESENT | Categories::HUGE]);
});
