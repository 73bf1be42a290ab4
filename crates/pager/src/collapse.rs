//! Joining memory to transparent huge pages behind the faults (`MADV_COLLAPSE`): block by block of 2 MiB that is there as a whole,
//! when no fault has come for a while. No byte changes by it. The kernel refuses blocks with a page that is its page of
//! zeros, or that was given back: those stay as they are.

use std::ops::Range;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use uffd::errno_of;
use uffd::liveness::PidFd;
use uffd::pagemap::Pagemap;

use crate::ahead::Ahead;
use crate::error::PagerError;
use crate::huge_fill::BLOCK;
use crate::page_state::PageBits;
use crate::session::Session;

/// How long no fault has to have come: joining a block holds up faults for half a millisecond, of a VM for some.
const QUIET: Duration = Duration::from_millis(20);
/// How often a block is tried that the kernel says to try again, each time after [`QUIET`].
const TRIES: u32 = 8;

/// What is known of a session's blocks.
pub(crate) struct Collapsing {
    process: PidFd,
    pagemap: Pagemap,
    /// First pages of blocks that are joined, or that the kernel will not join.
    done: PageBits,
    /// Faults that had been read when this was last looked at, and when they were.
    faults: u64,
    quiet: Instant,
    /// Pages that had been installed when no block was left to try.
    looked_at: Option<u64>,
    next: usize,
    tries: u32,
}

impl Session {
    /// Whether this memory can be joined; nothing where its pages are huge anyway.
    pub(crate) fn begin_collapsing(&self) -> Result<Option<Collapsing>, PagerError> {
        if self.huge {
            return Ok(None);
        }
        let unsupported =
            |what: &str| PagerError::Unsupported(format!("joining {what} to transparent huge pages"));
        if self.tracking.is_some() || self.brings_to_file() {
            return Err(unsupported("memory whose writes are tracked, or that is brought to a memfd"));
        }
        if uffd::transparent_huge_page_size() != Some(BLOCK) {
            return Err(unsupported("the memory of a kernel without such pages of 2 MiB"));
        }
        let needs = "the right to trace the process, CAP_SYS_NICE, and Linux 6.1";
        let denied = |what| move |errno| PagerError::NoRight { what, needs, errno };
        let process = match &self.process {
            Some(process) => process.pidfd().try_clone(),
            None if self.own => PidFd::open(std::process::id() as i32).map_err(std::io::Error::other),
            None => return Err(unsupported("the memory of a process without a pidfd")),
        };
        let of_io = |error: std::io::Error| errno_of(&error);
        let process = process.map_err(of_io).map_err(denied("pidfd"))?;
        process.check_collapse().map_err(denied("process_madvise(MADV_COLLAPSE)"))?;
        let pagemap = Pagemap::of_process(&process)
            .map_err(|error| denied("open of /proc/PID/pagemap")(Errno::from_raw(error.errno())))?;
        let done = PageBits::new(self.map.pages());
        let quiet = Instant::now();
        Ok(Some(Collapsing { process, pagemap, done, faults: 0, quiet, looked_at: None, next: 0, tries: 0 }))
    }

    /// Whether there may be something to join.
    pub(crate) fn may_collapse(&self) -> bool {
        self.collapsing.as_ref().is_some_and(|one| one.looked_at != Some(self.pages_brought()))
    }

    fn pages_brought(&self) -> u64 {
        self.info.stats.pages_installed.get()
    }

    /// Joins one block, if nobody has wanted anything for a while.
    pub(crate) fn collapse_next(&mut self, now: Instant) -> Ahead {
        let Some(mut collapsing) = self.collapsing.take() else { return Ahead::Nothing };
        let ahead = self.collapse_by(&mut collapsing, now);
        self.collapsing = Some(collapsing);
        ahead
    }

    fn collapse_by(&mut self, collapsing: &mut Collapsing, now: Instant) -> Ahead {
        let faults = self.info.stats.faults.get();
        if faults != collapsing.faults {
            (collapsing.faults, collapsing.quiet) = (faults, now + QUIET);
        }
        if collapsing.quiet > now {
            return Ahead::At(collapsing.quiet);
        }
        let Some(block) = self.next_whole(collapsing) else {
            (collapsing.next, collapsing.looked_at) = (0, Some(self.pages_brought()));
            return Ahead::Nothing;
        };
        collapsing.next = block.start;
        let Some(address) = self.map.address_of(block.start) else { return Ahead::More };
        if self.count_huge(&collapsing.pagemap, &block) == block.len() as u64 {
            collapsing.over(&block);
            return Ahead::More;
        }
        let range = address..address + BLOCK as u64;
        match collapsing.process.collapse(std::slice::from_ref(&range)) {
            Ok(_) => self.info.stats.pages_joined.add(block.len() as u64),
            Err(Errno::EAGAIN | Errno::ENOMEM | Errno::EBUSY) if collapsing.tries < TRIES => {
                collapsing.tries += 1;
                collapsing.quiet = now + QUIET;
                return Ahead::At(collapsing.quiet);
            }
            Err(Errno::ESRCH) => return Ahead::Nothing,
            Err(_) => self.info.stats.blocks_not_joined.add(1),
        }
        collapsing.over(&block);
        Ahead::More
    }

    /// The next block of which all pages are there.
    fn next_whole(&self, collapsing: &Collapsing) -> Option<Range<usize>> {
        let per_block = BLOCK / self.map.page_size() as usize;
        let mut page = collapsing.next;
        while page < self.map.pages() {
            let Some(address) = self.map.address_of(page) else {
                page += 1;
                continue;
            };
            let within = (address % BLOCK as u64 / self.map.page_size()) as usize;
            let block = page..page + per_block - within;
            let together = self.map.clip(block.clone()).end;
            if within == 0
                && together == block.end
                && !collapsing.done.is_set(page)
                && self.states.are_present(block.clone())
            {
                return Some(block);
            }
            page = together.max(page + 1);
        }
        None
    }
}

impl Collapsing {
    /// There is nothing more to do about this one.
    fn over(&mut self, block: &Range<usize>) {
        self.done.set(block.start..block.start + 1);
        self.next = block.end;
        self.tries = 0;
    }
}
