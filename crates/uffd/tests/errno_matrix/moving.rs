//! `UFFDIO_MOVE`.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use nix::errno::Errno;
use uffd::{FileAccess, FileOptions, Mapping, MappingKind};
use userfaultfd_sys as sys;

use crate::support::{PAGE, finish, fork_and_exit, pages};
use crate::tables::{CHANGING, Done, EINVAL, ENOENT, EXIST, Expect, Is, Outcome, Row, partial, row};
use crate::world::{M, NONE, W, World, dead, is_huge, raw, transparent, while_changing};

/// Private pages with something in each.
fn written(count: usize) -> Mapping {
    let memory = pages(count, MappingKind::Private);
    memory.write(0, &vec![5; memory.len()]).unwrap();
    memory
}

/// Eight pages with something in each, not registered.
fn source() -> World {
    World::of(written(8), NONE)
}

fn to(world: &World, source: &World, page: u64, count: u64) -> Outcome {
    world.move_from(page, source.at(0), count, false)
}

/// What the kernel says where the crate does not ask it.
fn raw_move(world: &World, dst: u64, src: u64, len: u64, mode: u64) -> Outcome {
    raw(&world.uffd, &mut sys::uffdio_move { dst, src, len, mode, move_: 0 })
}

fn mlock(world: &World, page: u64) {
    // SAFETY: a page of the row's own; no byte changes.
    let result = unsafe { libc::mlock(world.pointer(page), PAGE as usize) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = answers();
    rows.extend(kinds_of_memory());
    rows
}

fn answers() -> Vec<Row> {
    vec![
        row("MOVE: all done", Done, || {
            let (world, source) = (World::private(M), source());
            to(&world, &source, 0, 2)?;
            assert_eq!((world.byte(0), world.byte(1)), (5, 5));
            // Gone from where it was: the kernel gives zeros.
            assert_eq!((source.byte(0), source.byte(2)), (0, 5));
            Ok(())
        }),
        row("MOVE: caller is not the uffd's process", EINVAL, || {
            let (uffd, source) = (dead().expect("made before the first row"), written(1));
            let options = uffd::MoveOptions::default();
            // SAFETY: nothing of ours is at the destination, which is another process's; the source has no references.
            Ok(unsafe { uffd.move_pages(0x10_0000, source.address(), PAGE, options) }?)
        }),
        row("MOVE: dst not registered", EINVAL, || to(&World::private(NONE), &source(), 0, 1)),
        row("MOVE: dst registered with another uffd", EINVAL, || {
            let (world, other, source) = (World::private(M), World::private(NONE), source());
            // SAFETY: no reference to either side exists.
            Ok(unsafe {
                other.uffd.move_pages(world.at(0), source.at(0), PAGE, uffd::MoveOptions::default())
            }?)
        }),
        row("MOVE: dst unmapped", ENOENT, || to(&World::private(M).unmapped(3), &source(), 3, 1)),
        row("MOVE: src unmapped", ENOENT, || {
            let source = source().unmapped(3);
            World::private(M).move_from(0, source.at(3), 1, false)
        }),
        row("MOVE: dst past the end of its mapping", EINVAL, || {
            to(&World::private(M).unmapped(4), &source(), 3, 2)
        }),
        row("MOVE: src past the end of its mapping", EINVAL, || {
            let source = source().unmapped(4);
            World::private(M).move_from(0, source.at(3), 2, false)
        }),
        row("MOVE: src hole", ENOENT, || to(&World::private(M), &World::private(NONE), 0, 1)),
        row("MOVE: src hole with ALLOW_SRC_HOLES", Done, || {
            let (world, source) = (World::private(M), World::private(NONE));
            world.move_from(0, source.at(0), 1, true)?;
            // Still missing.
            world.copy(0, 1)
        }),
        row("MOVE: dst present", EXIST, || to(&World::private(M).filled(0, 1), &source(), 0, 1)),
        row("MOVE: dst zero page", EXIST, || {
            let world = World::private(M);
            world.zero(0, 1)?;
            to(&world, &source(), 0, 1)
        }),
        row("MOVE: dst poisoned", EXIST, || to(&World::private(M).poisoned(0), &source(), 0, 1)),
        row("MOVE: dst guard page", EXIST, || to(&World::private(M).guarded(0), &source(), 0, 1)),
        row("MOVE: dst with a write-protect marker", EXIST, || to(&World::marked(), &source(), 0, 1)),
        row("MOVE: some pages, then a hole", partial(1), || {
            let source = World::of(pages(8, MappingKind::Private), NONE);
            source.memory.write(0, &[5])?;
            to(&World::private(M), &source, 0, 2)
        }),
        row("MOVE: some pages, then a present page", partial(2), || {
            to(&World::private(M).filled(2, 1), &source(), 0, 4)
        }),
        row("MOVE: src == dst", EXIST, || {
            let world = World::private(M).filled(0, 1);
            as_error(raw_move(&world, world.at(0), world.at(0), PAGE, 0))
        }),
        row("MOVE: src == dst is refused by the crate", EINVAL, || {
            let world = World::private(M).filled(0, 1);
            world.move_from(0, world.at(0), 1, false)
        }),
        row("MOVE: src and dst overlap where populated", EXIST, || {
            let world = World::private(M).filled(0, 2);
            as_error(raw_move(&world, world.at(1), world.at(0), 2 * PAGE, 0))
        }),
        row("MOVE: src and dst overlap in a hole", Done, || {
            let world = World::private(M).filled(0, 1);
            let holes = sys::UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES;
            raw_move(&world, world.at(1), world.at(0), 2 * PAGE, holes)?;
            // Carried on to the wrong place: neither where it was, nor where it was to go.
            assert_eq!([0, 1, 2].map(|page| world.zero(page, 1).is_ok()), [true, true, false]);
            assert_eq!(world.byte(2), 7);
            Ok(())
        }),
        row("MOVE: src and dst overlap is refused by the crate", EINVAL, || {
            let world = World::private(M).filled(0, 1);
            let outcome = world.move_from(1, world.at(0), 2, true);
            assert_eq!(world.byte(0), 7, "it was moved");
            outcome
        }),
        row("MOVE: unread event", CHANGING, || while_changing(|world| to(world, &source(), 0, 1))),
    ]
}

/// What the crate would have made of it.
fn as_error(outcome: Outcome) -> Outcome {
    match outcome {
        Err(crate::tables::Stop::Errno(libc::EEXIST)) => Ok(Err(uffd::UffdError::PageExist)?),
        outcome => outcome,
    }
}

fn kinds_of_memory() -> Vec<Row> {
    vec![
        row("MOVE: different protection", EINVAL, || {
            to(&World::private(M), &source().with_protection(0, libc::PROT_READ), 0, 1)
        }),
        row("MOVE: both not writable", EINVAL, || {
            let world = World::private(M).with_protection(0, libc::PROT_READ);
            to(&world, &source().with_protection(0, libc::PROT_READ), 0, 1)
        }),
        row("MOVE: different mlock state", EINVAL, || {
            let source = source();
            mlock(&source, 0);
            to(&World::private(M), &source, 0, 1)
        }),
        row("MOVE: dst shmem", EINVAL, || to(&World::shared(M), &source(), 0, 1)),
        row("MOVE: src shmem", EINVAL, || {
            let source = World::shared(NONE).in_page_cache(0);
            assert_eq!(source.byte(0), 3);
            to(&World::private(M), &source, 0, 1)
        }),
        row("MOVE: dst private memfd", EINVAL, || to(&World::private_memfd(M), &source(), 0, 1)),
        row("MOVE: src file memory", EINVAL, || {
            let program = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
            let options = FileOptions {
                access: FileAccess::CopyOnWrite,
                len: Some(8 * PAGE as usize),
                ..FileOptions::default()
            };
            let source = World::of(Mapping::of_file(program.into(), options)?, NONE);
            assert_eq!(source.byte(0), 0x7f);
            to(&World::private(M), &source, 0, 1)
        }),
        row("MOVE: src zero page", Done, || {
            let (world, source) = (World::private(M), World::private(NONE));
            assert_eq!(source.byte(0), 0);
            to(&world, &source, 0, 1)?;
            assert_eq!(world.byte(0), 0);
            Ok(())
        }),
        row("MOVE: src registered", Done, || {
            let (world, source) = (World::private(M), World::private(M | W).filled(0, 1));
            to(&world, &source, 0, 1)?;
            assert_eq!(world.byte(0), 7);
            // Missing again where it was.
            source.copy(0, 1)
        }),
        row("MOVE: src write-protected", Done, || {
            let (world, source) = (World::private(M), World::private(M | W).filled(0, 1));
            source.protect(0, 1)?;
            to(&world, &source, 0, 1)?;
            assert_eq!(world.byte(0), 7);
            Ok(())
        }),
        row("MOVE: src from malloc", Done, || {
            let layout = Layout::from_size_align(PAGE as usize, PAGE as usize).unwrap();
            // SAFETY: the layout is not empty.
            let page = unsafe { alloc_zeroed(layout) };
            // SAFETY: the first byte of what was just allocated.
            unsafe { page.write(5) };
            let world = World::private(M);
            let outcome = world.move_from(0, page as u64, 1, false);
            // SAFETY: allocated above with this layout. The moved page is one of zeros now.
            unsafe { dealloc(page, layout) };
            outcome?;
            assert_eq!(world.byte(0), 5);
            Ok(())
        }),
        row("MOVE: aligned transparent huge page", Done, || {
            let (world, source) = (World::of(transparent()?, M), World::transparent()?);
            world.move_from(0, source.at(0), 512, false)?;
            assert!(is_huge(&world.memory), "it was to go in one step");
            assert_eq!((world.byte(0), source.byte(0)), (1, 0));
            Ok(())
        }),
        row("MOVE: a piece of a transparent huge page", Done, || {
            let (world, source) = (World::private(M), World::transparent()?);
            to(&world, &source, 0, 1)?;
            assert!(!is_huge(&source.memory), "it was to be split");
            assert_eq!(world.byte(0), 1);
            Ok(())
        }),
    ]
}

const EBUSY: Expect = Is(uffd::UffdError::System { operation: uffd::Operation::Move, errno: Errno::EBUSY });

/// In a process of its own: these fork.
pub(crate) fn rows_with_a_child() -> Vec<Row> {
    vec![
        row("MOVE: src page shared with a forked child that is gone", EBUSY, || {
            let (world, source) = (World::private(M), source());
            finish(&fork_and_exit());
            to(&world, &source, 0, 1)
        }),
        row("MOVE: src page written again after a fork", Done, || {
            let (world, source) = (World::private(M), source());
            finish(&fork_and_exit());
            source.memory.write(0, &[6])?;
            to(&world, &source, 0, 1)?;
            assert_eq!(world.byte(0), 6);
            Ok(())
        }),
        row("MOVE: src page shared with a forked child that lives", EBUSY, || {
            let (world, source) = (World::private(M), source());
            let _child = crate::processes::Forked::idle();
            to(&world, &source, 0, 1)
        }),
    ]
}
