//! Memory of this process as the source of pages.
//!
//! A mapping whose bytes are a file's is not read here: a file that was cut short gives zeros for the rest of its
//! last page, or ends the reader by SIGBUS. Its descriptor is ([`FileSource::of_fd`](super::FileSource::of_fd)).

use std::sync::Arc;

use uffd::{Mapping, MappingError};

use super::{PageSource, ReadNow};
use crate::error::PagerError;

/// What a source of memory is called in errors.
const NAME: &str = "(memory)";

/// Bytes that nobody changes any more, always at hand.
#[derive(Clone)]
pub struct MemorySource {
    bytes: Arc<[u8]>,
}

impl MemorySource {
    /// `bytes` as an image: a `Vec<u8>` is copied once, an `Arc<[u8]>` is shared.
    #[must_use]
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { bytes: bytes.into() }
    }
}

/// Without the bytes themselves.
impl std::fmt::Debug for MemorySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemorySource").field("size", &self.bytes.len()).finish()
    }
}

impl PageSource for MemorySource {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        match self.bytes(offset, buffer.len() as u64) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => return Err(beyond(offset, buffer.len(), self.size())),
        }
        Ok(())
    }

    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
    }
}

/// Anonymous memory of this process. What others write to it while it is read comes out mixed.
///
/// It is read on workers only, because reading it can wait: the mapping may itself be memory that a pager serves.
#[derive(Debug, Clone)]
pub struct MappingSource {
    mapping: Arc<Mapping>,
}

impl MappingSource {
    /// All of `mapping` as an image.
    ///
    /// # Errors
    ///
    /// [`PagerError::NotAnImage`] when the mapping is a file's or a memfd's: its descriptor has to be the source, because
    /// the file may be cut short.
    pub fn new(mapping: Arc<Mapping>) -> Result<Self, PagerError> {
        if mapping.memfd().is_some() || mapping.file().is_some() {
            return Err(PagerError::NotAnImage {
                path: NAME.into(),
                reason: "it is the mapping of a file, which can be cut short: give its descriptor instead",
            });
        }
        Ok(Self { mapping })
    }
}

impl PageSource for MappingSource {
    fn size(&self) -> u64 {
        self.mapping.len() as u64
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let start = usize::try_from(offset).map_err(|_| beyond(offset, buffer.len(), self.size()))?;
        self.mapping.read_checked(start, buffer).map_err(|error| match error {
            MappingError::System { syscall, errno } => {
                PagerError::Source { path: NAME.into(), syscall, errno }
            }
            _ => beyond(offset, buffer.len(), self.size()),
        })
    }
}

fn beyond(offset: u64, len: usize, actual: u64) -> PagerError {
    PagerError::SourceTruncated { path: NAME.into(), expected: offset.saturating_add(len as u64), actual }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uffd::MappingKind;

    #[test]
    fn memory_gives_its_bytes_and_nothing_beyond_them() {
        let source = MemorySource::new((0..100).collect::<Vec<u8>>());
        let mut buffer = [0; 10];

        assert_eq!(source.read_now(90, &mut buffer).unwrap(), ReadNow::Done);
        assert_eq!(buffer, [90, 91, 92, 93, 94, 95, 96, 97, 98, 99]);
        assert_eq!(source.bytes(90, 10), Some(&buffer[..]));
        assert_eq!(source.bytes(91, 10), None);
        for offset in [91, 100, u64::MAX, u64::MAX - 3] {
            let error = source.read(offset, &mut buffer).unwrap_err();
            assert!(matches!(error, PagerError::SourceTruncated { actual: 100, .. }), "{error}");
        }
    }

    #[test]
    fn a_mapping_is_read_where_waiting_is_allowed_and_not_beyond_its_end() {
        let mapping = Arc::new(Mapping::new(8192, MappingKind::Private).unwrap());
        mapping.write(4000, b"hello").unwrap();
        let source = MappingSource::new(mapping).unwrap();
        let mut buffer = [0; 5];

        assert_eq!(source.read_now(4000, &mut buffer).unwrap(), ReadNow::WouldBlock);
        source.read(4000, &mut buffer).unwrap();

        assert_eq!(&buffer, b"hello");
        assert!(matches!(
            source.read(8190, &mut buffer),
            Err(PagerError::SourceTruncated { actual: 8192, .. })
        ));
    }

    #[test]
    fn the_mapping_of_a_file_is_refused_as_a_source() {
        let mapping = Arc::new(Mapping::new(8192, MappingKind::Shared).unwrap());

        assert!(matches!(MappingSource::new(mapping), Err(PagerError::NotAnImage { .. })));
    }
}
