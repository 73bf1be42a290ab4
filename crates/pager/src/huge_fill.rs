//! Filling memory with transparent huge pages: before it is announced, block by block of 2 MiB.
//!
//! `UFFDIO_COPY` makes small pages. Into the memory of this process a huge page that was made ready elsewhere is moved
//! (`UFFDIO_MOVE`): who touches it meanwhile waits, as ever. Another process is stopped first. Then blocks of which nothing is there yet
//! are unregistered, a page is written to each, they are joined (`MADV_COLLAPSE`), the rest is written into the huge pages,
//! and they are registered again, all in one go: between two steps of this nothing is ever unregistered. What ran
//! meanwhile would read zeros, so nothing may: that is looked at before and after.
//!
//! Blocks that hold a page already, or are not whole, or that the image has zeros for, are left to the ordinary way.

use std::ops::Range;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use uffd::errno_of;
use uffd::pagemap::{Categories, PageEntry, Pagemap, PagemapError, ScanOptions};
use uffd::{AnonymousOptions, Mapping, Modes, MoveOptions, Pages, UffdError};

use crate::ahead::Ahead;
use crate::error::PagerError;
use crate::joining::write_joined;
use crate::policy::EndReason;
use crate::resolve::{Filling, Stop};
use crate::session::{CHANGING_PAUSE, Context, Session};
use crate::source::{self, ReadNow};
use crate::stopping::Stopped;

/// Bytes of a block: those of a huge page.
pub(crate) const BLOCK: usize = 2 << 20;
/// Blocks done in one go where nobody else has to wait for that: the kernel empties a queue of every CPU for each call that joins. With more,
/// what was read has left the caches by the time it is written, and so has what the kernel has cleared.
const TOGETHER: usize = 4;
/// Between looks at threads that have not stopped yet.
const STOPPING: Duration = Duration::from_micros(200);

/// Where filling with huge pages has got to.
pub(crate) struct HugeFill {
    way: Way,
    /// Where bytes rest on their way, or become huge pages to be moved.
    staging: Mapping,
    /// The first page that was not looked at.
    next: usize,
    /// Ordinary pages that are parts of huge ones now.
    joined: u64,
    /// Why a block was not joined.
    refused: Option<PagerError>,
}

enum Way {
    /// Memory of this process.
    Moved(Pagemap),
    /// Memory of another one.
    Stopped(Stopped, Pagemap),
}

/// Why there are no huge pages.
enum Refusal {
    /// The ordinary way is left.
    FellBack(PagerError),
    Stopped(Stop),
}

/// What has become of reading a block.
enum Reading {
    Done,
    /// By a worker.
    Begun,
    /// As many reads are under way as may be.
    NotNow,
}

impl Session {
    /// Whether this memory can be filled with huge pages, and how; nothing where all of its pages are huge anyway.
    fn begin_huge_fill(&self) -> Result<Option<HugeFill>, PagerError> {
        if self.huge {
            return Ok(None);
        }
        if self.tracking.is_some() || self.brings_to_file() {
            return Err(unsupported("memory whose writes are tracked, or that is brought to a memfd"));
        }
        if uffd::transparent_huge_page_size() != Some(BLOCK) {
            return Err(unsupported("a kernel without transparent huge pages of 2 MiB"));
        }
        if self.kept.is_some() {
            return Err(unsupported(
                "memory whose pager another process may have to take over, which could not know what is registered just then",
            ));
        }
        let own = self.own || self.info.peer.pid == std::process::id() as i32;
        let way = match &self.process {
            Some(process) if !own => {
                let process = process.pidfd();
                let denied = |what, needs| move |errno| PagerError::NoRight { what, needs, errno };
                let tracing = "the right to trace the process: the same user, or CAP_SYS_PTRACE";
                process.check_write_memory().map_err(denied("process_vm_writev", tracing))?;
                let advising = "that, and CAP_SYS_NICE (and Linux 6.1)";
                process.check_collapse().map_err(denied("process_madvise(MADV_COLLAPSE)", advising))?;
                let pagemap = Pagemap::of_process(process).map_err(|error| {
                    denied("open of /proc/PID/pagemap", tracing)(Errno::from_raw(error.errno()))
                })?;
                let stopped =
                    process.try_clone().map_err(|error| errno_of(&error)).and_then(Stopped::begin).map_err(
                        denied("SIGSTOP", "the right to signal the process: the same user, or CAP_KILL"),
                    )?;
                Way::Stopped(stopped, pagemap)
            }
            _ if own => Way::Moved(Pagemap::of_self().map_err(of_pagemap)?),
            _ => return Err(unsupported("the memory of a process without a pidfd")),
        };
        let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
        let staging = Mapping::anonymous(TOGETHER * BLOCK, options)
            .map_err(|error| PagerError::Exhausted(format!("no room to make huge pages ready: {error}")))?;
        Ok(Some(HugeFill { way, staging, next: 0, joined: 0, refused: None }))
    }

