//! What the kernel answers to every wrong (and some right) use, as a table: each row makes the real call on memory of
//! its own and says what must come of it, classified. A row that differs on the running kernel is named, not hidden.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::os::fd::AsRawFd;

use uffd::{
    ContinueOptions, CopyOptions, EventBuffer, Features, Mapping, MappingKind, MemfdOptions, Modes,
    MoveOptions, UffdError, Userfaultfd,
};

use support::{PAGE, elsewhere, events, finish, pages, register, uffd};

const M: Modes = Modes::MISSING;
const W: Modes = Modes::WRITE_PROTECT;
const C: Modes = Modes::MINOR;

type Outcome = Result<(), UffdError>;

/// What a row expects.
#[derive(Debug, PartialEq)]
enum Expect {
    Done,
    Is(UffdError),
    Errno(i32),
}
use Expect::{Done, Errno, Is};

const EXIST: Expect = Is(UffdError::PageExist);
const ENOENT: Expect = Is(UffdError::NotRegistered);
const GONE: Expect = Is(UffdError::UffdClosed);
const CHANGING: Expect = Is(UffdError::Changing);

fn partial(pages: u64) -> Expect {
    Is(UffdError::PartiallyCopied { done: pages * PAGE })
}

fn matches(expect: &Expect, outcome: &Outcome) -> bool {
    match (expect, outcome) {
        (Done, Ok(())) => true,
        (Is(expected), Err(error)) => expected == error,
        (Errno(errno), Err(UffdError::System { errno: got, .. })) => *errno == *got as i32,
        _ => false,
    }
}

/// Eight pages and a uffd; what a row does not register is not.
struct World {
    uffd: Userfaultfd,
    memory: Mapping,
    source: Vec<u8>,
}

impl World {
    fn new(kind: MappingKind, modes: Modes) -> Self {
        Self::of(pages(8, kind), modes)
    }

    fn of(memory: Mapping, modes: Modes) -> Self {
        let uffd = uffd(Features::empty()).expect("checked before the first row");
        if !modes.is_empty() {
            register(&uffd, &memory, modes);
        }
        Self { uffd, memory, source: vec![7; 8 * PAGE as usize] }
    }

    fn private(modes: Modes) -> Self {
        Self::new(MappingKind::Private, modes)
    }

    fn shared(modes: Modes) -> Self {
        // Rows cut the memfd short, which a seal would forbid.
        let options = MemfdOptions { fixed_size: false, ..MemfdOptions::default() };
        Self::of(Mapping::with_memfd(8 * PAGE as usize, &options).unwrap(), modes)
    }

    fn at(&self, page: u64) -> u64 {
        self.memory.address() + page * PAGE
    }

    fn copy(&self, page: u64, count: u64) -> Outcome {
        self.copy_from(page, count, self.source.as_ptr(), CopyOptions::default())
    }

    fn copy_from(&self, page: u64, count: u64, source: *const u8, options: CopyOptions) -> Outcome {
        // SAFETY: `source` is memory of the row's own, or an address that the kernel is to refuse.
        unsafe { self.uffd.copy(self.at(page), source, (count * PAGE) as usize, options) }
    }

    fn zero(&self, page: u64, count: u64) -> Outcome {
        self.uffd.zero(self.at(page), count * PAGE, true)
    }

    fn poison(&self, page: u64, count: u64) -> Outcome {
        self.uffd.poison(self.at(page), count * PAGE, true)
    }

    fn proceed(&self, page: u64, count: u64) -> Outcome {
        self.uffd.continue_pages(self.at(page), count * PAGE, ContinueOptions::default())
    }

    fn protect(&self, page: u64, count: u64) -> Outcome {
        self.uffd.write_protect(self.at(page), count * PAGE, true, true)
    }

    fn move_from(&self, page: u64, source: u64, count: u64, allow_source_holes: bool) -> Outcome {
        let options = MoveOptions { allow_source_holes, ..MoveOptions::default() };
        // SAFETY: no reference to either side exists.
        unsafe { self.uffd.move_pages(self.at(page), source, count * PAGE, options) }
    }

    fn filled(self, page: u64, count: u64) -> Self {
        self.copy(page, count).unwrap();
        self
    }

    fn poisoned(self, page: u64) -> Self {
        self.poison(page, 1).unwrap();
        self
    }

