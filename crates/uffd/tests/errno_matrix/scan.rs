//! `PAGEMAP_SCAN`, beside what `pagemap.rs` tests.

use std::os::fd::{AsFd, AsRawFd};
use std::ptr::without_provenance;

use nix::errno::Errno;
use uffd::liveness::PidFd;
use uffd::pagemap::{Categories, Pagemap, PagemapError, ScanOptions};
use uffd::{Event, FaultKind, Features, Mapping, MappingKind, Modes};

use crate::processes::Forked;
use crate::support::{PAGE, events, finish, pages};
use crate::tables::{Done, EFAULT, EINVAL, Expect, Fails, Outcome, Row, Stop, row};
use crate::world::{M, W, World, is_huge, transparent};

const EPERM: Expect = Fails(libc::EPERM);

/// Memory whose writes are tracked, none of it protected yet.
pub(crate) fn tracked(memory: Mapping, modes: Modes) -> World {
    World::with(Features::WP_ASYNC, memory, modes)
}

fn private() -> World {
    tracked(pages(8, MappingKind::Private), W)
}

fn protected(world: World) -> Result<World, Stop> {
    world.protect(0, world.memory.len() as u64 / world.page())?;
    Ok(world)
}

fn bounds(world: &World) -> (u64, u64) {
    (world.at(0), world.at(0) + world.memory.len() as u64)
}

fn scan(world: &World, options: &ScanOptions) -> Result<Vec<(u64, u64)>, Stop> {
    let (start, end) = bounds(world);
    let found = Pagemap::of_self()?.scan_to_end(start, end, options)?;
    Ok(found
        .regions
        .iter()
        .map(|region| ((region.start - start) / PAGE, (region.end - start) / PAGE))
        .collect())
}

/// Ordinary pages that were written, which are protected again.
pub(crate) fn take(world: &World) -> Result<Vec<(u64, u64)>, Stop> {
    scan(world, &ScanOptions::take_written())
}

/// `struct pm_scan_arg`, as the kernel sees it.
fn argument(world: &World) -> [u64; 12] {
    let (start, end) = bounds(world);
    [96, 0, start, end, 0, 0, 0, 0, 0, 0, 0, Categories::WRITTEN.bits()]
}

const FLAGS: usize = 1;
const START: usize = 2;
const END: usize = 3;
const WALK_END: usize = 4;
const VEC: usize = 5;
const VEC_LEN: usize = 6;
const MASK: usize = 9;

/// With some fields changed.
fn raw_scan(world: &World, changes: &[(usize, u64)]) -> Result<u64, Stop> {
    const PAGEMAP_SCAN: u32 = 0xc060_6610;
    let mut argument = argument(world);
    for &(field, value) in changes {
        argument[field] = value;
    }
    let map = Pagemap::of_self()?;
    let fd = map.as_fd().as_raw_fd();
    // SAFETY: `argument` has the size that the number encodes and lives across the call; its vector is one of no length, or
    // an address that the kernel is to refuse.
    Errno::result(unsafe { libc::ioctl(fd, PAGEMAP_SCAN as _, argument.as_mut_ptr()) })?;
    Ok(argument[WALK_END])
}

fn refused(changes: &'static [(usize, u64)]) -> impl FnOnce() -> Outcome {
    move || raw_scan(&private(), changes).map(drop)
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = findings();
    rows.extend(answers());
    rows
}

fn findings() -> Vec<Row> {
    vec![
        row("PAGEMAP_SCAN: before the first WRITEPROTECT every page counts as written", Done, || {
            let world = private();
            assert_eq!(scan(&world, &ScanOptions::written())?, [(0, 8)]);
            Ok(())
        }),
        row("PAGEMAP_SCAN: no vector, protects only", Done, || {
            let world = protected(private())?;
            finish(&world.writer(2));
            let only_protect = ScanOptions { max_regions: 0, ..ScanOptions::take_written() };
            let (start, end) = bounds(&world);
            let scan = Pagemap::of_self()?.scan(start, end, &only_protect)?;
            assert_eq!((scan.regions, take(&world)?), (vec![], vec![]));
            assert!(world.is_protected(2));
            Ok(())
        }),
        row("PAGEMAP_SCAN: a discarded page counts as written", Done, || {
            let world = protected(private())?;
            world.memory.write(0, &[1; 8 * PAGE as usize])?;
            take(&world)?;
            world.memory.discard(3 * PAGE as usize, PAGE as usize)?;
            assert_eq!(take(&world)?, [(3, 4)]);
            Ok(())
        }),
        row("PAGEMAP_SCAN: one byte of a transparent huge page", Done, || {
            let memory = transparent()?;
            memory.write(0, &[1])?;
            if !is_huge(&memory) {
                return crate::tables::skipped("no transparent huge page could be had");
            }
            let world = protected(tracked(memory, W))?;
            assert!(is_huge(&world.memory));
            finish(&world.writer(5));
            assert!(!is_huge(&world.memory), "it was to be split");
            assert_eq!(take(&world)?, [(5, 6)]);
            Ok(())
        }),
        row("PAGEMAP_SCAN: shared memory written by write(2)", Done, || {
            let world = protected(tracked(pages(8, MappingKind::Shared), W))?;
            world.memory.write(0, &[1])?;
            assert_eq!(take(&world)?, [(0, 1)]);
            let world = world.in_page_cache(0);
            assert_eq!(take(&world)?, []);
            Ok(())
        }),
        row("PAGEMAP_SCAN: shared memory written through another mapping", Done, || {
            let world = protected(tracked(pages(8, MappingKind::Shared), W))?;
            world.memory.write(0, &[1])?;
            take(&world)?;
            let memfd = world.memory.memfd().unwrap().try_clone_to_owned().unwrap();
            let access = uffd::FileAccess::Shared;
            let other = Mapping::of_file(memfd, uffd::FileOptions { access, ..Default::default() })?;
            other.write(0, &[2])?;
            assert_eq!((world.byte(0), take(&world)?), (2, vec![]));
            Ok(())
        }),
        row(
            "PAGEMAP_SCAN: missing faults of a tracked range come as usual, write-protect faults do not",
            Done,
            || {
                let world = protected(tracked(pages(8, MappingKind::Private), M | W))?;
                let writer = world.writer(0);
                let message = events(&world.uffd, 1).remove(0);
                assert!(
                    matches!(message, Event::Fault(fault) if fault.kind == FaultKind::Missing),
                    "{message:?}"
                );
                world.copy_from(
                    0,
                    1,
                    world.source(),
                    uffd::CopyOptions { write_protect: true, wake: true },
                )?;
                // Resolved by the kernel, without a message.
                finish(&writer);
                assert_eq!(world.uffd.waiting().unwrap().total, 0);
                assert_eq!(take(&world)?.first(), Some(&(0, 1)));
                Ok(())
            },
        ),
    ]
}