    /// Brings some blocks as huge pages, if that is what is wanted now.
    pub(crate) fn bring_huge(&mut self, cx: &mut Context<'_>) -> Option<Ahead> {
        if self.filling.wants_huge() {
            match self.begin_huge_fill() {
                Ok(Some(huge)) => self.filling.put_huge(Box::new(huge)),
                Ok(None) => self.filling.end_huge(),
                Err(error) => self.filling.fall_back(error),
            }
        }
        // Taken out while it is worked on.
        let mut huge = self.filling.take_huge()?;
        match self.step_huge(&mut huge, cx) {
            Ok(Some(ahead)) => {
                self.filling.put_huge(huge);
                return Some(ahead);
            }
            Ok(None) => match huge.refused.take() {
                Some(error) if huge.joined == 0 => self.filling.fall_back(error),
                _ => self.filling.end_huge(),
            },
            Err(Refusal::FellBack(error)) => self.filling.fall_back(error),
            Err(Refusal::Stopped(stop)) => self.stopped(stop),
        }
        // What is left comes the ordinary way. The process goes on.
        Some(Ahead::More)
    }

    /// `None` when there are no more blocks.
    fn step_huge(&mut self, huge: &mut HugeFill, cx: &mut Context<'_>) -> Result<Option<Ahead>, Refusal> {
        if let Way::Stopped(stopped, _) = &huge.way
            && !stopped.is_complete()
        {
            return match stopped.too_late() {
                Some(error) => Err(Refusal::FellBack(error)),
                None => Ok(Some(Ahead::At(Instant::now() + STOPPING))),
            };
        }
        let together = if cx.alone { TOGETHER } else { 1 };
        let (mut blocks, mut from) = (Vec::with_capacity(together), huge.next);
        while blocks.len() < together {
            let Some(block) = self.next_block(from) else {
                from = usize::MAX;
                break;
            };
            from = block.end;
            if !self.is_empty(&huge.way, &block)? {
                continue;
            }
            match self.read_block(huge, &block, blocks.len(), cx)? {
                Reading::Done => blocks.push(block),
                Reading::Begun => {}
                Reading::NotNow => {
                    from = block.start;
                    break;
                }
            }
        }
        if blocks.is_empty() {
            huge.next = from;
            // Those that workers read come when they are there.
            let reading = self.reads_in_flight() > 0;
            return Ok(reading.then_some(Ahead::Nothing));
        }
        match self.install_huge(huge, &blocks) {
            Ok(()) => huge.next = from,
            Err(Refusal::Stopped(Stop::Changing(page))) => {
                huge.next = page;
                return Ok(Some(Ahead::At(Instant::now() + CHANGING_PAUSE)));
            }
            Err(refusal) => return Err(refusal),
        }
        Ok(Some(Ahead::More))
    }

    /// The next whole block of missing pages that the image does not have zeros for.
    fn next_block(&self, from: usize) -> Option<Range<usize>> {
        let (mut from, per_block) = (from, BLOCK / self.map.page_size() as usize);
        loop {
            let page = self.states.next_missing(from, 1)?.start;
            let Some(address) = self.map.address_of(page) else {
                from = page + 1;
                continue;
            };
            let within = (address % BLOCK as u64 / self.map.page_size()) as usize;
            let end = page + per_block - within;
            let together = self.map.clip(page..end).end;
            let whole = within == 0 && together == end && self.states.missing_run(page, page..end).end == end;
            from = together.max(page + 1);
            let read = self.in_flight.iter().any(|reading| reading.pages.contains(&page));
            if whole && !read && !self.has_zeros(&(page..end)) {
                return Some(page..end);
            }
        }
    }

    /// Whether its owner has put nothing there before it was registered.
    fn is_empty(&self, way: &Way, block: &Range<usize>) -> Result<bool, Refusal> {
        let (Way::Moved(pagemap) | Way::Stopped(_, pagemap)) = way;
        let Some(address) = self.map.address_of(block.start) else { return Ok(false) };
        let entries =
            pagemap.entries(address, block.len()).map_err(|error| Refusal::FellBack(of_pagemap(error)))?;
        Ok(!entries.iter().any(|entry: &PageEntry| entry.is_present() || entry.is_swapped()))
    }