    /// Takes the mapping of one page away.
    fn unmapped(self, page: u64) -> Self {
        // SAFETY: within the mapping; nothing refers to it. Its end unmaps what is left.
        let result = unsafe { libc::munmap(self.at(page) as *mut libc::c_void, PAGE as usize) };
        assert_eq!(result, 0);
        self
    }

    fn guarded(self, page: u64) -> Self {
        const MADV_GUARD_INSTALL: i32 = 102;
        // SAFETY: within the mapping; nothing refers to it.
        let result =
            unsafe { libc::madvise(self.at(page) as *mut libc::c_void, PAGE as usize, MADV_GUARD_INSTALL) };
        assert_eq!(result, 0, "MADV_GUARD_INSTALL");
        self
    }

    fn in_page_cache(self, page: u64) -> Self {
        let fd = self.memory.memfd().unwrap();
        nix::sys::uio::pwrite(fd, &[3; PAGE as usize], (page * PAGE) as i64).unwrap();
        self
    }

    /// Cut off at the end of `pages`.
    fn truncated(self, pages: i64) -> Self {
        nix::unistd::ftruncate(self.memory.memfd().unwrap(), pages * PAGE as i64).unwrap();
        self
    }
}

/// A world whose memory is changing: an event of it is unread while `act` runs.
fn while_changing(act: impl FnOnce(&World) -> Outcome) -> Outcome {
    let uffd = uffd(Features::EVENT_REMOVE).expect("checked before the first row");
    let world = World { uffd, memory: pages(8, MappingKind::Private), source: vec![7; 8 * PAGE as usize] };
    register(&world.uffd, &world.memory, M | W);
    world.zero(7, 1).unwrap();
    let (start, len) = (world.at(7), PAGE as usize);
    let discarded = elsewhere(move || {
        // SAFETY: a page of the mapping, which the row keeps until this is finished; nothing refers to it.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTNEED) }
    });
    wait_readable(&world.uffd);
    let outcome = act(&world);
    drop(events(&world.uffd, 1));
    finish(&discarded);
    outcome
}

fn wait_readable(uffd: &Userfaultfd) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap(), 1, "no event came");
}

/// With the uffd of a process that has exited.
fn of_the_dead(act: impl FnOnce(&Userfaultfd) -> Outcome) -> Outcome {
    act(&support::of_the_dead().expect("checked before the first row"))
}

fn register_outcome(world: &World, start: u64, len: u64, modes: Modes) -> Outcome {
    // SAFETY: no reference to the memory exists.
    unsafe { world.uffd.register(start, len, modes) }.map(drop)
}

