//! `UFFDIO_COPY`.

use std::ffi::CStr;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::without_provenance;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::ftruncate;
use uffd::{
    CopyOptions, CreateOptions, Factory, Faults, FileAccess, FileOptions, Mapping, MappingKind, Userfaultfd,
};
use userfaultfd_sys as sys;

use crate::support::{PAGE, elsewhere, fault, finish, pages};
use crate::tables::{
    CHANGING, Done, EFAULT, EINVAL, ENOENT, EXIST, Fails, Outcome, Row, Stop, partial, row, skipped,
};
use crate::world::{M, NONE, W, World, raw, while_changing};

const PROTECTED: CopyOptions = CopyOptions { wake: true, write_protect: true };

fn usual() -> CopyOptions {
    CopyOptions::default()
}

/// From the first page of other memory than the row's usual source.
fn copy_of(world: &World, source: &Mapping) -> Outcome {
    world.copy_from(0, 1, source.as_ptr(), usual())
}

/// Refused without anything being copied into the page in front of the border.
fn over_a_border(world: &World) -> Outcome {
    let outcome = world.copy(3, 2);
    world.zero(3, 1).expect("it is still missing");
    outcome
}

/// A file on a tmpfs of its own, which nobody else can see and which goes with its last descriptor.
pub(crate) fn tmpfs(size: &CStr, len: i64) -> Result<OwnedFd, Stop> {
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    let owned = |raw: libc::c_long| {
        let raw = Errno::result(raw)?;
        // SAFETY: the kernel has just put this descriptor (a small number) into our table; nobody else knows of it.
        Ok::<_, Errno>(unsafe { OwnedFd::from_raw_fd(raw as i32) })
    };
    let none: *const libc::c_char = std::ptr::null();
    // SAFETY: the name is NUL-terminated and lives across the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1) });
    let Ok(context) = context else { return skipped("a tmpfs of its own is not permitted") };
    let (fd, set, create) = (context.as_raw_fd(), FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE);
    // SAFETY: both strings are NUL-terminated and live across the call.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, fd, set, c"size".as_ptr(), size.as_ptr(), 0) };
    Errno::result(result)?;
    // SAFETY: this command takes no strings.
    Errno::result(unsafe { libc::syscall(libc::SYS_fsconfig, fd, create, none, none, 0) })?;
    // SAFETY: takes numbers.
    let mount = owned(unsafe { libc::syscall(libc::SYS_fsmount, fd, 1, 0) })?;
    let path = format!("/proc/self/fd/{}/file", mount.as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    let file = OwnedFd::from(file);
    ftruncate(&file, len).unwrap();
    Ok(file)
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = destination();
    rows.extend(source());
    rows.extend(effects());
    rows
}

fn destination() -> Vec<Row> {
    vec![
        row("COPY: all done", Done, || World::private(M).copy(0, 8)),
        row("COPY: never registered", ENOENT, || World::private(NONE).copy(0, 1)),
        row("COPY: unregistered", ENOENT, || {
            let world = World::private(M);
            world.unregister(0, 1)?;
            world.copy(0, 1)
        }),
        row("COPY: unmapped", ENOENT, || World::private(M).unmapped(3).copy(3, 1)),
        row("COPY: past the end of its mapping", ENOENT, || over_a_border(&World::private(M).unmapped(4))),
        row("COPY: into a mapping of another mode", ENOENT, || {
            let world = World::private(M);
            world.register_pages(4, 4, W)?;
            over_a_border(&world)
        }),
        row("COPY: into a mapping split off by mprotect", ENOENT, || {
            over_a_border(&World::private(M).with_protection(4, libc::PROT_READ))
        }),
        row("COPY: page present", EXIST, || World::private(M).filled(0, 1).copy(0, 1)),
        row("COPY: zero page present", EXIST, || {
            let world = World::private(M);
            world.zero(0, 1)?;
            world.copy(0, 1)
        }),
        row("COPY: mapped transparent huge page", EXIST, || {
            let world = World::transparent()?;
            world.register_pages(0, 512, M)?;
            world.copy(5, 1)
        }),
        row("COPY: page present does not wake", EXIST, || {
            let world = World::private(M);
            let reader = world.reader(0);
            fault(&world.uffd);
            world.copy_from(0, 1, world.source(), CopyOptions { wake: false, ..usual() })?;
            let outcome = world.copy(0, 1);
            assert_eq!(world.asleep(), 1);
            world.wake(0)?;
            assert_eq!(finish(&reader), 7);
            outcome
        }),
        row("COPY: shmem page in the page cache but not mapped", EXIST, || {
            World::shared(M).in_page_cache(0).copy(0, 1)
        }),
        row("COPY: later page present", partial(2), || World::private(M).filled(2, 1).copy(0, 4)),
        row("COPY: range not registered for write-protect", EINVAL, || {
            let world = World::private(M);
            world.copy_from(0, 1, world.source(), PROTECTED)
        }),
        row("COPY: beyond end of file", EFAULT, || World::shared(M).truncated(4).copy(5, 1)),
        row("COPY: dst PROT_NONE", Done, || World::private(M).with_protection(0, libc::PROT_NONE).copy(0, 1)),
        row("COPY: dst PROT_READ", Done, || {
            let world = World::private(M).with_protection(0, libc::PROT_READ);
            world.copy(0, 1)?;
            assert_eq!(world.byte(0), 7);
            Ok(())
        }),
        row("COPY: write-protect only range", Done, || World::private(W).copy(0, 1)),
        row("COPY: tmpfs full", Fails(libc::ENOMEM), || {
            let file = tmpfs(c"16k", 8 * PAGE as i64)?;
            let options = FileOptions { access: FileAccess::Shared, ..FileOptions::default() };
            World::of(Mapping::of_file(file, options)?, M).filled(0, 4).copy(4, 1)
        }),
        row("COPY: unread event", CHANGING, || while_changing(|world| world.copy(0, 1))),
        row("COPY: garbage while an event is unread", CHANGING, || {
            while_changing(|world| world.copy_from(0, 0, std::ptr::null(), usual()))
        }),
    ]
}

/// A uffd that sees faults of user mode only.
fn of_user_mode() -> Userfaultfd {
    let options = CreateOptions { faults: Faults::User, ..CreateOptions::default() };
    Factory::syscall_only().create(&options).unwrap()
}

fn source() -> Vec<Row> {
    vec![
        row("COPY: src unmapped", EFAULT, || {
            let source = World::private(NONE).unmapped(3);
            World::private(M).copy_from(0, 1, source.pointer(3).cast(), usual())
        }),
        row("COPY: src NULL", EFAULT, || World::private(M).copy_from(0, 1, std::ptr::null(), usual())),
        row("COPY: src PROT_NONE", EFAULT, || {
            let source = World::private(NONE).with_protection(0, libc::PROT_NONE);
            copy_of(&World::private(M), &source.memory)
        }),
        row("COPY: later source page bad", partial(1), || {
            let source = World::private(NONE).unmapped(4);
            World::private(M).copy_from(0, 2, source.pointer(3).cast(), usual())
        }),
        row("COPY: src beyond the address space", EINVAL, || {
            World::private(M).copy_from(0, 1, without_provenance(1 << 62), usual())
        }),
        row("COPY: src unaligned", Done, || {
            let world = World::private(M);
            world.copy_from(0, 1, world.source().wrapping_add(3), usual())
        }),
        row("COPY: src missing in a registered range", Done, || {
            let (world, source) = (World::private(M), World::private(M));
            let memory = std::sync::Arc::clone(&source.memory);
            let copied = elsewhere(move || {
                copy_of(&world, &memory)?;
                Ok::<_, Stop>(world.byte(0))
            });
            // It waits for the source, which somebody else fills.
            assert_eq!(fault(&source.uffd).address, source.at(0));
            assert!(copied.try_recv().is_err(), "it did not wait");
            source.copy(0, 1)?;
            assert_eq!(finish(&copied)?, 7);
            Ok(())
        }),
        row("COPY: src missing in a range registered for faults of user mode", EFAULT, || {
            let (world, owner) = (World::private(M), of_user_mode());
            let source = pages(1, MappingKind::Private);
            crate::support::register(&owner, &source, M);
            copy_of(&world, &source)
        }),
    ]
}

fn effects() -> Vec<Row> {
    vec![
        row("COPY: poisoned page", Done, || {
            let world = World::private(M).poisoned(0);
            world.copy(0, 1)?;
            assert_eq!(world.byte(0), 7);
            Ok(())
        }),
        row("COPY: guard page", Done, || {
            let world = World::private(M).guarded(0);
            world.copy(0, 1)?;
            assert_eq!(world.byte(0), 7);
            Ok(())
        }),
        row("COPY: write-protected hole loses its protection", Done, || {
            let world = World::marked();
            world.copy(0, 1)?;
            assert!(!world.is_protected(0));
            Ok(())
        }),
        row("COPY: write-protected hole keeps its protection with MODE_WP", Done, || {
            let world = World::marked();
            world.copy_from(0, 1, world.source(), PROTECTED)?;
            assert!(world.is_protected(0));
            Ok(())
        }),
        row("COPY: range owned by another uffd of the same process", Done, || {
            let (world, other) = (World::private(M), World::private(NONE));
            let reader = world.reader(0);
            fault(&world.uffd);
            world.copy_by(&other.uffd, 0, 1, world.source(), usual())?;
            assert_eq!(world.asleep(), 1, "the other's waiter was woken");
            world.wake(0)?;
            assert_eq!(finish(&reader), 7);
            Ok(())
        }),
        row("COPY: struct not writable", EFAULT, || {
            let (world, page) = (World::private(M), pages(1, MappingKind::Private));
            let (dst, src) = (world.at(0), world.source() as u64);
            let argument = page.as_ptr().cast::<sys::uffdio_copy>();
            // SAFETY: the page is the row's own, aligned and large enough.
            unsafe { argument.write(sys::uffdio_copy { dst, src, len: PAGE, mode: 0, copy: 0 }) };
            let structure = World::of(page, NONE).with_protection(0, libc::PROT_READ);
            let fd = std::os::fd::AsFd::as_fd(&world.uffd).as_raw_fd();
            // SAFETY: the structure of this number, readable; the kernel cannot write to it.
            let result = unsafe { libc::ioctl(fd, sys::UFFDIO_COPY as _, argument) };
            // The page is installed all the same.
            assert_eq!(world.byte(0), 7);
            drop(structure);
            Ok(Errno::result(result).map(drop)?)
        }),
        row("COPY: discarded page is missing again", Done, || {
            let world = World::private(M).filled(0, 1);
            let address = std::ptr::NonNull::new(world.pointer(0)).unwrap();
            // SAFETY: a page of the row's own, to which nothing refers.
            unsafe { madvise(address, PAGE as usize, MmapAdvise::MADV_DONTNEED) }?;
            world.copy(0, 1)
        }),
        row("COPY: output untouched where refused before the work began", EINVAL, || {
            let world = World::private(M);
            let (dst, src) = (world.at(0), 1 << 62);
            let mut argument = sys::uffdio_copy { dst, src, len: PAGE, mode: 0, copy: 77 };
            let outcome = raw(&world.uffd, &mut argument);
            assert_eq!(argument.copy, 77);
            outcome
        }),
    ]
}
