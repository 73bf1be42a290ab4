//! Memory as words that can be shared with a process that comes later: reached through atomics only, because the kernel,
//! or whoever has the same pages mapped, may write to it as well.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::mapping::Mapping;
use crate::mapping_options::MappingError;

const WORD: usize = size_of::<AtomicU64>();

/// Words of 64 bits: allocated, or a part of a mapping. All zero where they were allocated.
#[derive(Debug)]
pub struct Words {
    first: NonNull<AtomicU64>,
    len: usize,
    /// `None`: they were allocated, and are this object's to free.
    mapping: Option<Arc<Mapping>>,
}

// SAFETY: atomics may be used by any thread; the memory is freed or unmapped only by its last owner.
unsafe impl Send for Words {}
// SAFETY: as above; only shared references to atomics are handed out.
unsafe impl Sync for Words {}

impl Words {
    /// `len` words of this process's own, zero, not resident before they are written to.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let words: *mut [u64] = Box::into_raw(vec![0_u64; len].into_boxed_slice());
        // A box is never null, so it is never the other.
        let first = NonNull::new(words.cast::<AtomicU64>()).unwrap_or(NonNull::dangling());
        Self { first, len, mapping: None }
    }

    /// `len` words of a mapping from byte `offset` on, which is a multiple of eight.
    ///
    /// Memory that is registered with a userfaultfd is none to be used like this: whoever looks would wait.
    ///
    /// # Errors
    ///
    /// When they leave the mapping, or are not aligned, or it is for reading only.
    pub fn of_mapping(mapping: &Arc<Mapping>, offset: usize, len: usize) -> Result<Self, MappingError> {
        let bytes = len.checked_mul(WORD).ok_or(MappingError::TooLarge { len })?;
        if !mapping.is_writable() {
            return Err(MappingError::ReadOnly);
        }
        if !offset.is_multiple_of(WORD) {
            return Err(MappingError::Unaligned { offset: offset as u64, len: bytes, page_size: WORD });
        }
        let address = mapping.byte_at(offset, bytes)?;
        // A mapping is never at address 0.
        let first = NonNull::new(address.cast::<AtomicU64>()).unwrap_or(NonNull::dangling());
        Ok(Self { first, len, mapping: Some(Arc::clone(mapping)) })
    }

    /// Whether they are a part of a mapping.
    #[must_use]
    pub fn are_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    /// Their first byte; valid for all the words as long as they live, and aligned for them.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.first.as_ptr().cast()
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the constructors made sure that so many aligned words are there, for as long as this object lives.
        // Atomics may be written to by others meanwhile.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.mapping.is_none() {
            let words = std::ptr::slice_from_raw_parts_mut(self.first.as_ptr().cast::<u64>(), self.len);
            // SAFETY: `zeroed` took it out of a box of this length; words and atomics of words are alike in memory.
            drop(unsafe { Box::from_raw(words) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::mapping_options::MemfdOptions;

    #[test]
    fn words_of_a_mapping_are_its_bytes_and_outlive_who_made_it() {
        let mapping = Arc::new(Mapping::with_memfd(4096, &MemfdOptions::default()).unwrap());
        let words = Words::of_mapping(&mapping, 8, 511).unwrap();
        words[2].store(0x0807_0605_0403_0201, Ordering::Relaxed);
        let mut bytes = [0; 8];
        mapping.read(24, &mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 0x0807_0605_0403_0201);
        drop(mapping);

        assert_eq!(words[2].load(Ordering::Relaxed), 0x0807_0605_0403_0201);
        assert_eq!(words.len(), 511);
    }

    #[test]
    fn words_outside_of_the_mapping_or_unaligned_are_refused() {
        let mapping = Arc::new(Mapping::with_memfd(4096, &MemfdOptions::default()).unwrap());

        assert!(matches!(Words::of_mapping(&mapping, 8, 512), Err(MappingError::OutOfRange { .. })));
        assert!(matches!(Words::of_mapping(&mapping, 4, 1), Err(MappingError::Unaligned { .. })));
        assert!(matches!(Words::of_mapping(&mapping, 0, usize::MAX), Err(MappingError::TooLarge { .. })));
    }

    #[test]
    fn allocated_words_are_zero() {
        let words = Words::zeroed(1000);

        assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        assert!(Words::zeroed(0).is_empty());
    }
}
