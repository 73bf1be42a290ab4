//! Write protection, fork and pinned pages: a page that is pinned for long when the process forks is copied at once, and
//! one that the child has pinned while it shares it gets a copy of its own; both keep or lose protection like any other.
//!
//! Pinned for long by io_uring's fixed buffers, and for a moment (for reading, which leaves protection alone) by
//! process_vm_readv(2).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::memory::{Area, Memory};
use crate::wp_fork::{World, frame};

/// `sizeof(struct io_uring_params)`, of which nothing has to be set.
const PARAMS: usize = 120;
const IORING_REGISTER_BUFFERS: u32 = 0;
const IORING_UNREGISTER_BUFFERS: u32 = 1;

/// Pages that are pinned until this is dropped.
struct Pinned {
    ring: OwnedFd,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let (none, fd): (*const libc::iovec, i32) = (std::ptr::null(), self.ring.as_raw_fd());
        // Closing the ring would do it too, but some time later.
        // SAFETY: takes no arguments beside the number of the operation.
        let result =
            unsafe { libc::syscall(libc::SYS_io_uring_register, fd, IORING_UNREGISTER_BUFFERS, none, 0) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Pins all of the area.
fn pin(area: &Area) -> Result<Pinned, Errno> {
    let mut params = [0_u64; PARAMS / 8];
    // SAFETY: the kernel reads and writes the structure, which lives across the call and has its size.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    let ring = Errno::result(ring)?;
    // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
    let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
    let buffer = libc::iovec { iov_base: area.mapping.as_ptr().cast(), iov_len: area.mapping.len() };
    // SAFETY: one vector, which lives across the call. Nothing is ever read into the buffer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_BUFFERS,
            &raw const buffer,
            1,
        )
    };
    Errno::result(result).map(|_| Pinned { ring })
}

/// Reads a byte of another process, which pins the page meanwhile.
fn read_of(pid: i32, area: &Area) {
    let mut byte = 0_u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: area.mapping.as_ptr().cast(), iov_len: 1 };
    // SAFETY: one vector each, which live across the call; the local one is a byte of ours.
    let result = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(result, 1, "{}", std::io::Error::last_os_error());
}

pub fn case(memory: Memory, with_event: bool) {
    let Some(world) = World::new(memory, with_event) else { return };
    // Before it is protected: this pins for writing, which would be a fault of a protected page.
    let pinned = match pin(&world.area) {
        Ok(pinned) => pinned,
        Err(errno) => {
            println!("skipped: io_uring pins no pages here: {errno}");
            return;
        }
    };
    world.protect(true);
    let ours = frame(&world.map, world.area.start());
    if ours == 0 {
        println!("skipped: the page map does not tell frames");
        return;
    }
    let (child, of_child) = world.fork("pinned by the parent");
    let theirs = frame(&child.pagemap(), world.area.start());
    // Memory of the file is the same for all; shared memory is not even copied into the child's page table.
    if !memory.is_shared() {
        assert_ne!(theirs, 0, "copied at once");
        assert_ne!(theirs, ours, "a copy of its own");
    }
    assert_eq!(frame(&world.map, world.area.start()), ours, "the pinned page stays where it is");
    assert!(world.is_protected());
    drop((child, of_child));
    drop(pinned);

    let (child, _of_child) = world.fork("pinned by the child");
    let before = frame(&child.pagemap(), world.area.start());
    let protected = world.area.entry(&child.pagemap(), 0).is_write_protected();
    read_of(child.pid(), &world.area);
    let after = frame(&child.pagemap(), world.area.start());
    if !memory.is_shared() {
        assert_eq!(before, frame(&world.map, world.area.start()), "shared until then");
        assert_ne!(after, before, "a copy of its own");
    }
    assert_eq!(world.area.entry(&child.pagemap(), 0).is_write_protected(), protected);
    assert_eq!(protected, with_event);
    assert!(world.is_protected());
}

cases!(|memory| case(memory, false); all);
