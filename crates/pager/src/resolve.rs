//! The one place that installs pages, and that reads what the kernel says about it.
//!
//! | the kernel says | what follows |
//! | --- | --- |
//! | done | the pages are present, their waiters woken |
//! | partly done | those are present; go on behind them to learn what is in the way |
//! | a page is present | wake it (the kernel does not), step over it; on huge pages it may also mean that the pool is empty, so rounds are counted |
//! | changing | nothing done: the caller parks the fault |
//! | not registered | asked once more, because it may be on its way elsewhere; then the range leaves its mapping: page by page, and what is really not registered is left to the kernel |
//! | process gone | the session is over |
//! | anything else | the session meets its failure policy |

use std::collections::HashMap;
use std::ops::Range;

use nix::errno::Errno;
use uffd::{ContinueOptions, CopyOptions, UffdError, Userfaultfd};

use crate::address_map::AddressMap;
use crate::error::PagerError;
use crate::modes::Minor;
use crate::page_state::PageStates;
use crate::policy::EndReason;
use crate::stats::Stats;
use crate::zero_runs::{Run, runs};

/// How often one huge page may be "already present" and fault again before the pool is held to be empty.
const MOST_ROUNDS: u32 = 8;

/// What is put into pages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Filling<'a> {
    /// These bytes, as many as the pages have. Pages of zeros among them become [`Filling::SourceZeros`].
    Bytes(&'a [u8]),
    /// Nothing: the source's bytes or zeros are there already, put there by the thread beside this one ([`crate::in_two`]).
    Installed(&'a [Run]),
    /// Zeros, because the source has zeros there.
    SourceZeros,
    /// What the page cache has for them.
    Cached,
    /// Zeros, because their owner discarded what was there.
    Zeros,
    /// A marker that makes touching them a SIGBUS.
    Poison,
}

/// Why installing stopped early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The address space is changing: try again later, from this page on.
    Changing(usize),
    /// The served process is gone.
    Gone,
    /// The kernel cannot poison pages (before 6.6), or not these.
    CannotPoison,
    /// The session cannot go on.
    Failed(EndReason, PagerError),
}

/// What installing needs to know of a session.
pub(crate) struct Resolver<'a> {
    pub(crate) uffd: &'a Userfaultfd,
    pub(crate) map: &'a AddressMap,
    pub(crate) states: &'a mut PageStates,
    pub(crate) stats: &'a Stats,
    /// Huge pages that were "already present", and how often in a row.
    pub(crate) rounds: &'a mut HashMap<usize, u32>,
    pub(crate) huge: bool,
    /// Whether anything was installed; no at first.
    pub(crate) filled: bool,
    /// Pages that somebody is known to wait for: what becomes of those faults is counted.
    pub(crate) waiting: &'a [usize],
    /// Behind the last page that was dealt with.
    pub(crate) reached: usize,
    /// The memfd that the pages were just written to, where they were.
    pub(crate) brought: Option<&'a Minor>,
    /// Install pages write-protected; then a page of zeros to copy from, because zeros that are not copied cannot be
    /// protected before somebody writes to them.
    pub(crate) protect: Option<&'a [u8]>,
    /// Copy what was read as it is, zeros included: it is to be joined.
    pub(crate) whole: bool,
}

