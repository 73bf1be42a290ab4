//! `UFFDIO_ZEROPAGE`.

use uffd::Features;

use crate::support::{PAGE, fault, finish};
use crate::tables::{CHANGING, Done, EFAULT, ENOENT, EXIST, Row, partial, row};
use crate::world::{M, NONE, W, World, while_changing};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("ZEROPAGE: all done", Done, || {
            let world = World::private(M);
            world.zero(0, 8)?;
            assert_eq!(world.byte(7), 0);
            Ok(())
        }),
        row("ZEROPAGE: shmem", Done, || World::shared(M).zero(0, 8)),
        row("ZEROPAGE: private memfd", Done, || {
            let world = World::private_memfd(M);
            world.zero(0, 8)?;
            assert_eq!(world.byte(0), 0);
            Ok(())
        }),
        row("ZEROPAGE: never registered", ENOENT, || World::private(NONE).zero(0, 1)),
        row("ZEROPAGE: unmapped", ENOENT, || World::private(M).unmapped(3).zero(3, 1)),
        row("ZEROPAGE: past the end of its mapping", ENOENT, || World::private(M).unmapped(4).zero(3, 2)),
        row("ZEROPAGE: beyond end of file", EFAULT, || World::shared(M).truncated(4).zero(5, 1)),
        row("ZEROPAGE: dst PROT_NONE", Done, || {
            World::private(M).with_protection(0, libc::PROT_NONE).zero(0, 1)
        }),
        row("ZEROPAGE: write-protect only range", Done, || World::private(W).zero(0, 1)),
        row("ZEROPAGE: page present", EXIST, || World::private(M).filled(0, 1).zero(0, 1)),
        row("ZEROPAGE: later page present", partial(3), || World::private(M).filled(3, 1).zero(0, 8)),
        row("ZEROPAGE: over poison", EXIST, || World::private(M).poisoned(0).zero(0, 1)),
        row("ZEROPAGE: over a write-protect marker", EXIST, || World::marked().zero(0, 1)),
        row("ZEROPAGE: over a guard page", EXIST, || World::private(M).guarded(0).zero(0, 1)),
        row("ZEROPAGE: through another uffd", Done, || {
            let (world, other) = (World::private(M), World::private(NONE));
            let reader = world.reader(0);
            fault(&world.uffd);
            other.uffd.zero(world.at(0), PAGE, true)?;
            assert_eq!(world.asleep(), 1, "the other's waiter was woken");
            world.wake(0)?;
            assert_eq!(finish(&reader), 0);
            Ok(())
        }),
        row("ZEROPAGE: the next write is no message", Done, || {
            let world = World::private(M);
            world.zero(0, 1)?;
            finish(&world.writer(0));
            assert_eq!(world.byte(0), 9);
            assert_eq!(world.uffd.read_events(&mut uffd::EventBuffer::new(1))?, 0);
            Ok(())
        }),
        row("ZEROPAGE: unread event", CHANGING, || while_changing(|world| world.zero(0, 1))),
        row("ZEROPAGE: another uffd's unread event", Done, || {
            while_changing(|_| World::with(Features::EVENT_REMOVE, pages(), M).zero(0, 1))
        }),
    ]
}

fn pages() -> uffd::Mapping {
    crate::support::pages(8, uffd::MappingKind::Private)
}
