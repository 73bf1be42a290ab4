//! The kinds of memory the kernel's tests use, and what is put into it.

use std::mem::size_of;
use std::ptr;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FallocateFlags, fallocate};
use uffd::pagemap::{PageEntry, Pagemap};
use uffd::{
    AnonymousOptions, CopyOptions, Features, FileAccess, FileOptions, Ioctls, Mapping, MemfdOptions, Modes,
    Pages, UffdError, Userfaultfd,
};

use crate::processes::{HUGE, PAGE};
use crate::support;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Private and anonymous.
    Anon,
    /// A memfd, mapped shared.
    Shmem,
    /// A memfd, mapped private.
    ShmemPrivate,
    /// A memfd of huge pages, mapped shared.
    Hugetlb,
    /// A memfd of huge pages, mapped private.
    HugetlbPrivate,
}

impl Memory {
    pub fn is_huge(self) -> bool {
        matches!(self, Self::Hugetlb | Self::HugetlbPrivate)
    }

    /// What is written to it belongs to the file and not to the process.
    pub fn is_shared(self) -> bool {
        matches!(self, Self::Shmem | Self::Hugetlb)
    }

    /// Bytes of one of its pages.
    pub fn page(self) -> usize {
        if self.is_huge() { HUGE } else { PAGE }
    }

    /// Pages of the usual area: few, but enough for a first and a second half of several.
    pub fn count(self) -> usize {
        if self.is_huge() { 4 } else { 64 }
    }

    /// Huge pages a test takes from the pool at most: two areas with a shared view of each, or as many copies in a forked
    /// child.
    pub fn pool(self) -> usize {
        if self.is_huge() { 16 } else { 0 }
    }
}

/// Memory of a test. Never unmapped: that could wait for an event nobody reads, and the process ends with the test.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    pub memory: Memory,
    pub mapping: &'static Mapping,
    pub count: usize,
}

impl Area {
    pub fn new(memory: Memory, count: usize) -> Self {
        let mapping = match memory {
            Memory::Anon => {
                let options = AnonymousOptions { pages: Pages::Small, shared: false };
                Mapping::anonymous(count * PAGE, options)
            }
            _ => {
                let pages = if memory.is_huge() { Pages::Huge(HUGE) } else { Pages::Small };
                let private = !memory.is_shared();
                let options = MemfdOptions { pages, private, ..MemfdOptions::default() };
                Mapping::with_memfd(count * memory.page(), &options)
            }
        };
        Self::of(memory, mapping.unwrap())
    }

    /// The usual number of pages.
    pub fn usual(memory: Memory) -> Self {
        Self::new(memory, memory.count())
    }

    pub fn of(memory: Memory, mapping: Mapping) -> Self {
        let count = mapping.len() / memory.page();
        Self { memory, mapping: Box::leak(Box::new(mapping)), count }
    }

    /// Another mapping of the same file, always shared: what the kernel's tests call the alias.
    pub fn alias(&self) -> Self {
        let file = self.mapping.memfd().expect("memory with a file").try_clone_to_owned().unwrap();
        let options = FileOptions { access: FileAccess::Shared, ..FileOptions::default() };
        let memory = if self.memory.is_huge() { Memory::Hugetlb } else { Memory::Shmem };
        Self::of(memory, Mapping::of_file(file, options).unwrap())
    }

    pub fn page(&self) -> usize {
        self.memory.page()
    }

    pub fn start(&self) -> u64 {
        self.mapping.address()
    }

    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Address of a page.
    pub fn at(&self, page: usize) -> u64 {
        self.start() + (page * self.page()) as u64
    }

    /// The page of an address.
    pub fn index(&self, address: u64) -> usize {
        assert!(
            (self.start()..self.start() + self.len()).contains(&address),
            "{address:#x} is not of the area"
        );
        (address - self.start()) as usize / self.page()
    }

    pub fn try_register(&self, uffd: &Userfaultfd, modes: Modes) -> Result<Ioctls, UffdError> {
        // SAFETY: an area is touched through raw pointers only; no reference to it exists.
        unsafe { uffd.register(self.start(), self.len(), modes) }
    }

    pub fn register(&self, uffd: &Userfaultfd, modes: Modes) -> Ioctls {
        self.try_register(uffd, modes).unwrap()
    }

    /// Writes the contents of every page.
    pub fn fill(&self) {
        self.mapping.write(0, &contents(self.count, self.page())).unwrap();
    }

