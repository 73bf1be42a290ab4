//! Which faults a session answers, and what it needs for that.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::unistd::{Whence, lseek};
use uffd::errno_of;
use uffd::{Features, Mapping, UffdError, Userfaultfd};

use crate::address_map::{AddressMap, Region};
use crate::error::PagerError;

/// How long protecting may be held up by a process that is changing its address space just now.
const ARMING_DEADLINE: Duration = Duration::from_millis(100);

/// Which faults a session answers. The memory has to be registered for them.
#[derive(Debug)]
pub struct SessionModes {
    /// Faults of pages that are missing: they get the source's bytes. Default: yes.
    ///
    /// Without it (and without `minor`) the source is never asked: all the memory is held to be there.
    pub missing: bool,
    /// Faults of pages that the page cache has and the mapping has not. Default: none.
    pub minor: Option<MinorMemory>,
    /// Faults of writes to protected pages: the protection is taken off, and the page counts as dirty until
    /// [`crate::Pager::take_dirty`]. Default: no.
    ///
    /// The pager protects all of the memory before [`crate::Pager::adopt`] returns (about 100 ns a page), and installs
    /// pages protected: every write from then on is seen. Without `missing`, the userfaultfd needs `wp-unpopulated`
    /// (Linux 6.4), or the first writes to pages that are not there yet would be missed.
    pub write_protect: bool,
}

impl Default for SessionModes {
    fn default() -> Self {
        Self { missing: true, minor: None, write_protect: false }
    }
}

/// Shared memory whose pages are brought by writing them to its memfd: every process that maps it gets the same page.
///
/// Until the pager has brought a page, nobody else may write to it, by the memfd or by a mapping that is not registered:
/// what they write would be overwritten. A page that the pager has not brought, and that is in the memfd, is brought
/// anew: so memory that is all there but not right yet can be registered for minor faults alone. It really has to be all
/// there, because the kernel fills holes with zeros and tells nobody. Of a process that forks with FORK events, only the
/// parent is served on: what its child misses is poisoned.
#[derive(Debug)]
pub struct MinorMemory {
    /// The memfd, open for writing. Not of huge pages, which cannot be written to that way.
    pub memfd: OwnedFd,
    /// Where the first byte of each region is in it, in bytes, in the order of the regions.
    pub offsets: Vec<u64>,
}

impl MinorMemory {
    /// The memfd of a mapping of this process that is served as a whole.
    ///
    /// # Errors
    ///
    /// [`PagerError::Unsupported`] where it has none, is private, or is made of huge pages; [`PagerError::System`] when no
    /// descriptor is free.
    pub fn of(mapping: &Mapping) -> Result<Self, PagerError> {
        let refused = |what: &str| {
            let needed = "they need a shared mapping of a memfd of ordinary pages";
            Err(PagerError::Unsupported(format!("minor faults of {what}: {needed}")))
        };
        let Some(memfd) = mapping.memfd() else { return refused("memory without a memfd") };
        if !mapping.is_shared() {
            return refused("a private mapping");
        }
        if mapping.page_size() != uffd::page_size() {
            return refused("huge pages");
        }
        let memfd = memfd
            .try_clone_to_owned()
            .map_err(|error| PagerError::System { syscall: "fcntl", errno: errno_of(&error) })?;
        Ok(Self { memfd, offsets: vec![0] })
    }
}

/// A memfd that was found good.
#[derive(Debug)]
pub(crate) struct Minor {
    memfd: File,
    /// First page of each region and where that is in the memfd.
    starts: Vec<(usize, u64)>,
}

impl SessionModes {
    /// Whether there is anything that the source is asked for.
    pub(crate) fn fill(&self) -> bool {
        self.missing || self.minor.is_some()
    }

