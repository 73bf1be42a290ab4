//! Arguments that are refused the same way whatever the ioctl is.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use uffd::{ContinueOptions, CopyOptions};
use userfaultfd_sys as sys;

use crate::support::PAGE;
use crate::tables::{EFAULT, EINVAL, Outcome, Row, row};
use crate::world::{M, W, World, raw};

type OnRange = fn(&World, u64, u64) -> Outcome;

const RANGES: [(&str, OnRange); 9] = [
    ("REGISTER", |world, start, len| world.register(start, len, M)),
    ("UNREGISTER", |world, start, len| Ok(world.uffd.unregister(start, len)?)),
    ("WAKE", |world, start, len| Ok(world.uffd.wake(start, len)?)),
    ("COPY", |world, start, len| {
        // SAFETY: the kernel refuses the range before it looks at the source, which has eight pages.
        Ok(unsafe { world.uffd.copy(start, world.source(), len as usize, CopyOptions::default()) }?)
    }),
    ("ZEROPAGE", |world, start, len| Ok(world.uffd.zero(start, len, true)?)),
    ("POISON", |world, start, len| Ok(world.uffd.poison(start, len, true)?)),
    ("CONTINUE", |world, start, len| {
        Ok(world.uffd.continue_pages(start, len, ContinueOptions::default())?)
    }),
    ("WRITEPROTECT", |world, start, len| Ok(world.uffd.write_protect(start, len, true, true)?)),
    // Itself: the crate refuses some of these ranges for overlapping.
    ("MOVE", |world, dst, len| {
        let mut move_ = sys::uffdio_move { dst, src: world.source() as u64, len, mode: 0, move_: 0 };
        raw(&world.uffd, &mut move_)
    }),
];

type RangeOf = fn(&World) -> (u64, u64);

const REFUSED: [(&str, RangeOf); 6] = [
    ("start not page aligned", |world| (world.at(0) + 8, PAGE)),
    ("len not a multiple of the page size", |world| (world.at(0), 100)),
    ("len 0", |world| (world.at(0), 0)),
    ("start beyond the address space", |_| (1 << 62, PAGE)),
    ("end beyond the address space", |world| (world.at(0), 1 << 62)),
    ("overflow", |_| (u64::MAX - PAGE + 1, 2 * PAGE)),
];

const UNKNOWN: u64 = 1 << 40;

type OnUffd = fn(&World) -> Outcome;

/// With a mode that there is not.
const MODES: [(&str, OnUffd); 7] = [
    ("REGISTER", |world| {
        raw(&world.uffd, &mut sys::uffdio_register { range: page(world), mode: UNKNOWN, ioctls: 0 })
    }),
    ("COPY", |world| {
        let (dst, src) = (world.at(0), world.source() as u64);
        raw(&world.uffd, &mut sys::uffdio_copy { dst, src, len: PAGE, mode: UNKNOWN, copy: 0 })
    }),
    ("ZEROPAGE", |world| {
        raw(&world.uffd, &mut sys::uffdio_zeropage { range: page(world), mode: UNKNOWN, zeropage: 0 })
    }),
    ("POISON", |world| {
        raw(&world.uffd, &mut sys::uffdio_poison { range: page(world), mode: UNKNOWN, updated: 0 })
    }),
    ("CONTINUE", |world| {
        raw(&world.uffd, &mut sys::uffdio_continue { range: page(world), mode: UNKNOWN, mapped: 0 })
    }),
    ("WRITEPROTECT", |world| {
        raw(&world.uffd, &mut sys::uffdio_writeprotect { range: page(world), mode: UNKNOWN })
    }),
    ("MOVE", |world| {
        let (dst, src) = (world.at(0), world.source() as u64);
        raw(&world.uffd, &mut sys::uffdio_move { dst, src, len: PAGE, mode: UNKNOWN, move_: 0 })
    }),
];

const NUMBERS: [(&str, u32); 9] = [
    ("REGISTER", sys::UFFDIO_REGISTER),
    ("UNREGISTER", sys::UFFDIO_UNREGISTER),
    ("WAKE", sys::UFFDIO_WAKE),
    ("COPY", sys::UFFDIO_COPY),
    ("ZEROPAGE", sys::UFFDIO_ZEROPAGE),
    ("POISON", sys::UFFDIO_POISON),
    ("CONTINUE", sys::UFFDIO_CONTINUE),
    ("WRITEPROTECT", sys::UFFDIO_WRITEPROTECT),
    ("MOVE", sys::UFFDIO_MOVE),
];

fn page(world: &World) -> sys::uffdio_range {
    sys::uffdio_range { start: world.at(0), len: PAGE }
}

fn without_structure(world: &World, number: u32) -> Outcome {
    let none: *mut libc::c_void = std::ptr::null_mut();
    // SAFETY: nothing is mapped at address 0, so nothing is read or written.
    Errno::result(unsafe { libc::ioctl(world.uffd.as_fd().as_raw_fd(), number as _, none) })?;
    Ok(())
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (ioctl, act) in RANGES {
        for (case, range) in REFUSED {
            rows.push(row(format!("{ioctl}: {case}"), EINVAL, move || {
                let world = World::private(M | W);
                let (start, len) = range(&world);
                act(&world, start, len)
            }));
        }
    }
    for (ioctl, act) in MODES {
        rows.push(row(format!("{ioctl}: unknown mode bit"), EINVAL, move || act(&World::private(M | W))));
    }
    for (ioctl, number) in NUMBERS {
        let act = move || without_structure(&World::private(M | W), number);
        rows.push(row(format!("{ioctl}: bad struct pointer"), EFAULT, act));
    }
    rows
}
