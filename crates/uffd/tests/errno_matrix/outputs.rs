//! What the kernel leaves in the last field of the filling ioctls, which the crate reads its outcomes from.

use nix::errno::Errno;
use userfaultfd_sys as sys;

use crate::support::PAGE;
use crate::tables::{Done, Outcome, Row, Stop, row};
use crate::world::{Argument, C, M, NONE, World, raw, while_changing};

/// One of the ioctls on so many pages from the first one on: its errno and its output, which was 77 before.
type Fill = fn(&World, u64) -> (i32, i64);

fn errno(world: &World, argument: &mut impl Argument) -> i32 {
    match raw(&world.uffd, argument) {
        Ok(()) => 0,
        Err(Stop::Errno(errno)) => errno,
        Err(stop) => panic!("{stop:?}"),
    }
}

fn range(world: &World, pages: u64) -> sys::uffdio_range {
    sys::uffdio_range { start: world.at(0), len: pages * PAGE }
}

const COPY: Fill = |world, pages| {
    let (dst, src, len) = (world.at(0), world.source() as u64, pages * PAGE);
    let mut argument = sys::uffdio_copy { dst, src, len, mode: 0, copy: 77 };
    (errno(world, &mut argument), argument.copy)
};
const MOVE: Fill = |world, pages| {
    let (dst, src, len) = (world.at(0), world.source() as u64, pages * PAGE);
    let mut argument = sys::uffdio_move { dst, src, len, mode: 0, move_: 77 };
    (errno(world, &mut argument), argument.move_)
};
const ZEROPAGE: Fill = |world, pages| {
    let mut argument = sys::uffdio_zeropage { range: range(world, pages), mode: 0, zeropage: 77 };
    (errno(world, &mut argument), argument.zeropage)
};
const CONTINUE: Fill = |world, pages| {
    let mut argument = sys::uffdio_continue { range: range(world, pages), mode: 0, mapped: 77 };
    (errno(world, &mut argument), argument.mapped)
};
const POISON: Fill = |world, pages| {
    let mut argument = sys::uffdio_poison { range: range(world, pages), mode: 0, updated: 77 };
    (errno(world, &mut argument), argument.updated)
};

const ALL: [(&str, Fill); 5] =
    [("COPY", COPY), ("MOVE", MOVE), ("ZEROPAGE", ZEROPAGE), ("CONTINUE", CONTINUE), ("POISON", POISON)];

/// Memory that each of them can fill four pages of; CONTINUE has those in the cache, and only those.
fn world(ioctl: &str) -> World {
    match ioctl {
        "CONTINUE" => (0..4).fold(World::shared(M | C), World::in_page_cache),
        _ => World::private(M),
    }
}

/// The same with the third page in the way.
fn obstructed(ioctl: &str) -> World {
    match ioctl {
        "CONTINUE" => (0..2).fold(World::shared(M | C), World::in_page_cache),
        _ => World::private(M).filled(2, 1),
    }
}

fn left(expected: (i32, i64), got: (i32, i64)) -> Outcome {
    assert_eq!(got, expected);
    Ok(())
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (ioctl, fill) in ALL {
        // MOVE does not say that a range is not registered: it might be another uffd's.
        let unregistered = if ioctl == "MOVE" { libc::EINVAL } else { libc::ENOENT };
        rows.extend([
            row(format!("{ioctl}: output of all done is the length"), Done, move || {
                left((0, 4 * PAGE as i64), fill(&world(ioctl), 4))
            }),
            row(format!("{ioctl}: output of a part is the bytes done"), Done, move || {
                left((libc::EAGAIN, 2 * PAGE as i64), fill(&obstructed(ioctl), 4))
            }),
            row(format!("{ioctl}: output of nothing done is the negative errno"), Done, move || {
                left((unregistered, -i64::from(unregistered)), fill(&World::private(NONE), 1))
            }),
            row(format!("{ioctl}: output while an event is unread is -11"), Done, move || {
                while_changing(|world| left((libc::EAGAIN, -11), fill(world, 1)))
            }),
            row(format!("{ioctl}: output while an event is unread, garbage, is -11"), Done, move || {
                while_changing(|world| left((libc::EAGAIN, -11), fill(world, 0)))
            }),
            row(format!("{ioctl}: output of an argument refused is untouched"), Done, move || {
                left((Errno::EINVAL as i32, 77), fill(&world(ioctl), 0))
            }),
        ]);
    }
    rows
}
