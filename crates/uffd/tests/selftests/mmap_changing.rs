//! While a thread sleeps in an event of its own making, what would fill or protect memory is refused with EAGAIN, in the
//! return value and in the field that otherwise tells how much was done.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{ContinueOptions, CopyOptions, Event, Features, Modes, MoveOptions, UffdError, Userfaultfd};
use userfaultfd_sys as sys;

use crate::memory::{Area, Memory, copy_page, uffd};
use crate::support::{elsewhere, events, finish};

/// What the kernel leaves in the last field. This crate reads it together with the errno, so this test asks by hand.
fn outputs(uffd: &Userfaultfd, dst: u64, src: u64, len: u64) -> [(Result<i32, Errno>, i64); 5] {
    let fd = uffd.as_upstream().as_raw_fd();
    let range = sys::uffdio_range { start: dst, len };
    let mut copy = sys::uffdio_copy { dst, src, len, mode: 0, copy: 0 };
    let mut zero = sys::uffdio_zeropage { range, mode: 0, zeropage: 0 };
    let mut moved = sys::uffdio_move { dst, src, len, mode: 0, move_: 0 };
    let mut poison = sys::uffdio_poison { range, mode: 0, updated: 0 };
    let mut proceed = sys::uffdio_continue { range, mode: 0, mapped: 0 };
    // SAFETY: the structure lives across the call and has the size that the number encodes; no reference to either
    // side of what it names exists.
    let copied = unsafe { libc::ioctl(fd, sys::UFFDIO_COPY as _, &raw mut copy) };
    let copied = (Errno::result(copied), copy.copy);
    // SAFETY: as above.
    let zeroed = unsafe { libc::ioctl(fd, sys::UFFDIO_ZEROPAGE as _, &raw mut zero) };
    let zeroed = (Errno::result(zeroed), zero.zeropage);
    // SAFETY: as above.
    let moving = unsafe { libc::ioctl(fd, sys::UFFDIO_MOVE as _, &raw mut moved) };
    let moving = (Errno::result(moving), moved.move_);
    // SAFETY: as above.
    let poisoned = unsafe { libc::ioctl(fd, sys::UFFDIO_POISON as _, &raw mut poison) };
    let poisoned = (Errno::result(poisoned), poison.updated);
    // SAFETY: as above.
    let proceeded = unsafe { libc::ioctl(fd, sys::UFFDIO_CONTINUE as _, &raw mut proceed) };
    [copied, zeroed, moving, poisoned, (Errno::result(proceeded), proceed.mapped)]
}

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::EVENT_REMOVE) else { return };
    let (area, source) = (Area::new(memory, 2), Area::new(Memory::Anon, 1));
    source.fill();
    area.register(uffd, Modes::MISSING | Modes::MINOR | Modes::WRITE_PROTECT);
    let (dst, len) = (area.start(), area.page() as u64);
    uffd.zero(area.at(1), len, true).unwrap();
    let discarded = elsewhere(move || area.mapping.discard(area.page(), area.page()).unwrap());
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap(), 1, "no event came");

    // SAFETY: both areas live; no reference to them exists.
    let copied = unsafe { uffd.copy(dst, source.mapping.as_ptr(), source.page(), CopyOptions::default()) };
    // SAFETY: as above.
    let moved = unsafe { uffd.move_pages(dst, source.start(), len, MoveOptions::default()) };
    let others = [
        uffd.zero(dst, len, true),
        uffd.poison(dst, len, true),
        uffd.continue_pages(dst, len, ContinueOptions::default()),
        uffd.write_protect(dst, len, true, true),
    ];
    let by_hand = outputs(uffd, dst, source.start(), len);

    let told = events(uffd, 1).remove(0);
    finish(&discarded);

    assert_eq!([copied, moved], [Err(UffdError::Changing); 2]);
    assert_eq!(others, [Err(UffdError::Changing); 4]);
    // Before Linux 6.15 the field was left alone, which this crate takes for the same.
    let again = -i64::from(libc::EAGAIN);
    for (what, (result, output)) in ["COPY", "ZEROPAGE", "MOVE", "POISON", "CONTINUE"].iter().zip(by_hand) {
        assert_eq!((result, output), (Err(Errno::EAGAIN), again), "{what}");
    }
    assert!(matches!(told, Event::Remove { start, end } if (start, end) == (area.at(1), area.at(1) + len)));
    // Nothing was installed meanwhile, and nothing stays refused.
    assert!(copy_page(uffd, dst, &source.bytes(0), CopyOptions::default()));
    assert!(area.holds(0, 0));
}

cases!(case; shmem = Memory::Shmem);
