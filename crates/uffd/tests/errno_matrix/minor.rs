//! `UFFDIO_CONTINUE`.

use uffd::{ContinueOptions, FaultKind};

use crate::support::{PAGE, fault, finish};
use crate::tables::{CHANGING, Done, EFAULT, EINVAL, ENOENT, EXIST, Row, partial, row};
use crate::world::{C, M, NONE, W, World, while_changing};

const PROTECTED: ContinueOptions = ContinueOptions { wake: true, write_protect: true };

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("CONTINUE: page in the cache", Done, || {
            let world = World::shared(M | C).in_page_cache(0);
            world.proceed(0, 1)?;
            assert_eq!(world.byte(0), 3);
            Ok(())
        }),
        row("CONTINUE: page not in the cache", EFAULT, || World::shared(M | C).proceed(0, 1)),
        row("CONTINUE: already mapped", EXIST, || {
            let world = World::shared(M | C).in_page_cache(0);
            world.proceed(0, 1)?;
            world.proceed(0, 1)
        }),
        row("CONTINUE: a later page missing", partial(1), || {
            World::shared(M | C).in_page_cache(0).proceed(0, 2)
        }),
        row("CONTINUE: anonymous memory", EINVAL, || World::private(M).proceed(0, 1)),
        row("CONTINUE: beyond end of file", EINVAL, || World::shared(M | C).truncated(4).proceed(5, 1)),
        row("CONTINUE: unregistered", ENOENT, || World::shared(NONE).in_page_cache(0).proceed(0, 1)),
        row("CONTINUE: past the end of its mapping", ENOENT, || {
            World::shared(M | C).in_page_cache(3).unmapped(4).proceed(3, 2)
        }),
        row("CONTINUE: range not registered for write-protect", EINVAL, || {
            World::shared(M | C).in_page_cache(0).proceed_with(0, 1, PROTECTED)
        }),
        row("CONTINUE: protected", Done, || {
            let world = World::shared(M | C | W).in_page_cache(0);
            world.proceed_with(0, 1, PROTECTED)?;
            assert!(world.is_protected(0));
            Ok(())
        }),
        row("CONTINUE: private memfd maps the cache page read-only", Done, || {
            let world = World::private_memfd(M | C).in_page_cache(0);
            world.proceed(0, 1)?;
            assert_eq!(world.byte(0), 3);
            finish(&world.writer(0));
            let mut byte = [0];
            nix::sys::uio::pread(world.memory.memfd().unwrap(), &mut byte, 0)?;
            assert_eq!((world.byte(0), byte), (9, [3]), "the write is this mapping's alone");
            Ok(())
        }),
        row("CONTINUE: wakes who waits", Done, || {
            let world = World::shared(C).in_page_cache(0);
            let reader = world.reader(0);
            assert_eq!(fault(&world.uffd).kind, FaultKind::Minor);
            world.proceed(0, 1)?;
            assert_eq!(finish(&reader), 3);
            Ok(())
        }),
        row("CONTINUE: a hole of a range without missing faults is filled silently", Done, || {
            let world = World::shared(C);
            assert_eq!(world.byte(0), 0);
            Ok(())
        }),
        row("CONTINUE: through another uffd", Done, || {
            let (world, other) = (World::shared(M | C).in_page_cache(0), World::private(NONE));
            Ok(other.uffd.continue_pages(world.at(0), PAGE, ContinueOptions::default())?)
        }),
        row("CONTINUE: unread event", CHANGING, || while_changing(|world| world.proceed(0, 1))),
    ]
}
