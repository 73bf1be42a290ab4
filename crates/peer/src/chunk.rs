//! Access to memory that somebody else fills. Everything that loads, stores or discards registered memory is
//! in this file.
//!
//! A page may appear, vanish or turn to poison between two instructions, and its bytes are written by the
//! kernel on behalf of another process. So no Rust reference to it ever exists: whole values are loaded and
//! stored through volatile raw pointers, one instruction each, which fault like those of any program.

use std::ptr;

use crate::failure::Failure;

/// A piece of this process's mapped memory.
///
/// Invariant: `address..address + len` lies inside a readable and writable mapping that [`crate::memory`] made
/// and that nothing unmaps before the process ends. Only `crate::memory` makes chunks.
#[derive(Clone, Copy)]
pub(crate) struct Chunk {
    address: usize,
    len: usize,
}

const WORD: usize = size_of::<u64>();

/// How pages are given back.
#[derive(Clone, Copy)]
pub(crate) enum Discard {
    /// Of private memory.
    DontNeed,
    /// Out of the memfd they lie in, too.
    Remove,
}

impl Chunk {
    /// # Safety
    /// `address..address + len` has to keep the invariant of the type.
    pub(crate) unsafe fn new(address: usize, len: usize) -> Self {
        Self { address, len }
    }

    /// Bytes in it.
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// Loads the first 8 bytes, as one aligned instruction. The chunk has to start at a page and cover it.
    pub(crate) fn touch(self) -> u64 {
        debug_assert!(self.len >= WORD && self.address.is_multiple_of(WORD), "a page was expected");
        let pointer = ptr::with_exposed_provenance::<u64>(self.address);
        // SAFETY: the type's invariant covers the 8 bytes of a page's start, which is aligned; any bit pattern
        // is a u64. A poisoned page raises SIGBUS, as it is meant to.
        unsafe { pointer.read_volatile() }
    }

    /// Stores the first 8 bytes once more, as they are.
    pub(crate) fn touch_for_writing(self) {
        let word = self.touch();
        let pointer = ptr::with_exposed_provenance_mut::<u64>(self.address);
        // SAFETY: as in `touch`; no Rust reference to the memory exists.
        unsafe { pointer.write_volatile(word) };
    }

    /// Loads every byte into `buffer`, which is this process's own memory.
    /// The shorter of the two limits how many.
    pub(crate) fn load(self, buffer: &mut [u8]) {
        let len = buffer.len().min(self.len);
        let (words, rest) =
            buffer.split_at_mut(if self.address.is_multiple_of(WORD) { len / WORD * WORD } else { 0 });
        let first_byte = words.len();
        for (index, out) in words.chunks_exact_mut(WORD).enumerate() {
            let pointer = ptr::with_exposed_provenance::<u64>(self.address + index * WORD);
            // SAFETY: `words` was cut to whole words below `self.len`, inside the mapping by the type's
            // invariant, and the address was checked to be a multiple of 8.
            let word = unsafe { pointer.read_volatile() };
            out.copy_from_slice(&word.to_ne_bytes());
        }
        for (index, out) in rest.iter_mut().take(len - first_byte).enumerate() {
            let pointer = ptr::with_exposed_provenance::<u8>(self.address + first_byte + index);
            // SAFETY: `first_byte + index` is below `len`, inside the mapping by the type's invariant.
            *out = unsafe { pointer.read_volatile() };
        }
    }

    /// Stores `bytes` at its start, one by one. The shorter of the two limits how many.
    pub(crate) fn store(self, bytes: &[u8]) {
        for (index, byte) in bytes.iter().take(self.len).enumerate() {
            let pointer = ptr::with_exposed_provenance_mut::<u8>(self.address + index);
            // SAFETY: `index` is below `self.len`, inside a writable mapping by the type's invariant, of which
            // no Rust reference exists.
            unsafe { pointer.write_volatile(*byte) };
        }
    }

    /// `madvise` with `MADV_DONTNEED` or `MADV_REMOVE`: the pages go, and with EVENT_REMOVE it returns only after the holder of the
    /// userfaultfd has read of it.
    ///
    /// # Errors
    /// What madvise(2) says; `EINVAL` for a range that is not made of whole pages.
    pub(crate) fn discard(self, how: Discard) -> Result<(), Failure> {
        let (advice, name) = match how {
            Discard::DontNeed => (libc::MADV_DONTNEED, "MADV_DONTNEED"),
            Discard::Remove => (libc::MADV_REMOVE, "MADV_REMOVE"),
        };
        let pointer = ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: the range is memory of `crate::memory`, by the type's invariant; nothing of Rust's own lives
        // in it, and its pages stay mapped.
        if unsafe { libc::madvise(pointer, self.len, advice) } == 0 {
            return Ok(());
        }
        Err(Failure::errno(format!("madvise({:#x}, {}, {name})", self.address, self.len)))
    }

    /// Lets the kernel load the first 8 bytes, by write(2) into a pipe: a poisoned page then is the answer
    /// `None` (`EFAULT`), not a signal. A missing page is faulted in, except under a userfaultfd limited to
    /// user-mode faults, where it is `None` too.
    ///
    /// # Errors
    /// A pipe that cannot be made, written to or read from.
    pub(crate) fn probe(self) -> Result<Option<[u8; WORD]>, Failure> {
        let failed =
            |what: &str, error: &std::io::Error| Failure::io(format!("{what} {:#x}", self.address), error);
        let (mut reader, writer) =
            std::io::pipe().map_err(|error| failed("pipe for the probe of", &error))?;
        let wanted = WORD.min(self.len);
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&writer);
        let pointer = ptr::with_exposed_provenance(self.address);
        // SAFETY: the kernel checks the source itself; it lies inside a mapping by the type's invariant. The
        // pipe is open until the end of this function.
        let written = unsafe { libc::write(descriptor, pointer, wanted) };
        if written < 0 {
            let error = std::io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EFAULT) => Ok(None),
                _ => Err(failed("write to a pipe from", &error)),
            };
        }
        // The reader must see the end of the pipe, should the write have been cut short.
        drop(writer);
        let mut bytes = [0; WORD];
        std::io::Read::read_exact(&mut reader, &mut bytes).map_err(|error| failed("pipe of", &error))?;
        Ok(Some(bytes))
    }

    /// How many of its pages of `page_size` bytes are resident, by mincore(2), which faults nothing in.
    /// The chunk has to consist of whole pages; `base_page` is the size of the kernel's smallest page.
    ///
    /// # Errors
    /// What mincore(2) says.
    pub(crate) fn resident_pages(self, page_size: usize, base_page: usize) -> Result<usize, Failure> {
        let mut states = vec![0u8; self.len.div_ceil(base_page)];
        let pointer = ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: `states` has one byte for each of the kernel's pages in the range, which is what mincore
        // writes; it is ordinary memory of this process.
        if unsafe { libc::mincore(pointer, self.len, states.as_mut_ptr()) } != 0 {
            return Err(Failure::errno(format!("mincore({:#x}, {})", self.address, self.len)));
        }
        // A huge page is there as a whole or not at all: its first part speaks for it.
        Ok(states.iter().step_by((page_size / base_page).max(1)).filter(|state| **state & 1 == 1).count())
    }
}