    /// Brings the bytes of a block to its place in the staging, or has a worker read them.
    fn read_block(
        &mut self,
        huge: &mut HugeFill,
        block: &Range<usize>,
        place: usize,
        cx: &mut Context<'_>,
    ) -> Result<Reading, Refusal> {
        let Some(offset) = self.map.source_offset_of(block.start) else { return Ok(Reading::Begun) };
        let source = std::sync::Arc::clone(&self.source);
        self.watch.start();
        match source::read_now(&*source, offset, huge.bytes(place..place + 1)) {
            Ok(ReadNow::Done) => {
                let took = self.watch.lap();
                self.source_answered(took, false);
                Ok(Reading::Done)
            }
            Ok(ReadNow::WouldBlock) => {
                let begun = self.read_ahead(block.clone(), cx.workers).map_err(Refusal::Stopped)?;
                Ok(if begun { Reading::Begun } else { Reading::NotNow })
            }
            Err(error) => Err(Refusal::Stopped(Stop::Failed(EndReason::SourceFailed, error))),
        }
    }

    /// Fills a block that a worker has read with a huge page; `None` where it is not one, or not now.
    pub(crate) fn fill_huge(
        &mut self,
        pages: &Range<usize>,
        filling: Filling<'_>,
    ) -> Option<Result<(), Stop>> {
        let Filling::Bytes(bytes) = filling else { return None };
        if !self.phase.serves() {
            return None;
        }
        let bytes = bytes.get(..BLOCK).filter(|_| self.map.bytes(pages.len()) == BLOCK as u64)?;
        let aligned = self.map.address_of(pages.start)?.is_multiple_of(BLOCK as u64);
        let together = self.map.clip(pages.clone()) == *pages;
        let mut huge = if aligned && together { self.filling.take_huge()? } else { return None };
        huge.bytes(0..1).copy_from_slice(bytes);
        let block = pages.clone();
        let done = match self.is_empty(&huge.way, &block) {
            Ok(true) => self.install_huge(&mut huge, &[block]),
            _ => {
                self.filling.put_huge(huge);
                return None;
            }
        };
        match done {
            Ok(()) => {
                self.filling.put_huge(huge);
                Some(Ok(()))
            }
            Err(Refusal::FellBack(error)) => {
                self.filling.fall_back(error);
                None
            }
            Err(Refusal::Stopped(stop)) => {
                self.filling.put_huge(huge);
                Some(Err(stop))
            }
        }
    }

    /// Installs blocks whose bytes are in the staging, in their order.
    fn install_huge(&mut self, huge: &mut HugeFill, blocks: &[Range<usize>]) -> Result<(), Refusal> {
        self.watch.start();
        match &huge.way {
            Way::Moved(_) => self.move_blocks(huge, blocks)?,
            Way::Stopped(..) => self.write_blocks(huge, blocks)?,
        }
        let pages: usize = blocks.iter().map(ExactSizeIterator::len).sum();
        let stats = &self.info.stats;
        stats.latencies.prefetch_install.record(self.watch.lap());
        stats.windows.add(blocks.len() as u64);
        stats.pages_installed.add(pages as u64);
        stats.pages_prefetched.add(pages as u64);
        stats.bytes_installed.add(self.map.bytes(pages));
        let joined = blocks.iter().map(|block| self.count_huge(huge.pagemap(), block)).sum();
        self.info.stats.pages_joined.add(joined);
        huge.joined += joined;
        for block in blocks {
            self.states.set_present(block.clone());
        }
        Ok(())
    }

    /// Pages of a block that are parts of a huge one.
    pub(crate) fn count_huge(&self, pagemap: &Pagemap, block: &Range<usize>) -> u64 {
        let Some(start) = self.map.address_of(block.start) else { return 0 };
        let options =
            ScanOptions { all_of: Categories::HUGE, report: Categories::HUGE, ..ScanOptions::default() };
        // A kernel that cannot tell (before 6.7) joins them all the same.
        let found = pagemap.scan(start, start + BLOCK as u64, &options).map_or_else(
            |_| BLOCK as u64,
            |scan| scan.regions.iter().map(|region| region.end - region.start).sum(),
        );
        found / self.map.page_size()
    }

