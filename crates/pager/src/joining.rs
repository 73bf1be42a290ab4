//! Writing into a process that is stopped, as huge pages.

use std::ops::Range;

use nix::errno::Errno;
use uffd::Mapping;
use uffd::liveness::PidFd;

use crate::error::PagerError;
use crate::huge_fill::BLOCK;

/// How often a block is tried that the kernel says to try again.
const TRIES: u32 = 8;

/// Writes blocks as huge pages. With an error, whether pages may be there that hold zeros.
pub(crate) fn write_joined(
    process: &PidFd,
    staging: &Mapping,
    places: &[Range<u64>],
    refused: &mut Option<PagerError>,
) -> Result<(), (Errno, bool)> {
    // SAFETY: the staging is this session's own, nobody writes to it meanwhile, and it is as long.
    let bytes = unsafe { std::slice::from_raw_parts(staging.as_ptr(), places.len() * BLOCK) };
    let page = uffd::page_size();
    let parts = |range: &Range<usize>| -> Vec<(u64, &[u8])> {
        let blocks = bytes.chunks(BLOCK).map(|block| block.get(range.clone()).unwrap_or_default());
        places.iter().map(|place| place.start + range.start as u64).zip(blocks).collect()
    };
    let write = |range: Range<usize>| match process.write_memory(&parts(&range)) {
        Ok(written) if written == places.len() * range.len() => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
        Err(errno) => Err(errno),
    };
    // One page of its own bytes, without which there is nothing to join.
    write(0..page).map_err(|errno| (errno, false))?;
    let (mut first, mut tries) = (0, 0);
    while let Some(rest @ [_, ..]) = places.get(first..) {
        match process.collapse(rest) {
            Ok(bytes) if bytes >= BLOCK => (first, tries) = (first + bytes / BLOCK, 0),
            Err(Errno::EAGAIN | Errno::EBUSY) if tries < TRIES => tries += 1,
            outcome => {
                // It stays as small pages.
                let errno = outcome.err().unwrap_or(Errno::EINVAL);
                *refused = Some(PagerError::System { syscall: "process_madvise", errno });
                (first, tries) = (first + 1, 0);
            }
        }
    }
    write(page..BLOCK).map_err(|errno| (errno, true))
}