impl Resolver<'_> {
    /// Fills `pages`, wherever they lie by now (with zeros: one page), and wakes whoever waits for them. Those mapped nowhere are passed over.
    ///
    /// # Errors
    ///
    /// Why it stopped early. What was filled until then is recorded.
    pub(crate) fn fill(&mut self, pages: Range<usize>, filling: Filling<'_>) -> Result<(), Stop> {
        let done = match filling {
            // Zeros that are to be protected are copied, a page at a time; among other bytes with those.
            Filling::SourceZeros if self.protect.is_some() => {
                pages.clone().try_for_each(|page| self.fill_run(page..page + 1, filling))
            }
            Filling::Bytes(bytes) if self.protect.is_none() && !self.whole => {
                self.fill_runs(pages.clone(), bytes)
            }
            Filling::Installed(runs) => {
                for Run { pages: run, zero } in runs {
                    let as_if = if *zero { Filling::SourceZeros } else { Filling::Bytes(&[]) };
                    self.installed(pages.start + run.start..pages.start + run.end, as_if);
                }
                Ok(())
            }
            _ => self.fill_run(pages.clone(), filling),
        };
        let from_source = !matches!(filling, Filling::Zeros | Filling::Poison);
        if self.filled && from_source {
            self.stats.windows.add(1);
        }
        done
    }

    /// Data is copied, longer runs of zero pages are the kernel's zeros.
    fn fill_runs(&mut self, pages: Range<usize>, bytes: &[u8]) -> Result<(), Stop> {
        let page_size = self.map.page_size() as usize;
        let bytes = bytes.get(..pages.len() * page_size).unwrap_or(bytes);
        for run in runs(bytes, page_size, self.huge) {
            let part = bytes.get(run.pages.start * page_size..run.pages.end * page_size).unwrap_or_default();
            let filling = if run.zero { Filling::SourceZeros } else { Filling::Bytes(part) };
            self.fill_run(pages.start + run.pages.start..pages.start + run.pages.end, filling)?;
        }
        Ok(())
    }

    /// Fills pages that all get the same kind of thing.
    fn fill_run(&mut self, pages: Range<usize>, filling: Filling<'_>) -> Result<(), Stop> {
        let mut page = pages.start;
        while page < pages.end {
            let together = self.map.clip(page..pages.end);
            page =
                if together.is_empty() { page + 1 } else { self.fill_some(together, pages.start, filling)? };
        }
        Ok(())
    }

    /// Fills the first of `pages`, which lie together; `Bytes` begin at page `base`. Behind which page to go on.
    fn fill_some(&mut self, pages: Range<usize>, base: usize, filling: Filling<'_>) -> Result<usize, Stop> {
        let page = pages.start;
        match self.fill_once(pages.clone(), base, filling) {
            Ok(()) => {
                let end = pages.end;
                self.installed(pages, filling);
                return Ok(end);
            }
            Err(UffdError::PartiallyCopied { done }) => {
                let filled = (done / self.map.page_size()) as usize;
                if filled == 0 {
                    return Err(Stop::Changing(page));
                }
                self.installed(page..page + filled, filling);
                return Ok(page + filled);
            }
            // The range leaves its mapping somewhere: what lies inside is filled page by page.
            Err(UffdError::NotRegistered) if pages.len() > 1 => {
                for page in pages.clone() {
                    self.fill_some(page..page + 1, base, filling)?;
                }
                return Ok(pages.end);
            }
            Err(UffdError::NotRegistered) => self.leave_to_kernel(page),
            Err(UffdError::PageExist) => self.step_over(page)?,
            Err(UffdError::Changing) => return Err(Stop::Changing(page)),
            Err(UffdError::UffdClosed) => return Err(Stop::Gone),
            Err(UffdError::System { errno: Errno::EFAULT, .. }) if matches!(filling, Filling::Cached) => {
                self.not_cached(page)?;
            }
            Err(_) if matches!(filling, Filling::Poison) => return Err(Stop::CannotPoison),
            Err(error) => return Err(self.failed(pages, error)),
        }
        Ok(page + 1)
    }

    /// One ioctl over `pages`; `Bytes` begin at page `base`.
    ///
    /// Memory that is moved away between the kernel's look whether anything is changing and its look for the mapping is
    /// not registered for it, although an event of that is still to come: until that is read, it says so when asked again.
    fn fill_once(&self, pages: Range<usize>, base: usize, filling: Filling<'_>) -> Result<(), UffdError> {
        match self.try_fill(pages.clone(), base, filling) {
            Err(UffdError::NotRegistered) => self.try_fill(pages, base, filling),
            done => done,
        }
    }

    fn try_fill(&self, pages: Range<usize>, base: usize, filling: Filling<'_>) -> Result<(), UffdError> {
        let Some(address) = self.map.address_of(pages.start) else { return Err(UffdError::NotRegistered) };
        let len = self.map.bytes(pages.len());
        match filling {
            Filling::Bytes(bytes) => {
                let skip = self.map.bytes(pages.start - base) as usize;
                let Some(bytes) = bytes.get(skip..skip + len as usize) else {
                    return Err(UffdError::NotRegistered);
                };
                // SAFETY: `bytes` is ordinary memory of this process, borrowed for the call, `len` bytes long. The
                // destination is another process's (or mapping's) missing memory, of which no reference exists.
                unsafe { self.uffd.copy(address, bytes.as_ptr(), bytes.len(), self.copying()) }
            }
            Filling::Cached => {
                let options =
                    ContinueOptions { write_protect: self.protect.is_some(), ..ContinueOptions::default() };
                self.uffd.continue_pages(address, len, options)
            }
            Filling::Zeros | Filling::SourceZeros if self.protect.is_some() => {
                let zeros = self.protect.unwrap_or_default();
                // One page after another: there is one page of zeros.
                // SAFETY: `zeros` is ordinary memory of this process, borrowed for the call and one page long, as is what
                // is copied. The destination is missing memory.
                unsafe { self.uffd.copy(address, zeros.as_ptr(), zeros.len(), self.copying()) }
            }
            Filling::Zeros | Filling::SourceZeros if self.huge => {
                self.uffd.zero_huge(address, len, self.map.page_size() as usize, true)
            }
            Filling::Zeros | Filling::SourceZeros => self.uffd.zero(address, len, true),
            // It is there.
            Filling::Installed(_) => Ok(()),
            Filling::Poison => {
                if self.protect.is_some() {
                    // A mark of protection, which memory of files keeps where a page is missing, is in the way.
                    match self.uffd.write_protect(address, len, false, false) {
                        Ok(()) | Err(UffdError::NotRegistered) => {}
                        Err(error) => return Err(error),
                    }
                }
                self.uffd.poison(address, len, true)
            }
        }
    }

    fn copying(&self) -> CopyOptions {
        CopyOptions { write_protect: self.protect.is_some(), ..CopyOptions::default() }
    }

    fn installed(&mut self, pages: Range<usize>, filling: Filling<'_>) {
        self.filled = true;
        let count = pages.len() as u64;
        let waited_for = self.dealt_with(&pages);
        if self.waiting.is_empty()
            && matches!(filling, Filling::Bytes(_) | Filling::Cached | Filling::SourceZeros)
        {
            self.stats.pages_prefetched.add(count);
        }
        match filling {
            Filling::Bytes(_) | Filling::Cached | Filling::Installed(_) => {
                self.stats.faults_installed.add(waited_for);
                self.stats.pages_installed.add(count);
                self.stats.bytes_installed.add(self.map.bytes(pages.len()));
            }
            Filling::SourceZeros => {
                self.stats.faults_installed.add(waited_for);
                self.stats.pages_zero.add(count);
            }
            Filling::Zeros => {
                self.stats.faults_zeroed.add(waited_for);
                self.stats.pages_zeroed.add(count);
            }
            Filling::Poison => {
                self.stats.faults_poisoned.add(waited_for);
                self.stats.pages_poisoned.add(count);
            }
        }
        if self.huge {
            for page in pages.clone() {
                self.rounds.remove(&page);
            }
        }
        self.states.set_present(pages);
    }

    /// A page is in the way. The kernel does not wake its waiters; they may sleep from an earlier install.
    fn step_over(&mut self, page: usize) -> Result<(), Stop> {
        if self.huge {
            // Here "present" can be a lie: an empty pool says the same. Believing it would give zeros later.
            let rounds = self.rounds.entry(page).or_insert(0);
            *rounds += 1;
            if *rounds > MOST_ROUNDS {
                return Err(Stop::Failed(
                    EndReason::Exhausted,
                    PagerError::Exhausted(
                        "no huge page is free to install (vm.nr_hugepages); the kernel reports this as a page \
                         that is already there"
                            .to_owned(),
                    ),
                ));
            }
        } else {
            self.states.set_present(page..page + 1);
        }
        let waited_for = self.dealt_with(&(page..page + 1));
        self.stats.already_present.add(waited_for);
        self.wake(page);
        Ok(())
    }

    /// What was brought is not there: taken out of its file again, or never what is mapped here.
    fn not_cached(&mut self, page: usize) -> Result<(), Stop> {
        if self.brought.is_some_and(|memfd| memfd.has(self.map, page)) {
            let reason = "memfd for minor faults: the process has mapped something else";
            return Err(Stop::Failed(EndReason::Protocol, PagerError::Adopt(reason.to_owned())));
        }
        self.leave_to_kernel(page);
        Ok(())
    }

    /// Not registered any more, or taken out of its file: its owner took it back, and the kernel serves it from now on.
    fn leave_to_kernel(&mut self, page: usize) {
        self.states.set_removed(page..page + 1);
        let waited_for = self.dealt_with(&(page..page + 1));
        self.stats.unanswered.add(waited_for);
        self.wake(page);
    }

    /// How many of the faults that are waited for end with these pages.
    fn dealt_with(&mut self, pages: &Range<usize>) -> u64 {
        self.reached = pages.end;
        self.waiting.iter().filter(|page| pages.contains(page)).count() as u64
    }

    fn wake(&self, page: usize) {
        for place in self.map.other_places_of(page..page + 1) {
            // As below.
            let _ = self.uffd.wake(place.start, place.end - place.start);
        }
        if let Some(address) = self.map.address_of(page) {
            // WAKE fails only on ranges that were never valid; these were checked when the session began.
            let _ = self.uffd.wake(address, self.map.page_size());
        }
    }

    fn failed(&self, pages: Range<usize>, cause: UffdError) -> Stop {
        let reason = match cause.errno() {
            Some(libc::ENOMEM) => EndReason::Exhausted,
            _ => EndReason::Protocol,
        };
        let address = self.map.address_of(pages.start).unwrap_or(0);
        Stop::Failed(reason, PagerError::Kernel { address, len: self.map.bytes(pages.len()), cause })
    }
}
