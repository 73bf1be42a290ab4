//! `UFFDIO_POISON`.

use std::io::pipe;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::WaitStatus;
use uffd::{MappingKind, Userfaultfd};

use crate::processes::{Forked, child_with_uffd};
use crate::support::{PAGE, fault, pages, register, uffd};
use crate::tables::{CHANGING, Done, EFAULT, ENOENT, EXIST, Outcome, Row, partial, row};
use crate::world::{M, NONE, World, while_changing};

/// Has the kernel read the first byte of the first page.
fn read_by_kernel(world: &World) -> Outcome {
    let (_reader, writer) = pipe().unwrap();
    // SAFETY: the kernel checks the page itself; no reference to it is made.
    Errno::result(unsafe { libc::write(writer.as_raw_fd(), world.pointer(0), 1) })?;
    Ok(())
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("POISON: all done", Done, || World::private(M).poison(0, 8)),
        row("POISON: page present", EXIST, || World::private(M).filled(0, 1).poison(0, 1)),
        row("POISON: over poison", EXIST, || World::private(M).poisoned(0).poison(0, 1)),
        row("POISON: over a write-protect marker", EXIST, || World::marked().poison(0, 1)),
        row("POISON: over a guard page", EXIST, || World::private(M).guarded(0).poison(0, 1)),
        row("POISON: later page present", partial(1), || World::private(M).filled(1, 1).poison(0, 4)),
        row("POISON: beyond end of file", EFAULT, || World::shared(M).truncated(4).poison(5, 1)),
        row("POISON: never registered", ENOENT, || World::private(NONE).poison(0, 1)),
        row("POISON: past the end of its mapping", ENOENT, || World::private(M).unmapped(4).poison(3, 2)),
        row("POISON: shmem", Done, || World::shared(M).poison(0, 1)),
        row("POISON: through another uffd", Done, || {
            let (world, other) = (World::private(M), World::private(NONE));
            Ok(other.uffd.poison(world.at(0), PAGE, true)?)
        }),
        row("POISON: unread event", CHANGING, || while_changing(|world| world.poison(0, 1))),
        row("POISON: system calls", EFAULT, || read_by_kernel(&World::private(M).poisoned(0))),
        row("POISON: outlives UNREGISTER and close", EFAULT, || {
            let world = World::private(M).poisoned(0);
            world.unregister(0, 8)?;
            let memory = Arc::clone(&world.memory);
            drop(world);
            let memory = Arc::into_inner(memory).unwrap();
            read_by_kernel(&World::of(memory, NONE))
        }),
        row("POISON: MADV_DONTNEED clears it", Done, || {
            let world = World::private(M).poisoned(0);
            world.memory.discard(0, PAGE as usize)?;
            world.copy(0, 1)?;
            read_by_kernel(&world)
        }),
        row("POISON: poisoned in the middle of a range", partial(2), || {
            World::private(M).poisoned(2).zero(0, 4)
        }),
    ]
}

/// A child with a uffd, which reads the first byte of memory that it has at the same address.
fn child_that_reads(memory: &uffd::Mapping) -> (Forked, Userfaultfd) {
    let byte = memory.as_ptr();
    let (gate, open) = pipe().unwrap();
    let touch = || {
        let mut go = 0_u8;
        // SAFETY: room for the one byte. The parent writes it once the memory is registered.
        unsafe { libc::read(gate.as_raw_fd(), (&raw mut go).cast(), 1) };
        // SAFETY: mapped in the child as in its parent; read as volatile, so that it is really touched.
        unsafe { byte.read_volatile() };
    };
    // SAFETY: one system call and one read of memory, both async-signal-safe.
    let (child, uffd) = unsafe { child_with_uffd(touch) };
    register(&uffd, memory, M);
    nix::unistd::write(&open, &[1]).unwrap();
    (child, uffd)
}

/// For a child: a SIGBUS ends it with the signal's si_code, or with 99 if the address is another.
fn exit_with_code_of_sigbus(address: usize) {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn handler(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel hands the handler a whole siginfo.
        let info = unsafe { &*info };
        // SAFETY: a SIGBUS has an address.
        let at = unsafe { info.si_addr() } as usize;
        let code = if at == ADDRESS.load(Ordering::Relaxed) { info.si_code } else { 99 };
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(code) };
    }
    ADDRESS.store(address, Ordering::Relaxed);
    let action = SigAction::new(SigHandler::SigAction(handler), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler makes async-signal-safe calls only.
    let _ = unsafe { sigaction(Signal::SIGBUS, &action) };
}

fn killed_by_sigbus(child: &mut Forked) {
    let status = child.reap();
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)), "{status:?}");
}

/// In a process of its own: these fork.
pub(crate) fn rows_with_a_child() -> Vec<Row> {
    vec![
        row("POISON: a sleeping waiter is woken into the SIGBUS", Done, || {
            let memory = pages(1, MappingKind::Private);
            let (mut child, uffd) = child_that_reads(&memory);
            assert_eq!(fault(&uffd).address, memory.address());
            uffd.poison(memory.address(), PAGE, true)?;
            killed_by_sigbus(&mut child);
            Ok(())
        }),
        row("POISON: access", Done, || {
            let memory = pages(1, MappingKind::Private);
            let (mut child, uffd) = child_that_reads(&memory);
            fault(&uffd);
            uffd.poison(memory.address(), PAGE, false)?;
            assert_eq!(uffd.waiting().unwrap().total, 1, "not to be woken yet");
            uffd.wake(memory.address(), PAGE)?;
            killed_by_sigbus(&mut child);
            Ok(())
        }),
        row("POISON: si_code and si_addr of the SIGBUS", Done, || {
            let memory = pages(1, MappingKind::Private);
            let Some(uffd) = uffd(uffd::Features::empty()) else {
                return crate::tables::skipped("no userfaultfd");
            };
            register(&uffd, &memory, M);
            uffd.poison(memory.address(), PAGE, true)?;
            let byte = memory.as_ptr().wrapping_add(100);
            let touch = || {
                exit_with_code_of_sigbus(byte as usize);
                // SAFETY: mapped in the child as in its parent; read as volatile, so that it is really touched.
                unsafe { byte.read_volatile() };
            };
            // SAFETY: sigaction(2) and one read of memory, both async-signal-safe.
            let mut child = unsafe { Forked::new(touch) };
            let WaitStatus::Exited(_, code) = child.reap() else { panic!("it was to exit in its handler") };
            // Only kernels that handle failures of the hardware's memory have this.
            let failures = std::path::Path::new("/proc/sys/vm/memory_failure_recovery").exists();
            assert_eq!(code, if failures { libc::BUS_MCEERR_AR } else { libc::BUS_ADRERR });
            Ok(())
        }),
        row("POISON: inherited by fork", Done, || {
            let memory = pages(1, MappingKind::Private);
            let Some(uffd) = uffd(uffd::Features::empty()) else {
                return crate::tables::skipped("no userfaultfd");
            };
            register(&uffd, &memory, M);
            uffd.poison(memory.address(), PAGE, true)?;
            let byte = memory.as_ptr();
            let touch = || {
                // SAFETY: mapped in the child as in its parent; read as volatile, so that it is really touched.
                unsafe { byte.read_volatile() };
            };
            // SAFETY: one read of memory, which is async-signal-safe.
            let mut child = unsafe { Forked::new(touch) };
            killed_by_sigbus(&mut child);
            Ok(())
        }),
    ]
}