    /// Makes sure that this can be served.
    pub(crate) fn check(&self, uffd: &Userfaultfd) -> Result<(), PagerError> {
        if !self.fill() && !self.write_protect {
            return Err(PagerError::Unsupported(
                "a session that answers no faults: switch on `missing`, `minor` or `write_protect`"
                    .to_owned(),
            ));
        }
        let unpopulated =
            uffd.enabled_features().is_none_or(|enabled| enabled.intersects(Features::WP_UNPOPULATED));
        if self.write_protect && !self.missing && !unpopulated {
            return Err(PagerError::Unsupported(
                "write-protect faults without missing ones need a userfaultfd with `wp-unpopulated`: writes to pages that \
                 are not there yet would be missed"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

impl Minor {
    /// Checks a memfd against the regions of a map. `holes`: whether it may have some, because they are faults as well.
    pub(crate) fn new(
        memory: MinorMemory,
        regions: &[Region],
        map: &AddressMap,
        holes: bool,
    ) -> Result<Self, PagerError> {
        let MinorMemory { memfd, offsets } = memory;
        let refused = |reason: String| PagerError::Adopt(format!("memfd for minor faults: {reason}"));
        if map.page_size() != uffd::page_size() as u64 {
            return Err(PagerError::Unsupported(format!(
                "minor faults of huge pages ({} bytes): their memfd cannot be written to",
                map.page_size()
            )));
        }
        if offsets.len() != regions.len() {
            return Err(refused(format!("{} offsets for {} regions", offsets.len(), regions.len())));
        }
        let flags = fcntl(&memfd, FcntlArg::F_GETFL).map_err(|errno| refused(format!("fcntl: {errno}")))?;
        if OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            return Err(refused("it is open for reading only".to_owned()));
        }
        // Whatever else it is, nobody wants it to be written to.
        let seals = fcntl(&memfd, FcntlArg::F_GET_SEALS)
            .map(SealFlag::from_bits_retain)
            .map_err(|_| refused("it is none, nor a file of tmpfs".to_owned()))?;
        if seals.intersects(SealFlag::F_SEAL_WRITE | SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE)) {
            return Err(refused("it is sealed against writing".to_owned()));
        }
        let memfd = File::from(memfd);
        let state = memfd.metadata().map_err(|error| refused(format!("fstat: {error}")))?;
        let size = state.len();
        let (wanted, there) = (united(regions, &offsets), state.blocks().saturating_mul(512));
        if !holes && there < wanted {
            return Err(refused(format!(
                "it has holes ({there:#x} bytes of {wanted:#x} are there), which the kernel would fill with zeros: answer \
                 missing faults as well, or fill it first"
            )));
        }
        let mut starts = Vec::with_capacity(regions.len());
        for (index, (region, offset)) in regions.iter().zip(offsets).enumerate() {
            let beyond = offset.checked_add(region.len).is_none_or(|end| end > size);
            if beyond || offset % map.page_size() != 0 {
                let reason = format!(
                    "offset {offset:#x} in its memfd, which has {size:#x} bytes, is unaligned or too high"
                );
                return Err(PagerError::Region { index, reason });
            }
            starts.extend(map.page_of(region.address).map(|page| (page, offset)));
        }
        starts.sort_unstable();
        Ok(Self { memfd, starts })
    }

    /// Where `page` is in the memfd, and how many pages from it on lie together there.
    fn place_of(&self, map: &AddressMap, page: usize) -> Option<(u64, usize)> {
        let after = self.starts.partition_point(|&(first, _)| first <= page);
        let &(first, offset) = self.starts.get(after.checked_sub(1)?)?;
        let pages = self.starts.get(after).map_or(usize::MAX, |&(next, _)| next - page);
        Some((offset + map.bytes(page - first), pages.min(1 << 20)))
    }

    /// `pwrite(2)` of the bytes of pages from `page` on.
    pub(crate) fn write(&self, map: &AddressMap, page: usize, bytes: &[u8]) -> Result<(), PagerError> {
        let (mut page, mut bytes) = (page, bytes);
        while !bytes.is_empty() {
            let Some((offset, pages)) = self.place_of(map, page) else {
                return Err(PagerError::Internal("a page outside the memfd".to_owned()));
            };
            let count = usize::try_from(map.bytes(pages)).unwrap_or(usize::MAX).min(bytes.len());
            let (piece, rest) = bytes.split_at(count);
            self.memfd.write_all_at(piece, offset).map_err(|error| {
                let errno = errno_of(&error);
                PagerError::System { syscall: "pwrite", errno }
            })?;
            page += pages;
            bytes = rest;
        }
        Ok(())
    }

    /// Whether `page` is in the memfd, as far as that can be told.
    pub(crate) fn has(&self, map: &AddressMap, page: usize) -> bool {
        // Seeking moves the position, which the caller's descriptor shares: by one of its own.
        let path = format!("/proc/self/fd/{}", self.memfd.as_raw_fd());
        let Ok(own) = File::open(path) else { return false };
        let Some((offset, _)) = self.place_of(map, page) else { return false };
        let Ok(offset) = libc::off_t::try_from(offset) else { return false };
        lseek(&own, offset, Whence::SeekData) == Ok(offset)
    }
}

/// How many bytes of a file the regions cover.
fn united(regions: &[Region], offsets: &[u64]) -> u64 {
    let mut parts: Vec<_> = regions
        .iter()
        .zip(offsets)
        .map(|(region, &offset)| offset..offset.saturating_add(region.len))
        .collect();
    parts.sort_unstable_by_key(|part| part.start);
    let mut reached = 0;
    parts.iter().fold(0, |sum, part| {
        let start = part.start.max(reached);
        reached = reached.max(part.end);
        sum + part.end.saturating_sub(start)
    })
}

/// Protects memory before its session begins: from then on every write is seen.
pub(crate) fn protect(uffd: &Userfaultfd, regions: &[Region]) -> Result<(), PagerError> {
    let deadline = Instant::now() + ARMING_DEADLINE;
    for &Region { address, len, .. } in regions {
        loop {
            match uffd.write_protect(address, len, true, false) {
                Ok(()) => break,
                // Nobody reads its events yet, so this may last for ever.
                Err(UffdError::Changing) if Instant::now() < deadline => std::thread::yield_now(),
                Err(cause) => return Err(PagerError::Kernel { address, len, cause }),
            }
        }
    }
    Ok(())
}
