//! Huge pages from the pool: everything is done to whole ones.

use std::fs;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use uffd::{
    AnonymousOptions, CopyOptions, Features, FileAccess, FileOptions, Ioctls, Mapping, MappingKind,
    MemfdOptions, Modes, MoveOptions, Pages, Userfaultfd,
};

use crate::memory::takes;
use crate::scan::{take, tracked};
use crate::support::{PAGE, pages, registered};
use crate::tables::{Done, EFAULT, EINVAL, EXIST, Expect, Fails, Outcome, Row, Stop, row, skipped};
use crate::world::{C, M, NONE, W, World};

/// As many free huge pages as a test has chosen, whose turn it is: the pool is the machine's. It is as it was before when
/// this is dropped.
pub(crate) struct Pool {
    size: usize,
    before: Option<u64>,
}

impl Pool {
    pub(crate) fn with(size: usize, wanted: u64) -> Result<Self, Stop> {
        let mut pool = Self { size, before: None };
        let Some(total) = pool.figure("nr_hugepages") else {
            return skipped(format!("this kernel has no huge pages of {size} bytes"));
        };
        let before = pool.unused();
        if before != wanted {
            pool.before = Some(total);
            if let Err(error) = pool.set(total - before + wanted) {
                pool.before = None;
                return skipped(format!("the pool of huge pages may not be changed: {error}"));
            }
        }
        match pool.unused() {
            unused if unused == wanted => Ok(pool),
            unused => skipped(format!("{unused} huge pages of {size} bytes are free instead of {wanted}")),
        }
    }

    fn path(&self, name: &str) -> String {
        format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", self.size >> 10)
    }

    fn figure(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.path(name)).ok()?.trim().parse().ok()
    }

    /// Free ones that no mapping has set aside.
    fn unused(&self) -> u64 {
        let [free, reserved] =
            ["free_hugepages", "resv_hugepages"].map(|name| self.figure(name).unwrap_or(0));
        free.saturating_sub(reserved)
    }

    fn set(&self, count: u64) -> std::io::Result<()> {
        fs::write(self.path("nr_hugepages"), count.to_string())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            self.set(before).unwrap();
        }
    }
}

/// A world of one huge page: the one of the pool.
fn private(size: usize, modes: Modes) -> Result<World, Stop> {
    of(Mapping::new(size, MappingKind::Huge(size))?, modes)
}

fn shared(size: usize, modes: Modes) -> Result<World, Stop> {
    of(Mapping::new(size, MappingKind::SharedHuge(size))?, modes)
}

fn of(memory: Mapping, modes: Modes) -> Result<World, Stop> {
    let world = World::of(memory, modes);
    world.with_resident_source()?;
    Ok(world)
}

fn cached(size: usize) -> Result<World, Stop> {
    let world = shared(size, M | C)?;
    fallocate(world.memory.memfd().unwrap(), FallocateFlags::empty(), 0, size as i64)?;
    Ok(world)
}

/// Not set aside when it is mapped, so that the pool may be empty: private, of a memfd.
fn without_reserve(size: usize, count: usize) -> Result<Mapping, Stop> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB;
    let size_code = MFdFlags::from_bits_retain(size.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    let memfd = memfd_create(c"uffd-rows", flags | size_code)?;
    ftruncate(&memfd, (size * count) as i64)?;
    let options = FileOptions { access: FileAccess::CopyOnWrite, ..FileOptions::default() };
    Ok(Mapping::of_file(memfd, options)?)
}

const ENOMEM: Expect = Fails(libc::ENOMEM);

/// No ZEROPAGE, no MOVE.
const BASIC: Ioctls = Ioctls::WAKE.union(Ioctls::COPY).union(Ioctls::POISON);

fn reports(size: usize, memory: Result<Mapping, uffd::MappingError>) -> Outcome {
    let memory = memory?;
    takes((memory.address(), size as u64), true, BASIC)
}

/// `len` bytes from an ordinary page inside the huge one on.
fn copy_at(world: &World, offset: u64, len: usize) -> Outcome {
    // SAFETY: the source is the world's, of one huge page.
    Ok(unsafe { world.uffd.copy(world.at(0) + offset, world.source(), len, CopyOptions::default()) }?)
}

pub(crate) fn rows(size: usize) -> Vec<Row> {
    let title = if size == 1 << 30 { "1 GiB" } else { "2 MiB" };
    let named = move |ioctl: &str, case: &str| format!("{ioctl}: hugetlb {title}, {case}");
    let mut rows = registering(size, &named);
    rows.extend(filling(size, &named));
    rows.extend(others(size, &named));
    if size == 1 << 30 {
        // Before it waits for the source, the kernel copies into another page, which it can make only if it is of 2 MiB.
        rows.push(row(
            named("COPY", "source not resident and no second page in the pool"),
            ENOMEM,
            move || {
                let huge = private(size, M)?;
                let source = Mapping::new(size, MappingKind::Private)?;
                huge.copy_from(0, 1, source.as_ptr(), CopyOptions::default())
            },
        ));
    }
    rows
}

