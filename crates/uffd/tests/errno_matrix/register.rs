//! `UFFDIO_REGISTER`, `UFFDIO_UNREGISTER`, `UFFDIO_WAKE`.

use std::ops::Range;
use std::os::fd::AsFd;

use uffd::{Ioctls, MappingKind, Modes, Userfaultfd};

use crate::support::{PAGE, fault, finish, pages};
use crate::tables::{Done, EINVAL, Fails, Outcome, Row, row, skipped};
use crate::world::{C, M, NONE, W, World, dead, while_changing};

/// The same uffd, seen by an object that does not know what was registered: the crate adds modes to those it knows of.
fn forgetful(world: &World) -> Userfaultfd {
    Userfaultfd::adopt(world.uffd.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn register_by(uffd: &Userfaultfd, world: &World, modes: Modes) -> Result<Ioctls, uffd::UffdError> {
    // SAFETY: no reference to the memory exists.
    unsafe { uffd.register(world.at(0), 8 * PAGE, modes) }
}

/// Registers a range in which the fourth page has no mapping.
fn with_hole(range: Range<u64>) -> Outcome {
    let world = World::private(NONE).unmapped(3);
    world.register_pages(range.start, range.end - range.start, M)?;
    let registered: Vec<u64> = (0..8).filter(|&page| world.is_registered(page)).collect();
    let expected: Vec<u64> = range.filter(|&page| page != 3).collect();
    assert_eq!(registered, expected);
    Ok(())
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("REGISTER: mode 0", EINVAL, || World::private(NONE).register_pages(0, 1, NONE)),
        row("REGISTER: mode 8", EINVAL, || {
            World::private(NONE).register_pages(0, 1, Modes::from_bits_retain(8))
        }),
        row("REGISTER: nothing mapped in the range", EINVAL, || {
            World::private(NONE).unmapped(3).register_pages(3, 1, M)
        }),
        row("REGISTER: hole at the start", Done, || with_hole(3..8)),
        row("REGISTER: hole in the middle", Done, || with_hole(0..8)),
        row("REGISTER: hole at the end", Done, || with_hole(0..4)),
        row("REGISTER: an incompatible mapping in the range", EINVAL, || {
            let world = World::private(NONE).with_system_v(3)?;
            let outcome = world.register_pages(0, 8, M);
            assert!(!world.is_registered(0) && !world.is_registered(7), "something was registered");
            outcome
        }),
        row("REGISTER: minor faults of private memory", EINVAL, || {
            World::private(NONE).register_pages(0, 1, C)
        }),
        row("REGISTER: overlaps another uffd's range", Fails(libc::EBUSY), || {
            let (world, other) = (World::private(NONE), World::private(NONE));
            world.register_pages(4, 1, M)?;
            other.register(world.at(0), 8 * PAGE, M)
        }),
        row("REGISTER: the same again", Done, || World::private(M).register_pages(0, 8, M)),
        row("REGISTER: a subset again", Done, || World::private(M).register_pages(2, 3, M)),
        row("REGISTER: a missing range again as write-protect", Done, || {
            let world = World::private(M);
            register_by(&forgetful(&world), &world, W)?;
            // The kernel's own zeros, without a message: missing faults are not asked for any more.
            assert_eq!(world.byte(0), 0);
            assert_eq!(world.asleep(), 0);
            world.protect(0, 1)
        }),
        row("REGISTER: a missing range again as write-protect, through the object that knows", Done, || {
            let world = World::private(M);
            register_by(&world.uffd, &world, W)?;
            let reader = world.reader(0);
            assert_eq!(fault(&world.uffd).address, world.at(0));
            world.copy(0, 1)?;
            assert_eq!(finish(&reader), 7);
            Ok(())
        }),
        row("REGISTER: a missing and write-protect range again as missing", Done, || {
            let world = World::private(M | W);
            let ioctls = register_by(&forgetful(&world), &world, M)?;
            assert!(!ioctls.contains(Ioctls::WRITEPROTECT), "{ioctls}");
            // It can do so all the same.
            world.copy(0, 1)?;
            world.protect(0, 1)?;
            assert!(world.is_protected(0));
            Ok(())
        }),
        row("REGISTER: while an event is unread", Done, || {
            while_changing(|world| world.register_pages(0, 1, M))
        }),
        row("UNREGISTER: never registered", Done, || World::private(NONE).unregister(0, 8)),
        row("UNREGISTER: registered twice", Done, || {
            let world = World::private(M);
            world.register_pages(0, 8, M)?;
            world.unregister(0, 8)?;
            assert!(!world.is_registered(0));
            Ok(())
        }),
        row("UNREGISTER: twice", Done, || {
            let world = World::private(M);
            world.unregister(0, 1)?;
            world.unregister(0, 1)
        }),
        row("UNREGISTER: hole inside", Done, || {
            let world = World::private(M).unmapped(3);
            world.unregister(0, 8)?;
            assert!(!world.is_registered(0) && !world.is_registered(7));
            Ok(())
        }),
        row("UNREGISTER: nothing mapped", EINVAL, || World::private(M).unmapped(3).unregister(3, 1)),
        row("UNREGISTER: an incompatible mapping", EINVAL, || {
            World::private(M).with_system_v(3)?.unregister(0, 8)
        }),
        row("UNREGISTER: registered by another uffd", EINVAL, || {
            let (world, other) = (World::private(M), World::private(NONE));
            let outcome = other.uffd.unregister(world.at(0), PAGE);
            assert!(world.is_registered(0), "it was unregistered");
            Ok(outcome?)
        }),
        row("UNREGISTER: part of a range", Done, || {
            let world = World::private(M);
            world.unregister(2, 1)?;
            assert_eq!([1, 2, 3].map(|page| world.is_registered(page)), [true, false, true]);
            Ok(())
        }),
        row("UNREGISTER: while an event is unread", Done, || while_changing(|world| world.unregister(0, 1))),
        row("WAKE: unregistered", Done, || World::private(NONE).wake(0)),
        row("WAKE: unmapped", Done, || World::private(M).unmapped(3).wake(3)),
        row("WAKE: nobody waiting", Done, || World::private(M).wake(0)),
        row("WAKE: while an event is unread", Done, || while_changing(|world| world.wake(0))),
        row("WAKE: dead process", Done, || {
            Ok(dead().expect("made before the first row").wake(PAGE, PAGE)?)
        }),
        row("WAKE: somebody waiting faults again", Done, || {
            let world = World::private(M);
            let reader = world.reader(0);
            fault(&world.uffd);
            world.wake(0)?;
            assert_eq!(fault(&world.uffd).address, world.at(0));
            world.copy(0, 1)?;
            assert_eq!(finish(&reader), 7);
            Ok(())
        }),
    ]
}

/// Gives every other page of `memory` another protection until the process may have no more mappings.
fn use_up_mappings(memory: &uffd::Mapping) -> Outcome {
    for page in (1..memory.len() / PAGE as usize).step_by(2) {
        let address = memory.as_ptr().wrapping_add(page * PAGE as usize).cast();
        // SAFETY: a page of the row's own mapping, to which nothing refers.
        match unsafe { libc::mprotect(address, PAGE as usize, libc::PROT_READ) } {
            0 => {}
            _ => return Ok(()),
        }
    }
    skipped("vm.max_map_count is more than is worth using up")
}

/// In a process of its own: no other thread may need a mapping meanwhile.
pub(crate) fn rows_at_the_limit() -> Vec<Row> {
    vec![
        row("REGISTER: would exceed vm.max_map_count", Fails(libc::ENOMEM), || {
            let (world, filler) = (World::private(NONE), pages(1 << 17, MappingKind::Private));
            use_up_mappings(&filler)?;
            let outcome = world.register_pages(3, 1, M);
            drop(filler);
            assert!(!world.is_registered(3));
            outcome
        }),
        row("UNREGISTER: would exceed vm.max_map_count", Fails(libc::ENOMEM), || {
            let (world, filler) = (World::private(M), pages(1 << 17, MappingKind::Private));
            use_up_mappings(&filler)?;
            let outcome = world.unregister(3, 1);
            drop(filler);
            assert!(world.is_registered(3));
            outcome
        }),
    ]
}
