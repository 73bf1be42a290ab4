//! `MADV_COLLAPSE` of memory that is still registered.

use std::time::Instant;

use nix::errno::Errno;
use uffd::liveness::PidFd;
use uffd::{CopyOptions, Mapping, MappingError, Modes};

use crate::processes::{child_with_uffd, idle};
use crate::support::{DEADLINE, PAGE, register};
use crate::tables::{Done, EINVAL, Fails, Outcome, Row, row, skipped};
use crate::world::{M, W, World, is_huge, transparent};

const MADV_COLLAPSE: i32 = 25;
const EBUSY: crate::tables::Expect = Fails(libc::EBUSY);

/// Room for one transparent huge page of ordinary ones, registered.
fn world(modes: Modes) -> Result<World, crate::tables::Stop> {
    Ok(World::of(transparent()?, modes))
}

fn all(world: &World) -> u64 {
    world.memory.len() as u64 / PAGE
}

/// Again while the kernel says that trying later can help: pages are still on their way to where it looks for them.
fn patiently(mut collapse: impl FnMut() -> Result<(), Errno>) -> Outcome {
    let until = Instant::now() + DEADLINE;
    loop {
        match collapse() {
            Err(Errno::EAGAIN | Errno::ENOMEM) if Instant::now() < until => std::thread::yield_now(),
            result => return Ok(result?),
        }
    }
}

fn collapse(memory: &Mapping) -> Outcome {
    if let Err(MappingError::Unsupported { what }) = memory.collapse(0, memory.len()) {
        return skipped(what);
    }
    patiently(|| match memory.collapse(0, memory.len()).unwrap().refused {
        Some((_, errno)) => Err(errno),
        None => Ok(()),
    })
}

fn collapsed_with_contents(modes: Modes) -> Outcome {
    let world = world(modes)?;
    world.copy(0, all(&world))?;
    assert!(!is_huge(&world.memory));
    collapse(&world.memory)?;
    assert!(is_huge(&world.memory));
    assert_eq!((world.byte(0), world.byte(all(&world) - 1)), (7, 7));
    Ok(())
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("MADV_COLLAPSE: all pages filled by COPY, missing", Done, || collapsed_with_contents(M)),
        row("MADV_COLLAPSE: all pages filled by COPY, missing and write-protect", Done, || {
            collapsed_with_contents(M | W)
        }),
        row("MADV_COLLAPSE: one page missing", EBUSY, || {
            let world = world(M)?;
            world.copy(1, all(&world) - 1)?;
            collapse(&world.memory)
        }),
        row("MADV_COLLAPSE: filled by ZEROPAGE", EBUSY, || {
            let world = world(M)?;
            world.zero(0, all(&world))?;
            collapse(&world.memory)
        }),
        row("MADV_COLLAPSE: a single write-protected page", EINVAL, || {
            let world = world(M | W)?;
            world.copy(0, all(&world))?;
            world.protect(5, 1)?;
            collapse(&world.memory)
        }),
        row("MADV_COLLAPSE: a single page that was write-protected", Done, || {
            let world = world(M | W)?;
            world.copy(0, all(&world))?;
            world.protect(5, 1)?;
            world.unprotect(5, 1)?;
            collapse(&world.memory)?;
            assert!(is_huge(&world.memory));
            Ok(())
        }),
    ]
}

/// In a process of its own: this forks.
pub(crate) fn rows_with_a_child() -> Vec<Row> {
    vec![row("MADV_COLLAPSE: through a pidfd from the handler's process", Done, || {
        let (memory, source) = (transparent()?, vec![7; transparent()?.len()]);
        // SAFETY: pause(2) is async-signal-safe.
        let (child, uffd) = unsafe { child_with_uffd(idle) };
        register(&uffd, &memory, M);
        // SAFETY: `source` lives across the call.
        unsafe { uffd.copy(memory.address(), source.as_ptr(), source.len(), CopyOptions::default()) }?;
        let process = PidFd::open(child.pid()).unwrap();
        let range = libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: memory.len() };
        patiently(|| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&process));
            // SAFETY: `range` lives across the call; what it names is the child's memory.
            let result = unsafe {
                libc::syscall(libc::SYS_process_madvise, fd, &raw const range, 1_usize, MADV_COLLAPSE, 0)
            };
            Errno::result(result).map(drop)
        })
    })]
}