fn registering(size: usize, named: &dyn Fn(&str, &str) -> String) -> Vec<Row> {
    let pages = Pages::Huge(size);
    let anonymous = move |shared| Mapping::anonymous(size, AnonymousOptions { pages, shared });
    let memfd =
        move |private| Mapping::with_memfd(size, &MemfdOptions { private, pages, ..MemfdOptions::default() });
    vec![
        row(named("memory", "anonymous private"), Done, move || reports(size, anonymous(false))),
        row(named("memory", "anonymous shared"), Done, move || reports(size, anonymous(true))),
        row(named("memory", "memfd private"), Done, move || reports(size, memfd(true))),
        row(named("memory", "memfd shared"), Done, move || reports(size, memfd(false))),
        row(named("REGISTER", "start not huge page aligned"), EINVAL, move || {
            let huge = private(size, NONE)?;
            huge.register(huge.at(0) + PAGE, size as u64 - PAGE, M)
        }),
        row(named("REGISTER", "end not huge page aligned"), EINVAL, move || {
            let huge = private(size, NONE)?;
            huge.register(huge.at(0), PAGE, M)
        }),
        row(named("UNREGISTER", "unaligned"), EINVAL, move || {
            let huge = private(size, M)?;
            Ok(huge.uffd.unregister(huge.at(0), PAGE)?)
        }),
        row(named("UNREGISTER", "whole page"), Done, move || private(size, M)?.unregister(0, 1)),
        row(named("WAKE", "whole page"), Done, move || private(size, M)?.wake(0)),
    ]
}

fn filling(size: usize, named: &dyn Fn(&str, &str) -> String) -> Vec<Row> {
    vec![
        row(named("COPY", "whole page, then WRITEPROTECT of it, then page present"), EXIST, move || {
            let huge = private(size, M | W)?;
            huge.copy(0, 1)?;
            assert_eq!(huge.byte(0), 7);
            huge.protect(0, 1)?;
            assert!(huge.is_protected(0));
            huge.copy(0, 1)
        }),
        row(named("COPY", "dst not huge page sized"), EINVAL, move || {
            copy_at(&World::of(without_reserve(size, 2)?, M), PAGE, size)
        }),
        row(named("COPY", "len not huge page sized"), EINVAL, move || {
            copy_at(&private(size, M)?, 0, PAGE as usize)
        }),
        // For the kernel, what it cannot allocate is there already where a table of entries exists for it: pages of
        // 2 MiB need one, those of 1 GiB do not.
        row(named("COPY", "pool empty"), if size == 1 << 30 { ENOMEM } else { EXIST }, move || {
            let _set_aside = Mapping::new(size, MappingKind::Huge(size))?;
            of(without_reserve(size, 1)?, M)?.copy(0, 1)
        }),
        row(named("ZEROPAGE", "whole page"), EINVAL, move || private(size, M)?.zero(0, 1)),
        row(named("POISON", "whole page, then over poison"), EXIST, move || {
            let huge = private(size, M)?;
            huge.poison(0, 1)?;
            huge.poison(0, 1)
        }),
        row(named("POISON", "len not huge page sized"), EINVAL, move || {
            let huge = private(size, M)?;
            Ok(huge.uffd.poison(huge.at(0), PAGE, true)?)
        }),
        row(named("POISON", "dst not huge page sized"), EINVAL, move || {
            let world = World::of(without_reserve(size, 2)?, M);
            Ok(world.uffd.poison(world.at(0) + PAGE, size as u64, true)?)
        }),
        row(named("CONTINUE", "page in the cache, then already mapped"), EXIST, move || {
            let huge = cached(size)?;
            huge.proceed(0, 1)?;
            assert_eq!(huge.byte(0), 0);
            huge.proceed(0, 1)
        }),
        row(named("CONTINUE", "page not in the cache"), EFAULT, move || shared(size, M | C)?.proceed(0, 1)),
        row(named("CONTINUE", "len not huge page sized"), EINVAL, move || {
            let huge = shared(size, M | C)?;
            Ok(huge.uffd.continue_pages(huge.at(0), PAGE, uffd::ContinueOptions::default())?)
        }),
    ]
}

fn others(size: usize, named: &dyn Fn(&str, &str) -> String) -> Vec<Row> {
    vec![
        row(named("WRITEPROTECT", "hole"), Done, move || {
            let huge = private(size, M | W)?;
            huge.protect(0, 1)?;
            assert!(huge.is_protected(0));
            Ok(())
        }),
        row(named("WRITEPROTECT", "4 KiB range"), EINVAL, move || {
            let huge = private(size, M | W)?;
            Ok(huge.uffd.write_protect(huge.at(0), PAGE, true, true)?)
        }),
        row(named("PAGEMAP_SCAN", "one byte written"), Done, move || {
            let huge = tracked(Mapping::new(size, MappingKind::Huge(size))?, W);
            huge.protect(0, 1)?;
            assert_eq!(take(&huge)?, []);
            huge.memory.write(PAGE as usize, &[1])?;
            assert_eq!(take(&huge)?, [(0, size as u64 / PAGE)]);
            Ok(())
        }),
        row(named("MOVE", "dst"), EINVAL, move || {
            let huge = private(size, M)?;
            let source = pages(size / PAGE as usize, MappingKind::Private);
            source.write(0, &[1])?;
            move_page(&huge.uffd, huge.at(0), source.address(), size)
        }),
        row(named("MOVE", "src"), EINVAL, move || {
            let huge = private(size, NONE)?;
            let count = size / PAGE as usize;
            let Some((uffd, memory)) = registered(count, M, Features::empty()) else {
                return skipped("no userfaultfd");
            };
            move_page(&uffd, memory.address(), huge.at(0), size)
        }),
    ]
}

fn move_page(uffd: &Userfaultfd, dst: u64, src: u64, len: usize) -> Outcome {
    // SAFETY: no reference to either side exists.
    Ok(unsafe { uffd.move_pages(dst, src, len as u64, MoveOptions::default()) }?)
}