type Row = (&'static str, Expect, fn() -> Outcome);

fn rows() -> Vec<Row> {
    vec![
        // ---- arguments, the same for every range ----
        ("start unaligned", Errno(libc::EINVAL), || {
            let world = World::private(M);
            world.uffd.zero(world.at(0) + 8, PAGE, true)
        }),
        ("len unaligned", Errno(libc::EINVAL), || {
            let world = World::private(M);
            world.uffd.zero(world.at(0), 100, true)
        }),
        ("len 0", Errno(libc::EINVAL), || World::private(M).zero(0, 0)),
        ("end beyond the address space", Errno(libc::EINVAL), || {
            World::private(M).uffd.zero(1 << 62, PAGE, true)
        }),
        ("overflow", Errno(libc::EINVAL), || {
            World::private(M).uffd.zero(u64::MAX - PAGE + 1, 2 * PAGE, true)
        }),
        // ---- REGISTER ----
        ("REGISTER no modes", Errno(libc::EINVAL), || {
            let world = World::private(Modes::empty());
            register_outcome(&world, world.at(0), PAGE, Modes::empty())
        }),
        ("REGISTER unknown mode", Errno(libc::EINVAL), || {
            let world = World::private(Modes::empty());
            register_outcome(&world, world.at(0), PAGE, Modes::from_bits_retain(8))
        }),
        ("REGISTER nothing mapped", Errno(libc::EINVAL), || {
            let world = World::private(Modes::empty()).unmapped(3);
            register_outcome(&world, world.at(3), PAGE, M)
        }),
        ("REGISTER hole in the middle", Done, || {
            let world = World::private(Modes::empty()).unmapped(3);
            register_outcome(&world, world.at(0), 8 * PAGE, M)
        }),
        ("REGISTER minor on private memory", Errno(libc::EINVAL), || {
            let world = World::private(Modes::empty());
            register_outcome(&world, world.at(0), PAGE, C)
        }),
        ("REGISTER another uffd's range", Errno(libc::EBUSY), || {
            let (world, other) = (World::private(M), World::private(Modes::empty()));
            register_outcome(&other, world.at(0), PAGE, M)
        }),
        ("REGISTER the same again", Done, || {
            let world = World::private(M);
            register_outcome(&world, world.at(0), 8 * PAGE, M)
        }),
        ("REGISTER while changing", Done, || {
            while_changing(|world| register_outcome(world, world.at(0), PAGE, M))
        }),
        ("REGISTER process gone", GONE, || {
            // SAFETY: nothing of ours is at that address of a process that is gone.
            of_the_dead(|uffd| unsafe { uffd.register(0x10_0000, PAGE, M) }.map(drop))
        }),
        // ---- UNREGISTER, WAKE ----
        ("UNREGISTER never registered", Done, || {
            let world = World::private(Modes::empty());
            world.uffd.unregister(world.at(0), PAGE)
        }),
        ("UNREGISTER twice", Done, || {
            let world = World::private(M);
            world.uffd.unregister(world.at(0), PAGE)?;
            world.uffd.unregister(world.at(0), PAGE)
        }),
        ("UNREGISTER part", Done, || {
            let world = World::private(M);
            world.uffd.unregister(world.at(2), PAGE)
        }),
        ("UNREGISTER nothing mapped", Errno(libc::EINVAL), || {
            let world = World::private(M).unmapped(3);
            world.uffd.unregister(world.at(3), PAGE)
        }),
        ("UNREGISTER while changing", Done, || {
            while_changing(|world| world.uffd.unregister(world.at(0), PAGE))
        }),
        ("UNREGISTER process gone", GONE, || of_the_dead(|uffd| uffd.unregister(0x10_0000, PAGE))),
        ("WAKE unregistered", Done, || {
            let world = World::private(Modes::empty());
            world.uffd.wake(world.at(0), PAGE)
        }),
        ("WAKE process gone", Done, || of_the_dead(|uffd| uffd.wake(0x10_0000, PAGE))),
        ("WAKE len 0", Errno(libc::EINVAL), || World::private(M).uffd.wake(PAGE, 0)),
        // ---- COPY ----
        ("COPY", Done, || World::private(M).copy(0, 8)),
        ("COPY never registered", ENOENT, || World::private(Modes::empty()).copy(0, 1)),
        ("COPY unregistered", ENOENT, || {
            let world = World::private(M);
            world.uffd.unregister(world.at(0), PAGE)?;
            world.copy(0, 1)
        }),
        ("COPY unmapped", ENOENT, || World::private(M).unmapped(3).copy(3, 1)),
        ("COPY over the end of its mapping", ENOENT, || World::private(M).unmapped(3).copy(2, 2)),
        ("COPY over a border of modes", ENOENT, || {
            let world = World::private(M);
            register_outcome(&world, world.at(4), 4 * PAGE, W)?;
            world.copy(3, 2)
        }),
        ("COPY page present", EXIST, || World::private(M).filled(0, 1).copy(0, 1)),
        ("COPY zero page present", EXIST, || {
            let world = World::private(M);
            world.zero(0, 1)?;
            world.copy(0, 1)
        }),
        ("COPY shmem page in the cache", EXIST, || World::shared(M).in_page_cache(0).copy(0, 1)),
        ("COPY later page present", partial(2), || World::private(M).filled(2, 1).copy(0, 4)),
        ("COPY source null", Errno(libc::EFAULT), || {
            World::private(M).copy_from(0, 1, std::ptr::null(), CopyOptions::default())
        }),
        ("COPY source beyond the address space", Errno(libc::EINVAL), || {
            World::private(M).copy_from(0, 1, std::ptr::without_provenance(1 << 62), CopyOptions::default())
        }),
        ("COPY source unaligned", Done, || {
            let world = World::private(M);
            world.copy_from(0, 1, world.source.as_ptr().wrapping_add(3), CopyOptions::default())
        }),
        ("COPY protected, range not registered for it", Errno(libc::EINVAL), || {
            let world = World::private(M);
            let options = CopyOptions { write_protect: true, ..CopyOptions::default() };
            world.copy_from(0, 1, world.source.as_ptr(), options)
        }),
        ("COPY beyond the end of the file", Errno(libc::EFAULT), || World::shared(M).truncated(4).copy(5, 1)),
        ("COPY into write-protect only", Done, || World::private(W).copy(0, 1)),
        ("COPY while changing", CHANGING, || while_changing(|world| world.copy(0, 1))),
        ("COPY process gone", GONE, || {
            let page = vec![0_u8; PAGE as usize];
            // SAFETY: `page` lives across the call.
            of_the_dead(|uffd| unsafe {
                uffd.copy(0x10_0000, page.as_ptr(), page.len(), CopyOptions::default())
            })
        }),
        // ---- ZEROPAGE ----
        ("ZEROPAGE", Done, || World::private(M).zero(0, 8)),
        ("ZEROPAGE shared", Done, || World::shared(M).zero(0, 8)),
        ("ZEROPAGE never registered", ENOENT, || World::private(Modes::empty()).zero(0, 1)),
        ("ZEROPAGE page present", EXIST, || World::private(M).filled(0, 1).zero(0, 1)),
        ("ZEROPAGE later page present", partial(3), || World::private(M).filled(3, 1).zero(0, 8)),
        ("ZEROPAGE over poison", EXIST, || World::private(M).poisoned(0).zero(0, 1)),
        ("ZEROPAGE over a guard page", EXIST, || World::private(M).guarded(0).zero(0, 1)),
        ("ZEROPAGE while changing", CHANGING, || while_changing(|world| world.zero(0, 1))),
        ("ZEROPAGE process gone", GONE, || of_the_dead(|uffd| uffd.zero(0x10_0000, PAGE, true))),
        // ---- POISON ----
        ("POISON", Done, || World::private(M).poison(0, 8)),
        ("POISON page present", EXIST, || World::private(M).filled(0, 1).poison(0, 1)),
        ("POISON poisoned", EXIST, || World::private(M).poisoned(0).poison(0, 1)),
        ("POISON later page present", partial(1), || World::private(M).filled(1, 1).poison(0, 4)),
        ("POISON beyond the end of the file", Errno(libc::EFAULT), || {
            World::shared(M).truncated(4).poison(5, 1)
        }),
        ("POISON never registered", ENOENT, || World::private(Modes::empty()).poison(0, 1)),
        ("POISON while changing", CHANGING, || while_changing(|world| world.poison(0, 1))),
        ("POISON process gone", GONE, || of_the_dead(|uffd| uffd.poison(0x10_0000, PAGE, true))),
        // ---- CONTINUE ----
        ("CONTINUE", Done, || World::shared(M | C).in_page_cache(0).proceed(0, 1)),
        ("CONTINUE not in the cache", Errno(libc::EFAULT), || World::shared(M | C).proceed(0, 1)),
        ("CONTINUE already mapped", EXIST, || {
            let world = World::shared(M | C).in_page_cache(0);
            world.proceed(0, 1)?;
            world.proceed(0, 1)
        }),
        ("CONTINUE later page not in the cache", partial(1), || {
            World::shared(M | C).in_page_cache(0).proceed(0, 2)
        }),
        ("CONTINUE private memory", Errno(libc::EINVAL), || World::private(M).proceed(0, 1)),
        ("CONTINUE beyond the end of the file", Errno(libc::EINVAL), || {
            World::shared(M | C).truncated(4).proceed(5, 1)
        }),
        ("CONTINUE unregistered", ENOENT, || World::shared(Modes::empty()).in_page_cache(0).proceed(0, 1)),
        ("CONTINUE protected, range not registered for it", Errno(libc::EINVAL), || {
            let world = World::shared(M | C).in_page_cache(0);
            let options = ContinueOptions { write_protect: true, ..ContinueOptions::default() };
            world.uffd.continue_pages(world.at(0), PAGE, options)
        }),
        ("CONTINUE while changing", CHANGING, || while_changing(|world| world.proceed(0, 1))),
        ("CONTINUE process gone", GONE, || {
            of_the_dead(|uffd| uffd.continue_pages(0x10_0000, PAGE, ContinueOptions::default()))
        }),
        // ---- WRITEPROTECT ----
        ("WRITEPROTECT", Done, || World::private(M | W).filled(0, 8).protect(0, 8)),
        ("WRITEPROTECT twice", Done, || {
            let world = World::private(M | W).filled(0, 1);
            world.protect(0, 1)?;
            world.protect(0, 1)
        }),
        ("WRITEPROTECT off what is not on", Done, || {
            let world = World::private(M | W).filled(0, 1);
            world.uffd.write_protect(world.at(0), PAGE, false, true)
        }),
        ("WRITEPROTECT registered without", ENOENT, || World::private(M).filled(0, 1).protect(0, 1)),
        ("WRITEPROTECT unregistered", ENOENT, || World::private(Modes::empty()).protect(0, 1)),
        ("WRITEPROTECT into memory registered without", ENOENT, || {
            let world = World::private(Modes::empty());
            register_outcome(&world, world.at(0), 4 * PAGE, M | W)?;
            register_outcome(&world, world.at(4), 4 * PAGE, M)?;
            world.protect(3, 2)
        }),
        ("WRITEPROTECT while changing", CHANGING, || while_changing(|world| world.protect(0, 1))),
        ("WRITEPROTECT process gone", GONE, || {
            of_the_dead(|uffd| uffd.write_protect(0x10_0000, PAGE, true, true))
        }),
        // ---- MOVE ----
        ("MOVE", Done, || {
            let (world, source) = (World::private(M), pages(2, MappingKind::Private));
            source.write(0, &[1; 2 * PAGE as usize]).unwrap();
            world.move_from(0, source.address(), 2, false)
        }),
        ("MOVE source hole", ENOENT, || {
            let (world, source) = (World::private(M), pages(1, MappingKind::Private));
            world.move_from(0, source.address(), 1, false)
        }),
        ("MOVE source hole allowed", Done, || {
            let (world, source) = (World::private(M), pages(1, MappingKind::Private));
            world.move_from(0, source.address(), 1, true)
        }),
        ("MOVE destination present", EXIST, || {
            let (world, source) = (World::private(M).filled(0, 1), pages(1, MappingKind::Private));
            source.write(0, &[1]).unwrap();
            world.move_from(0, source.address(), 1, false)
        }),
        ("MOVE destination not registered", Errno(libc::EINVAL), || {
            let (world, source) = (World::private(Modes::empty()), pages(1, MappingKind::Private));
            source.write(0, &[1]).unwrap();
            world.move_from(0, source.address(), 1, false)
        }),
        ("MOVE then a hole", partial(1), || {
            let (world, source) = (World::private(M), pages(2, MappingKind::Private));
            source.write(0, &[1]).unwrap();
            world.move_from(0, source.address(), 2, false)
        }),
        ("MOVE shared memory", Errno(libc::EINVAL), || {
            let (world, source) = (World::shared(M), pages(1, MappingKind::Private));
            source.write(0, &[1]).unwrap();
            world.move_from(0, source.address(), 1, false)
        }),
        ("MOVE overlapping is refused before the kernel misplaces pages", Errno(libc::EINVAL), || {
            let world = World::private(M).filled(0, 1);
            world.move_from(1, world.at(0), 2, true)
        }),
        ("MOVE by another process than the memory's", Errno(libc::EINVAL), || {
            let source = pages(1, MappingKind::Private);
            let from = source.address();
            // SAFETY: nothing of ours is at the destination, which is another process's; the source has no references.
            of_the_dead(|uffd| unsafe { uffd.move_pages(0x10_0000, from, PAGE, MoveOptions::default()) })
        }),
        // ---- read ----
        ("read nothing waiting", Done, || {
            let world = World::private(M);
            assert_eq!(world.uffd.read_events(&mut EventBuffer::new(4))?, 0);
            Ok(())
        }),
        ("read process gone", Done, || {
            of_the_dead(|uffd| {
                assert_eq!(uffd.read_events(&mut EventBuffer::new(4))?, 0);
                Ok(())
            })
        }),
        ("read of a blocking uffd does not block", Done, || {
            let world = World::private(M);
            // SAFETY: changes a flag of a descriptor of the row's own.
            let result = unsafe { libc::fcntl(world.uffd.as_upstream().as_raw_fd(), libc::F_SETFL, 0) };
            assert_eq!(result, 0);
            assert_eq!(world.uffd.read_events(&mut EventBuffer::new(4))?, 0);
            Ok(())
        }),
    ]
}

#[test]
fn the_kernel_answers_every_row_as_recorded() {
    if uffd(Features::EVENT_FORK | Features::EVENT_REMOVE | Features::POISON | Features::MOVE).is_none() {
        return;
    }
    let rows = rows();
    let count = rows.len();
    let mut different = Vec::new();
    for (name, expect, act) in rows {
        let outcome = finish(&elsewhere(act));
        if !matches(&expect, &outcome) {
            different.push(format!("{name}: expected {expect:?}, got {outcome:?}"));
        }
    }
    println!("{count} rows");
    assert!(different.is_empty(), "{}", different.join("\n"));
}
