//! What rows act on: eight pages and a uffd, in the state that the row is about.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::without_provenance_mut;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::pagemap::{Categories, Pagemap, ScanOptions};
use uffd::{
    AnonymousOptions, ContinueOptions, CopyOptions, Features, Mapping, MappingKind, MemfdOptions, Modes,
    MoveOptions, Pages, Populate, Userfaultfd, transparent_huge_page_size,
};
use userfaultfd_sys as sys;

use crate::support::{self, PAGE, elsewhere, events, finish, pages, register};
use crate::tables::{Outcome, Stop, skipped};

pub(crate) const M: Modes = Modes::MISSING;
pub(crate) const W: Modes = Modes::WRITE_PROTECT;
pub(crate) const C: Modes = Modes::MINOR;
pub(crate) const NONE: Modes = Modes::empty();

/// Eight pages and a uffd; what a row does not register is not.
pub(crate) struct World {
    pub(crate) uffd: Userfaultfd,
    pub(crate) memory: Arc<Mapping>,
    /// As long as the memory; of sevens where pages are ordinary, else zeros behind a seven.
    source: Mapping,
}

impl World {
    pub(crate) fn with(features: Features, memory: Mapping, modes: Modes) -> Self {
        let uffd = support::uffd(features).expect("checked before the first row");
        if !modes.is_empty() {
            register(&uffd, &memory, modes);
        }
        // Read without being written, this is the huge page of zeros: a source of 1 GiB costs nothing.
        let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
        let source = Mapping::anonymous(memory.len(), options).unwrap();
        let sevens = if memory.page_size() as u64 == PAGE { source.len() } else { 1 };
        source.write(0, &vec![7; sevens]).unwrap();
        Self { uffd, memory: Arc::new(memory), source }
    }

    pub(crate) fn of(memory: Mapping, modes: Modes) -> Self {
        Self::with(Features::empty(), memory, modes)
    }

    pub(crate) fn private(modes: Modes) -> Self {
        Self::of(pages(8, MappingKind::Private), modes)
    }

    pub(crate) fn shared(modes: Modes) -> Self {
        Self::of_memfd(false, modes)
    }

    /// A memfd mapped privately.
    pub(crate) fn private_memfd(modes: Modes) -> Self {
        Self::of_memfd(true, modes)
    }

    fn of_memfd(private: bool, modes: Modes) -> Self {
        // Rows cut the memfd short, which a seal would forbid.
        let options = MemfdOptions { private, fixed_size: false, ..MemfdOptions::default() };
        Self::of(Mapping::with_memfd(8 * PAGE as usize, &options).unwrap(), modes)
    }

    /// Private memory whose first page is a write-protected hole.
    pub(crate) fn marked() -> Self {
        let world = Self::with(Features::WP_UNPOPULATED, pages(8, MappingKind::Private), M | W);
        world.protect(0, 1).unwrap();
        assert!(world.is_protected(0));
        world
    }

    /// One transparent huge page, there and unregistered.
    pub(crate) fn transparent() -> Result<Self, Stop> {
        let world = Self::of(transparent()?, NONE);
        world.memory.write(0, &[1]).unwrap();
        if !is_huge(&world.memory) {
            return skipped("no transparent huge page could be had");
        }
        Ok(world)
    }

    pub(crate) fn page(&self) -> u64 {
        self.memory.page_size() as u64
    }

    pub(crate) fn at(&self, page: u64) -> u64 {
        self.memory.address() + page * self.page()
    }

    pub(crate) fn register(&self, start: u64, len: u64, modes: Modes) -> Outcome {
        // SAFETY: no reference to the memory exists.
        unsafe { self.uffd.register(start, len, modes) }?;
        Ok(())
    }

    pub(crate) fn register_pages(&self, page: u64, count: u64, modes: Modes) -> Outcome {
        self.register(self.at(page), count * self.page(), modes)
    }

    pub(crate) fn unregister(&self, page: u64, count: u64) -> Outcome {
        Ok(self.uffd.unregister(self.at(page), count * self.page())?)
    }

    pub(crate) fn copy(&self, page: u64, count: u64) -> Outcome {
        self.copy_from(page, count, self.source(), CopyOptions::default())
    }

    pub(crate) fn copy_from(
        &self,
        page: u64,
        count: u64,
        source: *const u8,
        options: CopyOptions,
    ) -> Outcome {
        self.copy_by(&self.uffd, page, count, source, options)
    }

    /// With a uffd that may be another one's.
    pub(crate) fn copy_by(
        &self,
        uffd: &Userfaultfd,
        page: u64,
        count: u64,
        source: *const u8,
        options: CopyOptions,
    ) -> Outcome {
        let len = (count * self.page()) as usize;
        // SAFETY: `source` is memory of the row's own, or an address that the kernel is to refuse.
        Ok(unsafe { uffd.copy(self.at(page), source, len, options) }?)
    }