    fn move_blocks(&mut self, huge: &HugeFill, blocks: &[Range<usize>]) -> Result<(), Refusal> {
        for (place, block) in blocks.iter().enumerate() {
            let Some(address) = self.map.address_of(block.start) else { continue };
            let from = huge.staging.address() + (place * BLOCK) as u64;
            // SAFETY: the staging is this session's own, and the one reference to it (`HugeFill::bytes`) has ended. The
            // destination is memory that is served, of which no reference exists.
            let moved = unsafe { self.uffd.move_pages(address, from, BLOCK as u64, MoveOptions::default()) };
            match moved {
                Ok(()) => {}
                Err(UffdError::Changing) => return Err(Refusal::Stopped(Stop::Changing(block.start))),
                Err(UffdError::UffdClosed) => return Err(Refusal::Stopped(Stop::Gone)),
                Err(cause) => {
                    return Err(Refusal::FellBack(PagerError::Kernel { address, len: BLOCK as u64, cause }));
                }
            }
            // Those of a later one that is refused are in.
            self.states.set_present(block.clone());
        }
        Ok(())
    }

    fn write_blocks(&mut self, huge: &mut HugeFill, blocks: &[Range<usize>]) -> Result<(), Refusal> {
        let places: Vec<Range<u64>> = blocks
            .iter()
            .filter_map(|block| self.map.address_of(block.start))
            .map(|start| start..start + BLOCK as u64)
            .collect();
        let Way::Stopped(stopped, _) = &huge.way else { return Ok(()) };
        if !stopped.is_complete() {
            let what = "the process was let go on before its memory was filled with huge pages";
            return Err(Refusal::FellBack(PagerError::Protocol(what.to_owned())));
        }
        let protected = places.first().is_some_and(|place| {
            self.uffd.write_protect(place.start, self.map.page_size(), false, false)
                != Err(UffdError::NotRegistered)
        });
        if protected {
            return Err(Refusal::FellBack(unsupported(
                "memory that is registered for more than missing faults",
            )));
        }
        let refused = |syscall| move |errno| PagerError::System { syscall, errno };
        let mut outcome = Ok(());
        let mut open = 0;
        for place in &places {
            match self.uffd.unregister(place.start, BLOCK as u64) {
                Ok(()) => open += 1,
                Err(cause) => {
                    let (address, len) = (place.start, BLOCK as u64);
                    outcome = Err(Refusal::FellBack(PagerError::Kernel { address, len, cause }));
                    break;
                }
            }
        }
        if outcome.is_ok() {
            outcome = write_joined(stopped.process(), &huge.staging, &places, &mut huge.refused).map_err(
                |(errno, harm)| match (errno, harm) {
                    (Errno::ESRCH, _) => Refusal::Stopped(Stop::Gone),
                    (errno, false) => Refusal::FellBack(refused("process_vm_writev")(errno)),
                    (errno, true) => Refusal::Stopped(Stop::Failed(
                        EndReason::Protocol,
                        refused("process_vm_writev")(errno),
                    )),
                },
            );
        }
        for place in places.iter().take(open) {
            // SAFETY: another process's memory.
            let again = unsafe { self.uffd.register(place.start, BLOCK as u64, Modes::MISSING) };
            match again {
                Ok(_) => {}
                Err(UffdError::UffdClosed) => outcome = Err(Refusal::Stopped(Stop::Gone)),
                Err(cause) => {
                    let (address, len) = (place.start, BLOCK as u64);
                    let error = PagerError::Kernel { address, len, cause };
                    outcome = Err(Refusal::Stopped(Stop::Failed(EndReason::Exhausted, error)));
                }
            }
        }
        if outcome.is_ok() && !stopped.is_complete() {
            let what = "the process was let go on while its memory was filled with huge pages: it may have read zeros";
            let error = PagerError::Protocol(what.to_owned());
            outcome = Err(Refusal::Stopped(Stop::Failed(EndReason::Protocol, error)));
        }
        if let Err(Refusal::Stopped(Stop::Failed(reason, error))) = &outcome
            && !stopped.process().has_exited().unwrap_or(false)
        {
            // It may have zeros where there should be bytes, which nothing can poison any more.
            self.fail(*reason, error.clone());
            self.phase.cannot_poison(self.process.as_ref());
        }
        outcome
    }
}

impl HugeFill {
    fn pagemap(&self) -> &Pagemap {
        let (Way::Moved(pagemap) | Way::Stopped(_, pagemap)) = &self.way;
        pagemap
    }

    /// The staging of some blocks.
    fn bytes(&mut self, places: Range<usize>) -> &mut [u8] {
        let start = self.staging.as_ptr().wrapping_add(places.start * BLOCK);
        // SAFETY: the staging is mapped, long enough for every place, and nobody else knows it: borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(start, places.len() * BLOCK) }
    }
}

fn unsupported(what: &str) -> PagerError {
    PagerError::Unsupported(format!("filling {what} with transparent huge pages"))
}

fn of_pagemap(error: PagemapError) -> PagerError {
    PagerError::System { syscall: "/proc/PID/pagemap", errno: Errno::from_raw(error.errno()) }
}
