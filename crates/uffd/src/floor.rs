//! What serving costs without states, limits or checks: the loop that everyone writes first, over the bare system calls.
//! Only to compare with. Whatever is not a missing page of private memory that is simply there to be filled, it gets wrong.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use userfaultfd_sys as sys;

use crate::ioctl;
use crate::mapping::Mapping;
use crate::userfaultfd::Userfaultfd;

/// How long a fault may stay away: whoever should cause it has failed.
const PATIENCE_MS: u16 = 10_000;
/// Reads in a row that find nothing, before somebody who spins sleeps once: a second or two.
const LOOKS: u32 = 1 << 20;

/// How the loop waits for a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// By poll(2): the thread sleeps, as everybody's does.
    Sleep,
    /// By reading again and again: nothing is faster where the thread has a CPU to itself, and nothing else gets that CPU.
    Spin,
}

/// Answers so many faults of `mapping`, one after the other: waits, read(2) of one message, `UFFDIO_COPY` of the page at the
/// same place of `image`. On the calling thread.
///
/// # Errors
///
/// The first system call that fails; `TimedOut` where no fault comes for ten seconds; `InvalidInput` where `image` is smaller.
pub fn answer(
    uffd: &Userfaultfd,
    mapping: &Mapping,
    image: &Mapping,
    faults: usize,
    how: Waiting,
) -> io::Result<()> {
    same_size(mapping, image)?;
    let page = mapping.page_size() as u64;
    let mut left = faults;
    let mut turn = 0_u32;
    while left > 0 {
        // Who spins looks only now and then whether any will come.
        if how == Waiting::Sleep || turn == LOOKS {
            let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(PATIENCE_MS))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            turn = 0;
        }
        turn += 1;
        let mut message = std::mem::MaybeUninit::<sys::uffd_msg>::uninit();
        // SAFETY: there is room for one message, and the kernel writes whole ones.
        let read = unsafe {
            libc::read(uffd.as_fd().as_raw_fd(), message.as_mut_ptr().cast(), size_of_val(&message))
        };
        if read < 0 {
            match Errno::last() {
                Errno::EAGAIN | Errno::EINTR => continue,
                errno => return Err(errno.into()),
            }
        }
        // SAFETY: a message was read.
        let message = unsafe { message.assume_init() };
        if message.event != sys::UFFD_EVENT_PAGEFAULT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: of a fault, this is the part that the kernel has written.
        let at = unsafe { message.arg.pagefault }.address & !(page - 1);
        copy(uffd, at, image.address() + (at - mapping.address()), page)?;
        left -= 1;
        turn = 0;
    }
    Ok(())
}

/// Copies all of `image` into `mapping`, so many bytes an ioctl, and says how long that took. On the calling thread.
///
/// # Errors
///
/// The first `UFFDIO_COPY` that fails; `InvalidInput` where `image` is smaller.
pub fn fill(uffd: &Userfaultfd, mapping: &Mapping, image: &Mapping, piece: u64) -> io::Result<Duration> {
    same_size(mapping, image)?;
    let start = Instant::now();
    let len = mapping.len() as u64;
    let mut offset = 0;
    while offset < len {
        let part = piece.min(len - offset);
        copy(uffd, mapping.address() + offset, image.address() + offset, part)?;
        offset += part;
    }
    Ok(start.elapsed())
}

fn same_size(mapping: &Mapping, image: &Mapping) -> io::Result<()> {
    if image.len() < mapping.len() { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
}

fn copy(uffd: &Userfaultfd, dst: u64, src: u64, len: u64) -> io::Result<()> {
    let mut copy = sys::uffdio_copy { dst, src, len, mode: 0, copy: 0 };
    // SAFETY: both stretches are inside of mappings that live across the call; missing pages are filled, which no reference
    // can point to.
    unsafe { ioctl::copy(uffd.as_fd().as_raw_fd(), &raw mut copy) }?;
    Ok(())
}
