//! Which memory can be registered, and what REGISTER then says it can take.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::ftruncate;
use uffd::{Features, Ioctls, Mapping, MappingKind, Modes};

use crate::support::{PAGE, pages, uffd};
use crate::tables::{Done, EINVAL, Fails, Outcome, Row, Stop, row, skipped};
use crate::world::{C, M, NONE, W, World, system_v, transparent};

const TWO: usize = 2 * PAGE as usize;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Two pages, mapped as only a row would.
struct Region {
    address: *mut libc::c_void,
    len: usize,
}

// SAFETY: plain memory that no reference is made to.
unsafe impl Send for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by the row that made this, and nothing refers to it. What was sealed stays.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

fn map(protection: i32, flags: i32, file: Option<&OwnedFd>) -> Result<Region, Errno> {
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: without a wanted address, a new mapping replaces nothing.
    let address = unsafe { libc::mmap(null_mut(), TWO, protection, flags, fd, 0) };
    if address == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(Region { address, len: TWO }) }
}

fn anonymous(protection: i32, flags: i32) -> Result<Region, Stop> {
    Ok(map(protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags, None)?)
}

fn try_modes(range: (u64, u64), modes: Modes, features: Features) -> Result<Ioctls, uffd::UffdError> {
    let uffd = uffd(features).expect("checked before the first row");
    // SAFETY: no reference to the memory exists, or (memory of the runtime) all of it is there, so that nobody waits.
    unsafe { uffd.register(range.0, range.1, modes) }
}

fn range(region: &Region) -> (u64, u64) {
    (region.address as u64, region.len as u64)
}

/// Missing, write-protect, both; with minor faults or never so. Each reports the ioctls that it should.
pub(crate) fn takes(range: (u64, u64), minor: bool, basic: Ioctls) -> Outcome {
    for bits in 1..8 {
        let modes = Modes::from_bits_retain(bits);
        let result = try_modes(range, modes, Features::empty());
        if modes.contains(C) && !minor {
            assert_eq!(result.unwrap_err().errno(), Some(libc::EINVAL), "{modes:?}");
            continue;
        }
        let mut expected = basic;
        expected.set(Ioctls::WRITEPROTECT, modes.contains(W));
        expected.set(Ioctls::CONTINUE, modes.contains(C));
        assert_eq!(result?, expected, "{modes:?}");
    }
    Ok(())
}

const SMALL: Ioctls =
    Ioctls::WAKE.union(Ioctls::COPY).union(Ioctls::ZEROPAGE).union(Ioctls::MOVE).union(Ioctls::POISON);

fn anonymous_takes(range: (u64, u64)) -> Outcome {
    takes(range, false, SMALL)
}

fn shmem_takes(range: (u64, u64)) -> Outcome {
    takes(range, true, SMALL)
}

/// Refused in every mode, always with the same errno.
fn refuses(range: (u64, u64)) -> Outcome {
    let outcomes = [M, W, M | W, C].map(|modes| try_modes(range, modes, Features::empty()).map(drop));
    assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "{outcomes:?}");
    Ok(outcomes[0]?)
}

/// Write-protect mode alone, where the kernel resolves such faults itself.
fn takes_async(range: (u64, u64)) -> Outcome {
    let ioctls = try_modes(range, W, Features::WP_ASYNC)?;
    assert_eq!(ioctls, SMALL | Ioctls::WRITEPROTECT);
    Ok(())
}

fn whole(memory: &Mapping) -> (u64, u64) {
    (memory.address(), memory.len() as u64)
}

/// Pages of the running program, by the name in /proc/self/maps: the first or the last one, which is there.
fn named(name: &str, last: bool) -> Result<(u64, u64), Stop> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let Some(line) = maps.lines().find(|line| line.ends_with(name)) else {
        return skipped(format!("no {name} in this process"));
    };
    let (start, rest) = line.split_once('-').unwrap();
    let end = rest.split(' ').next().unwrap();
    let [start, end] = [start, end].map(|number| u64::from_str_radix(number, 16).unwrap());
    Ok((if last { end - PAGE } else { start }, PAGE))
}