fn answers() -> Vec<Row> {
    // A uffd that is not asked to resolve faults itself tracks nothing.
    let synchronous = || World::private(W).filled(0, 8);
    vec![
        row("PAGEMAP_SCAN: not registered, CHECK_WPASYNC", EPERM, || {
            take(&World::private(Modes::empty())).map(drop)
        }),
        row("PAGEMAP_SCAN: synchronous write-protect, CHECK_WPASYNC", EPERM, move || {
            take(&synchronous()).map(drop)
        }),
        row("PAGEMAP_SCAN: not registered, WP_MATCHING only", Done, || {
            let world = World::private(Modes::empty());
            world.memory.write(0, &[1; 8 * PAGE as usize])?;
            let options = ScanOptions { require_tracking: false, ..ScanOptions::take_written() };
            assert_eq!(scan(&world, &options)?, []);
            assert!(!world.is_protected(0));
            Ok(())
        }),
        row("PAGEMAP_SCAN: synchronous write-protect, neither flag", Done, move || {
            let world = synchronous();
            world.protect(2, 6)?;
            assert_eq!(scan(&world, &ScanOptions::written())?, [(0, 2)]);
            Ok(())
        }),
        row("PAGEMAP_SCAN: wrong size", EINVAL, refused(&[(0, 95)])),
        row("PAGEMAP_SCAN: unknown flag", EINVAL, refused(&[(FLAGS, 4)])),
        row("PAGEMAP_SCAN: unknown category", EINVAL, refused(&[(MASK, 1 << 40)])),
        row("PAGEMAP_SCAN: unknown category, by the crate", EINVAL, || {
            let options =
                ScanOptions { all_of: Categories::from_bits_retain(1 << 40), ..ScanOptions::default() };
            scan(&private(), &options).map(drop)
        }),
        row("PAGEMAP_SCAN: start unaligned", EINVAL, || {
            let world = private();
            raw_scan(&world, &[(START, world.at(0) + 8)]).map(drop)
        }),
        row("PAGEMAP_SCAN: no vector, but a length", EINVAL, refused(&[(VEC_LEN, 8)])),
        row("PAGEMAP_SCAN: end unaligned is rounded up", Done, || {
            let world = private();
            assert_eq!(raw_scan(&world, &[(END, world.at(1) + 8)])?, world.at(2));
            Ok(())
        }),
        row("PAGEMAP_SCAN: entries behind the end of the address space", EINVAL, || {
            Ok(Pagemap::of_self()?.entries(u64::MAX - PAGE, 1).map(drop)?)
        }),
        row("PAGEMAP_SCAN: end before start", EFAULT, || {
            let world = private();
            raw_scan(&world, &[(START, world.at(2)), (END, world.at(1))]).map(drop)
        }),
        row("PAGEMAP_SCAN: bad vector", EFAULT, || {
            let nowhere = without_provenance::<u8>(1 << 62) as u64;
            raw_scan(&private(), &[(VEC, nowhere), (VEC_LEN, 8)]).map(drop)
        }),
    ]
}

/// In a process of its own: these fork.
pub(crate) fn rows_with_a_child() -> Vec<Row> {
    vec![
        row("PAGEMAP_SCAN: forked child without EVENT_FORK", EPERM, || {
            let world = protected(private())?;
            let child = Forked::idle();
            let map = Pagemap::of_process(&PidFd::open(child.pid()).unwrap())?;
            let (start, end) = bounds(&world);
            Ok(map.scan(start, end, &ScanOptions::take_written()).map(drop)?)
        }),
        row("PAGEMAP_SCAN: process dead", Fails(libc::ESRCH), || {
            let mut child = Forked::idle();
            let map = Pagemap::of_process(&PidFd::open(child.pid()).unwrap())?;
            assert!(map.scan(0, PAGE, &ScanOptions::written()).is_ok() && map.entries(0, 1).is_ok());
            child.kill_and_reap();
            assert_eq!(map.entries(0, 1), Err(PagemapError::ProcessGone));
            // The kernel itself says nothing of it.
            Ok(map.scan(0, PAGE, &ScanOptions::written()).map(drop)?)
        }),
    ]
}