    pub(crate) fn source(&self) -> *const u8 {
        self.source.as_ptr()
    }

    /// The kernel can copy all of the source at once.
    pub(crate) fn with_resident_source(&self) -> Outcome {
        Ok(self.source.populate(0, self.source.len(), Populate::ForReading)?)
    }

    pub(crate) fn zero(&self, page: u64, count: u64) -> Outcome {
        Ok(self.uffd.zero(self.at(page), count * self.page(), true)?)
    }

    pub(crate) fn poison(&self, page: u64, count: u64) -> Outcome {
        Ok(self.uffd.poison(self.at(page), count * self.page(), true)?)
    }

    pub(crate) fn proceed(&self, page: u64, count: u64) -> Outcome {
        self.proceed_with(page, count, ContinueOptions::default())
    }

    pub(crate) fn proceed_with(&self, page: u64, count: u64, options: ContinueOptions) -> Outcome {
        Ok(self.uffd.continue_pages(self.at(page), count * self.page(), options)?)
    }

    pub(crate) fn protect(&self, page: u64, count: u64) -> Outcome {
        Ok(self.uffd.write_protect(self.at(page), count * self.page(), true, true)?)
    }

    pub(crate) fn unprotect(&self, page: u64, count: u64) -> Outcome {
        Ok(self.uffd.write_protect(self.at(page), count * self.page(), false, true)?)
    }

    pub(crate) fn wake(&self, page: u64) -> Outcome {
        Ok(self.uffd.wake(self.at(page), self.page())?)
    }

    pub(crate) fn move_from(&self, page: u64, source: u64, count: u64, allow_source_holes: bool) -> Outcome {
        let options = MoveOptions { allow_source_holes, ..MoveOptions::default() };
        // SAFETY: no reference to either side exists.
        Ok(unsafe { self.uffd.move_pages(self.at(page), source, count * self.page(), options) }?)
    }

    pub(crate) fn filled(self, page: u64, count: u64) -> Self {
        self.copy(page, count).unwrap();
        self
    }

    pub(crate) fn poisoned(self, page: u64) -> Self {
        self.poison(page, 1).unwrap();
        self
    }

    /// Takes the mapping of one page away. Between others, where nothing that is mapped meanwhile has room: rows map no
    /// single page once there is a hole.
    pub(crate) fn unmapped(self, page: u64) -> Self {
        assert!((1..7).contains(&page));
        // SAFETY: within the mapping; nothing refers to it. Its end unmaps what is left.
        let result = unsafe { libc::munmap(self.pointer(page), PAGE as usize) };
        assert_eq!(result, 0);
        self
    }

    /// One page gets another protection, and so a mapping of its own.
    pub(crate) fn with_protection(self, page: u64, protection: i32) -> Self {
        // SAFETY: within the mapping; nothing refers to it.
        let result = unsafe { libc::mprotect(self.pointer(page), PAGE as usize, protection) };
        assert_eq!(result, 0);
        self
    }

    /// One page is System V shared memory, which cannot be registered.
    pub(crate) fn with_system_v(self, page: u64) -> Result<Self, Stop> {
        system_v(self.pointer(page), libc::SHM_REMAP)?;
        Ok(self)
    }

    pub(crate) fn guarded(self, page: u64) -> Self {
        const MADV_GUARD_INSTALL: i32 = 102;
        // SAFETY: within the mapping; nothing refers to it.
        let result = unsafe { libc::madvise(self.pointer(page), PAGE as usize, MADV_GUARD_INSTALL) };
        assert_eq!(result, 0, "MADV_GUARD_INSTALL");
        self
    }

    pub(crate) fn in_page_cache(self, page: u64) -> Self {
        let fd = self.memory.memfd().unwrap();
        nix::sys::uio::pwrite(fd, &[3; PAGE as usize], (page * PAGE) as i64).unwrap();
        self
    }

    /// Cut off at the end of `pages`.
    pub(crate) fn truncated(self, pages: i64) -> Self {
        nix::unistd::ftruncate(self.memory.memfd().unwrap(), pages * PAGE as i64).unwrap();
        self
    }

    pub(crate) fn pointer(&self, page: u64) -> *mut libc::c_void {
        without_provenance_mut(self.at(page) as usize)
    }

    /// The first byte of a page that does not wait, or the row still waits at its deadline.
    pub(crate) fn byte(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.memory.read((page * self.page()) as usize, &mut byte).unwrap();
        byte[0]
    }

    /// A thread that reads the first byte of a page, or waits for it.
    pub(crate) fn reader(&self, page: u64) -> Receiver<u8> {
        let (memory, offset) = (Arc::clone(&self.memory), (page * self.page()) as usize);
        elsewhere(move || {
            let mut byte = [0];
            memory.read(offset, &mut byte).unwrap();
            byte[0]
        })
    }