    /// The bytes of a page, touched by this thread.
    pub fn bytes(&self, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.page()];
        self.mapping.read(page * self.page(), &mut bytes).unwrap();
        bytes
    }

    /// Whether the page holds the contents of page `index`; touched by this thread.
    pub fn holds(&self, page: usize, index: usize) -> bool {
        self.span().holds(page, index)
    }

    /// Takes all pages away, those of the file too.
    pub fn release(&self) {
        self.mapping.discard(0, self.mapping.len()).unwrap();
        if let (Some(memfd), false) = (self.mapping.memfd(), self.memory.is_shared()) {
            // Writing to a private mapping of shmem puts a page of zeros into the file first, and what the file has is not
            // missing.
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(memfd, how, 0, self.mapping.len() as i64).unwrap();
        }
    }

    pub fn span(&self) -> Span {
        Span { address: self.start(), page: self.page(), count: self.count }
    }

    /// The page map of the first ordinary page of a page; all others say the same about protection.
    pub fn entry(&self, map: &Pagemap, page: usize) -> PageEntry {
        let entries = map.entries(self.at(page), self.page() / PAGE).unwrap();
        assert!(
            entries.iter().all(|entry| entry.is_write_protected() == entries[0].is_write_protected()),
            "a page protected in parts"
        );
        entries[0]
    }
}

/// Pages by their address, for threads and forked children. Nothing here allocates.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    address: u64,
    page: usize,
    count: usize,
}

impl Span {
    /// # Safety
    ///
    /// Wherever the result is used, `count` pages at `address` are mapped for reading and writing and no reference to them
    /// exists.
    pub unsafe fn new(address: u64, page: usize, count: usize) -> Self {
        Self { address, page, count }
    }

    pub fn count(self) -> usize {
        self.count
    }

    pub fn address(self) -> u64 {
        self.address
    }

    pub fn len(self) -> usize {
        self.page * self.count
    }

    fn word(self, page: usize, word: usize) -> *mut u64 {
        assert!(page < self.count && word * size_of::<u64>() < self.page);
        ptr::with_exposed_provenance_mut::<u64>(self.address as usize + page * self.page).wrapping_add(word)
    }

    /// Reads a word of a page.
    pub fn peek(self, page: usize, word: usize) -> u64 {
        let word = self.word(page, word);
        // SAFETY: inside the span, which is mapped by the promise of its maker and of whole pages, so aligned.
        unsafe { word.read_volatile() }
    }

    /// Writes a word of a page.
    pub fn poke(self, page: usize, word: usize, value: u64) {
        let word = self.word(page, word);
        // SAFETY: as for `peek`; others that read meanwhile do so through raw pointers too.
        unsafe { word.write_volatile(value) }
    }

    /// A word that several threads change at once.
    pub fn atomic(self, page: usize, word: usize) -> &'static AtomicU64 {
        let word = self.word(page, word);
        // SAFETY: as for `peek`; for as long as threads change the word, all of them do so through this.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Whether the page holds the contents of page `index`.
    pub fn holds(self, page: usize, index: usize) -> bool {
        (0..self.page / size_of::<u64>()).all(|word| self.peek(page, word) == value(index, word))
    }

    pub fn is_zero(self, page: usize) -> bool {
        (0..self.page / size_of::<u64>()).all(|word| self.peek(page, word) == 0)
    }
}

/// What each word of a page holds: no two words of an area alike, none zero.
pub fn value(page: usize, word: usize) -> u64 {
    ((page as u64 + 1) << 32) | word as u64
}

/// The contents of `count` pages.
pub fn contents(count: usize, page: usize) -> Vec<u8> {
    let words = page / size_of::<u64>();
    (0..count * words).flat_map(|at| value(at / words, at % words).to_ne_bytes()).collect()
}

/// A userfaultfd that lives as long as the process, or a printed reason why there is none.
pub fn uffd(features: Features) -> Option<&'static Userfaultfd> {
    support::uffd(features).map(|uffd| &*Box::leak(Box::new(uffd)))
}

/// COPY of one page, again while the address space is changing. EEXIST is the only error a server has to expect; like
/// every server it wakes who waits then, and says `false`.
pub fn copy_page(uffd: &Userfaultfd, dst: u64, source: &[u8], options: CopyOptions) -> bool {
    loop {
        // SAFETY: `source` lives across the call; no reference to the destination exists, see `Area`.
        match unsafe { uffd.copy(dst, source.as_ptr(), source.len(), options) } {
            Ok(()) => return true,
            Err(UffdError::PageExist) => {
                uffd.wake(dst, source.len() as u64).unwrap();
                return false;
            }
            Err(UffdError::Changing) => std::thread::yield_now(),
            Err(error) => panic!("COPY to {dst:#x}: {error}"),
        }
    }
}
