//! The SIGBUS feature: no messages; each missing (or protected) page is a signal, which is answered in the handler. A child
//! inherits that.

use uffd::{CopyOptions, EventBuffer, Features, Modes};

use crate::forking::{fork, forked};
use crate::memory::{Area, Memory, contents, uffd};
use crate::signals::{fill_pages, hits, stop_filling};
use crate::support::finish;

pub fn case(memory: Memory, write_protect: bool) {
    let Some(uffd) = uffd(Features::SIGBUS | Features::EVENT_FORK) else { return };
    let area = Area::usual(memory);
    let wp = if write_protect { Modes::WRITE_PROTECT } else { Modes::empty() };
    area.register(uffd, Modes::MISSING | wp);
    let options = CopyOptions { write_protect, ..CopyOptions::default() };
    fill_pages(area, uffd, contents(area.count, area.page()), options);

    for page in 0..area.count {
        assert!(area.holds(page, page), "page {page}");
        assert_eq!(hits(page), 1, "one signal for page {page}");
        area.span().poke(page, 0, 1);
        assert_eq!(hits(page), 1 + u32::from(write_protect), "writing to page {page}");
    }

    // A child finds nothing of what was released: one signal for each page, answered by putting other memory there.
    area.release();
    stop_filling();
    let span = area.span();
    // SAFETY: the child touches memory, and its handler calls mmap(2), which is async-signal-safe.
    let child = unsafe {
        fork(move || {
            for page in 0..span.count() {
                if span.peek(page, 0) != 0 || hits(page) != 1 {
                    return 1;
                }
            }
            0
        })
    };
    let of_child = forked(uffd);
    let child = finish(&child);
    assert_eq!(child.exit_code(), 0);

    let mut buffer = EventBuffer::new(16);
    assert_eq!(of_child.read_events(&mut buffer).unwrap(), 0, "the child's faults are no messages");
    assert_eq!(uffd.read_events(&mut buffer).unwrap(), 0, "nor are the parent's");
    assert_eq!((0..area.count).map(hits).sum::<u32>(), 0, "the parent had none since");
}

cases!(|memory| case(memory, false); all);
