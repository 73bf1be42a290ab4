//! What tells that a file is not the one any more that it was.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;

/// What changes when a file's bytes do: when it was written, its blocks, its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    written: Written,
    pub(super) blocks: u64,
    size: u64,
}

impl Stamp {
    pub(super) fn of(file: &File) -> std::io::Result<Self> {
        let now = file.metadata()?;
        Ok(Self { written: Written::of(&now), blocks: now.blocks(), size: now.len() })
    }
}

/// When a file was written: `st_mtim`. Other names, links, owners and rights are no change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Written {
    seconds: i64,
    nanoseconds: i64,
}

impl Written {
    /// That of a file which has all of its bytes. One that was cut short is as it was when it is as long again, and nothing tells more of it.
    pub(super) fn of_whole(file: &Metadata, size: u64) -> Option<Self> {
        (file.len() >= size).then(|| Self::of(file))
    }

    pub(super) fn of(file: &Metadata) -> Self {
        Self { seconds: file.mtime(), nanoseconds: file.mtime_nsec() }
    }
}