fn memfd(size: i64) -> OwnedFd {
    let fd = memfd_create(c"uffd-rows", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

fn sealed() -> OwnedFd {
    let fd = memfd(TWO as i64);
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    fd
}

/// The same file, for reading only.
fn read_only(fd: &OwnedFd) -> OwnedFd {
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().into()
}

/// A file beside the test program, which lives on a disk.
fn disk_file() -> Result<OwnedFd, Stop> {
    let path = std::env::current_exe().unwrap().with_extension(format!("rows-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    fs::remove_file(path).unwrap();
    file.set_len(TWO as u64).unwrap();
    let fd = OwnedFd::from(file);
    if fstatfs(&fd).unwrap().filesystem_type() == TMPFS_MAGIC {
        return skipped("the test program is on a tmpfs, not on a disk");
    }
    Ok(fd)
}

fn secret() -> Result<Region, Stop> {
    // SAFETY: takes a number.
    let Ok(fd) = Errno::result(unsafe { libc::syscall(libc::SYS_memfd_secret, 0) }) else {
        return skipped("memfd_secret(2) is not there or switched off");
    };
    // SAFETY: the kernel has just put this descriptor (a small number) into our table; nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    ftruncate(&fd, TWO as i64).unwrap();
    Ok(map(WRITE, libc::MAP_SHARED, Some(&fd))?)
}

fn droppable() -> Result<Region, Stop> {
    const MAP_DROPPABLE: i32 = 8;
    match map(WRITE, MAP_DROPPABLE | libc::MAP_ANONYMOUS, None) {
        Err(Errno::EINVAL) => skipped("MAP_DROPPABLE is not there (Linux 6.11)"),
        region => Ok(region?),
    }
}

fn system_v_region() -> Result<Region, Stop> {
    Ok(Region { address: system_v(null_mut(), 0)?, len: PAGE as usize })
}

fn file_of_tmpfs() -> Result<OwnedFd, Stop> {
    crate::copy::tmpfs(c"1m", TWO as i64)
}

fn zero_device() -> OwnedFd {
    OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap().into()
}

fn sealed_mapping() -> Result<Region, Stop> {
    const SYS_MSEAL: libc::c_long = 462;
    let region = anonymous(WRITE, 0)?;
    // SAFETY: the row's own memory; it stays mapped to the end of the process.
    let result = unsafe { libc::syscall(SYS_MSEAL, region.address, region.len, 0) };
    if Errno::result(result).is_err() {
        return skipped("mseal(2) is not there (Linux 6.10)");
    }
    Ok(region)
}

fn mapped(flags: i32, protection: i32, file: &OwnedFd, check: fn((u64, u64)) -> Outcome) -> Outcome {
    check(range(&map(protection, flags, Some(file))?))
}

const PRIVATE: i32 = libc::MAP_PRIVATE;
const SHARED: i32 = libc::MAP_SHARED;
const EPERM: crate::tables::Expect = Fails(libc::EPERM);

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row("memory: private anonymous", Done, || anonymous_takes(range(&anonymous(WRITE, 0)?))),
        row("memory: heap", Done, || anonymous_takes(named("[heap]", false)?)),
        row("memory: stack", Done, || anonymous_takes(named("[stack]", true)?)),
        row("memory: GROWSDOWN", Done, || anonymous_takes(range(&anonymous(WRITE, libc::MAP_GROWSDOWN)?))),
        row("memory: mlocked", Done, || anonymous_takes(range(&anonymous(WRITE, libc::MAP_LOCKED)?))),
        row("memory: PROT_NONE", Done, || anonymous_takes(range(&anonymous(libc::PROT_NONE, 0)?))),
        row("memory: PROT_READ", Done, || anonymous_takes(range(&anonymous(READ, 0)?))),
        row("memory: transparent huge pages", Done, || anonymous_takes(whole(&transparent()?))),
        row("memory: /dev/zero private", Done, || mapped(PRIVATE, WRITE, &zero_device(), anonymous_takes)),
        row("memory: mseal'ed", Done, || anonymous_takes(range(&sealed_mapping()?))),
        row("memory: shared anonymous", Done, || {
            shmem_takes(range(&map(WRITE, SHARED | libc::MAP_ANONYMOUS, None)?))
        }),
        row("memory: memfd shared", Done, || mapped(SHARED, WRITE, &memfd(TWO as i64), shmem_takes)),
        row("memory: tmpfs file shared", Done, || mapped(SHARED, WRITE, &file_of_tmpfs()?, shmem_takes)),
        row("memory: /dev/zero shared", Done, || mapped(SHARED, WRITE, &zero_device(), shmem_takes)),
        row("memory: memfd private", Done, || mapped(PRIVATE, WRITE, &memfd(TWO as i64), shmem_takes)),
        row("memory: tmpfs file private", Done, || mapped(PRIVATE, WRITE, &file_of_tmpfs()?, shmem_takes)),
        row("memory: memfd private of a descriptor for reading", Done, || {
            mapped(PRIVATE, WRITE, &read_only(&memfd(TWO as i64)), shmem_takes)
        }),
        row("memory: memfd private with F_SEAL_WRITE", Done, || {
            mapped(PRIVATE, WRITE, &sealed(), shmem_takes)
        }),
        row("memory: shared of a descriptor for reading", EPERM, || {
            mapped(SHARED, READ, &read_only(&memfd(TWO as i64)), refuses)
        }),
        row("memory: shared with F_SEAL_WRITE", EPERM, || mapped(SHARED, READ, &sealed(), refuses)),
        row("memory: disk file private", EINVAL, || mapped(PRIVATE, WRITE, &disk_file()?, refuses)),
        row("memory: disk file shared", EINVAL, || mapped(SHARED, WRITE, &disk_file()?, refuses)),
        row("memory: System V", EINVAL, || refuses(range(&system_v_region()?))),
        row("memory: memfd_secret", EINVAL, || refuses(range(&secret()?))),
        row("memory: MAP_DROPPABLE", EINVAL, || refuses(range(&droppable()?))),
        row("memory: vdso", EINVAL, || refuses(named("[vdso]", false)?)),
        row("memory: vvar", EINVAL, || refuses(named("[vvar]", false)?)),
        row("memory: WP_ASYNC, disk file", Done, || mapped(SHARED, WRITE, &disk_file()?, takes_async)),
        row("memory: WP_ASYNC, System V", Done, || takes_async(range(&system_v_region()?))),
        row("memory: WP_ASYNC, memfd_secret", Done, || takes_async(range(&secret()?))),
        row("memory: WP_ASYNC, private anonymous", Done, || takes_async(range(&anonymous(WRITE, 0)?))),
        row("memory: WP_ASYNC, MAP_DROPPABLE", EINVAL, || takes_async(range(&droppable()?))),
        row("memory: WP_ASYNC, vdso", EINVAL, || takes_async(named("[vdso]", false)?)),
        row("memory: WP_ASYNC, vvar", EINVAL, || takes_async(named("[vvar]", false)?)),
        row("memory: CONTINUE of shared memory that reports none", Done, || {
            World::shared(M).in_page_cache(0).proceed(0, 1)
        }),
        row("memory: registering splits mappings, and unregistering merges them", Done, || {
            let memory = pages(8, MappingKind::Private);
            let world = World::of(memory, NONE);
            let before = mappings_of(&world);
            world.register_pages(3, 1, M)?;
            assert_eq!(mappings_of(&world), before + 2);
            world.unregister(3, 1)?;
            assert_eq!(mappings_of(&world), before);
            Ok(())
        }),
    ]
}

/// Mappings of the process that the world's pages lie in.
fn mappings_of(world: &World) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let bounds = |line: &str| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        [start, end].map(|number| u64::from_str_radix(number, 16).unwrap())
    };
    let (first, behind) = (world.at(0), world.at(8));
    maps.lines().map(bounds).filter(|[start, end]| *start < behind && *end > first).count()
}
