//! `UFFDIO_WRITEPROTECT`.

use uffd::{FaultKind, Features, MappingKind};
use userfaultfd_sys as sys;

use crate::support::{PAGE, fault, finish, pages};
use crate::tables::{CHANGING, Done, EINVAL, ENOENT, Row, row};
use crate::world::{M, NONE, W, World, is_huge, raw, while_changing};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("WRITEPROTECT: all done", Done, || {
            let world = World::private(M | W).filled(0, 8);
            world.protect(0, 8)?;
            assert!(world.is_protected(0) && world.is_protected(7));
            Ok(())
        }),
        row("WRITEPROTECT: repeating it", Done, || {
            let world = World::private(M | W).filled(0, 1);
            world.protect(0, 1)?;
            world.protect(0, 1)?;
            assert!(world.is_protected(0));
            Ok(())
        }),
        row("WRITEPROTECT: undoing what is not set", Done, || {
            World::private(M | W).filled(0, 1).unprotect(0, 1)
        }),
        row("WRITEPROTECT: undoing wakes who waits", Done, || {
            let world = World::private(M | W).filled(0, 1);
            world.protect(0, 1)?;
            let writer = world.writer(0);
            assert_eq!(fault(&world.uffd).kind, FaultKind::WriteProtect);
            world.unprotect(0, 1)?;
            finish(&writer);
            assert_eq!(world.byte(0), 9);
            Ok(())
        }),
        row("WRITEPROTECT: registered without write-protect", ENOENT, || {
            World::private(M).filled(0, 1).protect(0, 1)
        }),
        row("WRITEPROTECT: unregistered", ENOENT, || World::private(NONE).protect(0, 1)),
        row("WRITEPROTECT: a range of another uffd of the process", Done, || {
            let (world, other) = (World::private(M | W).filled(0, 1), World::private(NONE));
            other.uffd.write_protect(world.at(0), PAGE, true, true)?;
            assert!(world.is_protected(0));
            let writer = world.writer(0);
            assert_eq!(fault(&world.uffd).kind, FaultKind::WriteProtect);
            other.uffd.write_protect(world.at(0), PAGE, false, true)?;
            assert!(!world.is_protected(0));
            assert_eq!(world.asleep(), 1, "the owner's sleeper was woken");
            world.wake(0)?;
            finish(&writer);
            Ok(())
        }),
        row("WRITEPROTECT: range with a hole", Done, || {
            let world = World::private(M | W).filled(0, 8).unmapped(3);
            world.protect(0, 8)?;
            assert!(world.is_protected(2) && world.is_protected(4));
            Ok(())
        }),
        row("WRITEPROTECT: running into a mapping without write-protect", ENOENT, || {
            let world = World::private(NONE);
            world.register_pages(0, 4, M | W)?;
            world.register_pages(4, 4, M)?;
            let world = world.filled(0, 4).filled(4, 4);
            let outcome = world.protect(2, 4);
            assert!(world.is_protected(2) && world.is_protected(3), "the first part is done");
            assert!(!world.is_protected(4));
            outcome
        }),
        row("WRITEPROTECT: WP and DONTWAKE", EINVAL, || {
            let world = World::private(M | W).filled(0, 1);
            let range = sys::uffdio_range { start: world.at(0), len: PAGE };
            let mode = sys::UFFDIO_WRITEPROTECT_MODE_WP | sys::UFFDIO_WRITEPROTECT_MODE_DONTWAKE;
            raw(&world.uffd, &mut sys::uffdio_writeprotect { range, mode })
        }),
        row("WRITEPROTECT: protecting without waking is asked for as the kernel takes it", Done, || {
            let world = World::private(M | W).filled(0, 1);
            world.uffd.write_protect(world.at(0), PAGE, true, false)?;
            assert!(world.is_protected(0));
            Ok(())
        }),
        row("WRITEPROTECT: unread event", CHANGING, || while_changing(|world| world.protect(0, 1))),
        row("WRITEPROTECT: one page inside a mapped transparent huge page", Done, || {
            let world = World::transparent()?;
            world.register_pages(0, 512, M | W)?;
            world.protect(5, 1)?;
            assert!(!is_huge(&world.memory), "it was to be split");
            assert_eq!([4, 5, 6].map(|page| world.is_protected(page)), [false, true, false]);
            Ok(())
        }),
        row("WRITEPROTECT: a hole of anonymous memory is passed over", Done, || {
            let world = World::private(M | W);
            world.protect(0, 1)?;
            assert!(!world.is_protected(0));
            Ok(())
        }),
        row("WRITEPROTECT: a hole of anonymous memory with WP_UNPOPULATED", Done, || {
            let world = World::marked();
            world.unprotect(0, 1)?;
            assert!(!world.is_protected(0));
            Ok(())
        }),
        row("WRITEPROTECT: a hole of shared memory", Done, || {
            let world = World::shared(W);
            world.protect(0, 1)?;
            let writer = world.writer(0);
            let fault = fault(&world.uffd);
            assert_eq!((fault.kind, fault.write), (FaultKind::WriteProtect, true));
            world.unprotect(0, 1)?;
            finish(&writer);
            Ok(())
        }),
        row("WRITEPROTECT: undoing with WP_ASYNC", Done, || {
            let world = World::with(Features::WP_ASYNC, pages(8, MappingKind::Private), W);
            world.protect(0, 8)?;
            world.unprotect(0, 8)
        }),
    ]
}