    pub(crate) fn writer(&self, page: u64) -> Receiver<()> {
        let (memory, offset) = (Arc::clone(&self.memory), (page * self.page()) as usize);
        elsewhere(move || memory.write(offset, &[9]).unwrap())
    }

    /// Threads that sleep in a fault. The kernel takes one off at the moment it is woken.
    pub(crate) fn asleep(&self) -> u64 {
        self.uffd.waiting().unwrap().total
    }

    pub(crate) fn is_protected(&self, page: u64) -> bool {
        Pagemap::of_self().unwrap().entries(self.at(page), 1).unwrap()[0].is_write_protected()
    }

    pub(crate) fn is_registered(&self, page: u64) -> bool {
        self.zero(page, 1) != Err(Stop::Uffd(uffd::UffdError::NotRegistered))
    }
}

/// Room for one transparent huge page, untouched.
pub(crate) fn transparent() -> Result<Mapping, Stop> {
    let Some(size) = transparent_huge_page_size() else { return skipped("no transparent huge pages") };
    let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
    Ok(Mapping::anonymous(size, options)?)
}

/// Whether all of it is transparent huge pages.
pub(crate) fn is_huge(memory: &Mapping) -> bool {
    let options =
        ScanOptions { all_of: Categories::HUGE, report: Categories::HUGE, ..ScanOptions::default() };
    let (start, end) = (memory.address(), memory.address() + memory.len() as u64);
    let scan = Pagemap::of_self().unwrap().scan(start, end, &options).unwrap();
    scan.regions.iter().any(|region| (region.start, region.end) == (start, end))
}

/// A page of System V shared memory, which goes when it is unmapped.
pub(crate) fn system_v(place: *mut libc::c_void, flags: i32) -> Result<*mut libc::c_void, Stop> {
    // SAFETY: takes numbers.
    let id = Errno::result(unsafe { libc::shmget(libc::IPC_PRIVATE, PAGE as usize, 0o600) });
    let Ok(id) = id else { return skipped("no System V shared memory") };
    // SAFETY: `place` is null, or a page of the row's own to which nothing refers.
    let address = unsafe { libc::shmat(id, place, flags) };
    // SAFETY: removes what was just made; it stays for as long as it is attached.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    assert_ne!(address as isize, -1, "{}", std::io::Error::last_os_error());
    Ok(address)
}

/// A world whose memory is changing: an event of it is unread while `act` runs.
pub(crate) fn while_changing(act: impl FnOnce(&World) -> Outcome) -> Outcome {
    let world = World::with(Features::EVENT_REMOVE, pages(8, MappingKind::Private), M | W);
    world.zero(7, 1)?;
    let memory = Arc::clone(&world.memory);
    let discarded = elsewhere(move || memory.discard(7 * PAGE as usize, PAGE as usize).unwrap());
    wait_readable(world.uffd.as_fd());
    let outcome = act(&world);
    drop(events(&world.uffd, 1));
    finish(&discarded);
    outcome
}

pub(crate) fn wait_readable(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap(), 1, "nothing came");
}

/// The uffd of a process that has exited; `None`, with the reason printed, where there can be none.
pub(crate) fn dead() -> Option<&'static Userfaultfd> {
    static DEAD: OnceLock<Option<Userfaultfd>> = OnceLock::new();
    DEAD.get_or_init(|| {
        // Everything that rows take for granted.
        drop(support::uffd(Features::NAMES.iter().map(|(_, feature)| *feature).collect())?);
        support::of_the_dead()
    })
    .as_ref()
}

/// Structures of ioctls that rows issue themselves, because the crate never asks that.
pub(crate) trait Argument {
    const NUMBER: u32;
}

macro_rules! arguments {
    ($($argument:ident = $number:ident;)*) => {
        $(impl Argument for sys::$argument {
            const NUMBER: u32 = sys::$number;
        })*
    };
}

arguments! {
    uffdio_api = UFFDIO_API;
    uffdio_register = UFFDIO_REGISTER;
    uffdio_copy = UFFDIO_COPY;
    uffdio_zeropage = UFFDIO_ZEROPAGE;
    uffdio_move = UFFDIO_MOVE;
    uffdio_writeprotect = UFFDIO_WRITEPROTECT;
    uffdio_continue = UFFDIO_CONTINUE;
    uffdio_poison = UFFDIO_POISON;
}

/// The ioctl as it is.
pub(crate) fn raw<T: Argument>(fd: &impl AsFd, argument: &mut T) -> Outcome {
    let pointer: *mut T = argument;
    // SAFETY: `argument` lives across the call and is the structure that the number is made for. Pages that it names are
    // the row's own, without references to them.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), T::NUMBER as _, pointer) })?;
    Ok(())
}
