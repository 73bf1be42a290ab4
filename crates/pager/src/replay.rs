//! Replay: what an earlier run wanted is brought before anybody asks, while no fault waits.
//!
//! The recording becomes a list of blocks of 64 pages of the image, each with the pages of it that are wanted, in the order
//! in which the first of them was. A block is in the list once for every 64 MiB of the recording, so that what was
//! wanted much later also comes later. Bytes at hand are installed stretch by stretch, only what was recorded. Where the
//! source has to be waited for, a request costs more than the bytes between two stretches, so that those of a block are
//! asked for together; as many requests are under way as reads ahead may be.

mod packed;
mod plan;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address_map::{AddressMap, Region};
use crate::ahead::{Ahead, MOST_READS};
use crate::error::PagerError;
use crate::owed::Owed;
use crate::reading::Reason;
use crate::resolve::{Filling, Stop};
use crate::session::{CHANGING_PAUSE, Context, Session};
use crate::stats::Stats;

use plan::BLOCK;
pub use plan::Replay;

/// Pages between two stretches that are read with them, where a source has to be waited for: in half a millisecond a network
/// of a gigabit a second brings as much.
const GAP: usize = 16;
/// Pages installed at once: what a fault may have to wait for.
const PIECE: usize = 16;
/// How long stretches are installed before it is looked for faults again.
const SLICE: Duration = Duration::from_micros(12);

/// Bytes that have come and are not installed yet.
struct Ready {
    /// What was read, and its bytes.
    span: Range<usize>,
    bytes: Vec<u8>,
    /// What of it is wanted, in order.
    wanted: VecDeque<Range<usize>>,
}

/// A session's replay.
pub(crate) struct Replaying {
    plan: Arc<Replay>,
    layout: Layout,
    /// The next block.
    next: usize,
    /// Stretches of the blocks before it that have not had their turn.
    pending: VecDeque<Range<usize>>,
    /// What is being read, and what of it is wanted.
    reading: Vec<(Range<usize>, Vec<Range<usize>>)>,
    ready: VecDeque<Ready>,
    answers: Vec<Owed<()>>,
    done: bool,
}

impl Replaying {
    /// Of a session that begins, which counts what there is to do.
    pub(crate) fn new(plan: Arc<Replay>, map: &AddressMap, stats: &Stats) -> Self {
        stats.replay_pages.add(plan.pages);
        stats.replay_held.add(plan.held_pages);
        Self {
            layout: Layout::of(map),
            plan,
            next: 0,
            pending: VecDeque::new(),
            reading: Vec::new(),
            ready: VecDeque::new(),
            answers: Vec::new(),
            done: false,
        }
    }

    /// The next stretch that is missing and not on its way, a piece of it; it stays first until it is dealt with.
    fn next_stretch(&mut self, session: &Session) -> Option<Range<usize>> {
        let own = &self.reading;
        // What is read for a fault comes as a whole; of what is read for this, only what was wanted then.
        let is_on_its_way = |page: usize| {
            let is_own = |pages: &Range<usize>| own.iter().any(|(span, _)| span == pages);
            let mut reads = session.in_flight.iter().map(|reading| &reading.pages);
            reads.any(|pages| pages.contains(&page) && !is_own(pages))
        };
        loop {
            let Some(pages) = self.pending.front_mut() else {
                let &(block, mask) = self.plan.blocks.get(self.next)?;
                self.next += 1;
                self.pending.extend(
                    self.plan
                        .stretches(block, mask)
                        .flat_map(|(offset, len)| self.layout.pages_of(offset, len)),
                );
                continue;
            };
            let run = session.states.next_missing(pages.start, PIECE).filter(|run| run.start < pages.end);
            match run {
                None => {
                    self.pending.pop_front();
                }
                Some(run) if is_on_its_way(run.start) => pages.start = run.start + 1,
                Some(run) => {
                    pages.start = run.start;
                    return Some(session.map.clip(run.start..run.end.min(pages.end)));
                }
            }
        }
    }

    /// What is read together with the first stretch, which begins at `start`: those of its block that are near.
    fn take_near(&mut self, start: usize, session: &Session) -> Vec<Range<usize>> {
        let most = session.map.clip(start..start + BLOCK as usize).end;
        let mut near: Vec<Range<usize>> = Vec::new();
        while let Some(pages) = self.pending.front_mut() {
            let behind = near.last().map_or(start, |last| last.end);
            if pages.start < behind || pages.start > behind + GAP || pages.start >= most {
                break;
            }
            let end = pages.end.min(most);
            near.push(pages.start..end);
            pages.start = end;
            if pages.start >= pages.end {
                self.pending.pop_front();
            }
        }
        near
    }

    /// What is being read, or has been and is not installed, is to be read anew.
    pub(crate) fn forget_reads(&mut self) {
        let reading = self.reading.drain(..).flat_map(|(_, wanted)| wanted);
        let wanted: Vec<_> = self.ready.drain(..).flat_map(|ready| ready.wanted).chain(reading).collect();
        for pages in wanted.into_iter().rev() {
            self.pending.push_front(pages);
        }
    }

    /// The counters are those of the process before: what it had finished stays so.
    pub(crate) fn go_on(&mut self, stats: &Stats) {
        self.done = stats.replay_done.get() > 0;
    }

    fn is_idle(&self) -> bool {
        self.next >= self.plan.blocks.len()
            && self.pending.is_empty()
            && self.reading.is_empty()
            && self.ready.is_empty()
    }

    fn finish(&mut self, stats: &Stats) {
        self.done = true;
        stats.replay_done.add(1);
        for mut answer in self.answers.drain(..) {
            answer.give(Ok(()));
        }
    }
}

/// Where a session's pages are in the image.
struct Layout {
    page_size: u64,
    /// Stretches of the image, and the number of the first page of each.
    regions: Vec<(Range<u64>, usize)>,
}

impl Layout {
    /// Pages are numbered through, region after region; the number of a page never changes, nor its place in the image.
    fn of(map: &AddressMap) -> Self {
        let page_size = map.page_size();
        let mut first = 0;
        let regions = map.regions().map(|Region { len, source_offset, .. }| {
            let number = first;
            first += (len / page_size) as usize;
            (source_offset..source_offset + len, number)
        });
        Self { regions: regions.collect(), page_size }
    }

    /// The session's pages of a stretch of the image.
    fn pages_of(&self, offset: u64, len: u64) -> impl Iterator<Item = Range<usize>> + '_ {
        let end = offset + len;
        self.regions.iter().filter_map(move |(place, first)| {
            let (start, end) = (offset.max(place.start), end.min(place.end));
            let number = |offset: u64| *first + ((offset - place.start) / self.page_size) as usize;
            (start < end).then(|| number(start)..number(end - 1) + 1)
        })
    }
}

impl Session {
    /// Whether there is something to replay.
    pub(crate) fn replays(&self) -> bool {
        self.replaying.as_ref().is_some_and(|replaying| !replaying.done)
    }

    /// Tells when the replay is over.
    pub(crate) fn await_replay(&mut self, mut answer: Owed<()>) {
        match self.replaying.as_deref_mut() {
            None => {
                let error =
                    PagerError::Unsupported("this session replays no recording (`replay`)".to_owned());
                answer.give(Err(error));
            }
            Some(replaying) if replaying.done => answer.give(Ok(())),
            Some(replaying) => replaying.answers.push(answer),
        }
    }

    /// Brings some of what is to be replayed. `None`: there is nothing to be done about it now.
    pub(crate) fn replay_some(&mut self, cx: &mut Context<'_>) -> Option<Ahead> {
        if !self.replays() {
            return None;
        }
        let mut replaying = self.replaying.take()?;
        let before = self.info.stats.pages_prefetched.get();
        let outcome = self.replay_with(&mut replaying, cx);
        let installed = self.info.stats.pages_prefetched.get() - before;
        self.info.stats.replay_installed.add(installed);
        // Told when all of it is counted.
        if matches!(outcome, Ok(None)) && replaying.is_idle() {
            replaying.finish(&self.info.stats);
        }
        self.replaying = Some(replaying);
        match outcome {
            Ok(ahead) => ahead,
            Err(Stop::Changing(_)) => Some(Ahead::At(Instant::now() + CHANGING_PAUSE)),
            Err(stop) => {
                self.stopped(stop);
                Some(Ahead::More)
            }
        }
    }

    fn replay_with(
        &mut self,
        replaying: &mut Replaying,
        cx: &mut Context<'_>,
    ) -> Result<Option<Ahead>, Stop> {
        let until = Instant::now() + SLICE;
        loop {
            if !self.install_ready(replaying)? && !self.replay_stretch(replaying, cx)? {
                return Ok(None);
            }
            if Instant::now() >= until {
                return Ok(Some(Ahead::More));
            }
        }
    }

    /// Installs a piece of what has been read; `false` where there is none.
    fn install_ready(&mut self, replaying: &mut Replaying) -> Result<bool, Stop> {
        let Some(ready) = replaying.ready.front_mut() else { return Ok(false) };
        let Some(pages) = ready.wanted.front_mut() else {
            replaying.ready.pop_front();
            return Ok(true);
        };
        let run = self.states.next_missing(pages.start, PIECE).filter(|run| run.start < pages.end);
        let Some(run) = run.map(|run| run.start..run.end.min(pages.end)) else {
            ready.wanted.pop_front();
            return Ok(true);
        };
        let skip = self.map.bytes(run.start - ready.span.start) as usize;
        let bytes = ready.bytes.get(skip..).unwrap_or_default();
        self.watch.start();
        let end = run.end;
        self.fill(run, Filling::Bytes(bytes), &[])?;
        pages.start = end;
        Ok(true)
    }

    /// Brings the next stretch, or has it read; `false` where that has to wait.
    fn replay_stretch(&mut self, replaying: &mut Replaying, cx: &mut Context<'_>) -> Result<bool, Stop> {
        let Some(run) = replaying.next_stretch(self) else { return Ok(false) };
        if self.map.source_offset_of(run.start).is_none() {
            // It is mapped nowhere any more.
            if let Some(pages) = replaying.pending.front_mut() {
                pages.start += 1;
            }
            return Ok(true);
        }
        self.watch.start();
        let end = run.end;
        if !self.fill_at_hand(run.clone(), &[], cx.staging)? {
            return self.read_for_replay(run, replaying, cx);
        }
        if let Some(pages) = replaying.pending.front_mut() {
            // Also where the kernel says that a huge page was there, which is not believed.
            pages.start = end;
        }
        Ok(true)
    }

    /// Has a stretch read, with what is near it; `false` where as many reads are under way as may be.
    fn read_for_replay(
        &mut self,
        run: Range<usize>,
        replaying: &mut Replaying,
        cx: &mut Context<'_>,
    ) -> Result<bool, Stop> {
        if self.reads_in_flight() + replaying.ready.len() >= MOST_READS {
            return Ok(false);
        }
        let wanted = replaying.take_near(run.start, self);
        let end = wanted.last().map_or(run.end, |last| last.end);
        let span = run.start..end;
        self.read_on_worker(span.clone(), Reason::Ahead, cx.workers)?;
        replaying.reading.push((span, wanted));
        Ok(true)
    }

    /// Takes bytes that were read for the replay, if these were, to be installed piece by piece; at once for those who wait.
    pub(crate) fn keep_for_replay(
        &mut self,
        span: &Range<usize>,
        bytes: &mut Vec<u8>,
        waiting: &[usize],
    ) -> bool {
        let Some(replaying) = self.replaying.as_deref_mut() else { return false };
        let Some(index) = replaying.reading.iter().position(|(reading, _)| reading == span) else {
            return false;
        };
        let (span, wanted) = replaying.reading.swap_remove(index);
        replaying.ready.push_back(Ready { span, bytes: std::mem::take(bytes), wanted: wanted.into() });
        for &page in waiting {
            if let Some(Err(stop)) = self.answer_from_ready(page) {
                self.stopped(stop);
            }
        }
        true
    }

    /// Answers a fault from bytes that have come and are not installed yet; `None` where there are none for it.
    pub(crate) fn answer_from_ready(&mut self, page: usize) -> Option<Result<(), Stop>> {
        let replaying = self.replaying.take()?;
        let ready = replaying.ready.iter().find(|ready| ready.span.contains(&page));
        let outcome = ready.map(|ready| {
            // Only this one: the others come at once, and nobody waits for those that are not wanted.
            let skip = self.map.bytes(page - ready.span.start) as usize;
            let bytes = ready.bytes.get(skip..).unwrap_or_default();
            self.fill(page..page + 1, Filling::Bytes(bytes), &[page])
        });
        self.replaying = Some(replaying);
        outcome
    }

    /// Takes down what a fault says of the replay: it was quicker, or nobody expected it.
    pub(crate) fn compare_with_replay(&self, page: usize) {
        let Some(replaying) = self.replaying.as_deref() else { return };
        let Some(offset) = self.map.source_offset_of(page) else { return };
        let (plan, len, stats) = (&replaying.plan, self.map.page_size(), &self.info.stats);
        if self.in_flight.iter().any(|reading| reading.waiting.contains(&page)) {
            return;
        }
        if plan.any(&plan.held, offset, len) {
            stats.replay_held_faults.add(1);
        } else if plan.any(&plan.members, offset, len) {
            stats.replay_late.add(1);
        } else {
            stats.replay_missed.add(1);
        }
    }

    /// Pages that were held back and came with the answer to another page's fault: whether anybody wants them is never seen.
    pub(crate) fn note_held(&self, pages: Range<usize>, waiting: &[usize]) {
        let Some(replaying) = self.replaying.as_deref() else { return };
        if replaying.plan.held.is_empty() {
            return;
        }
        let hidden = pages.filter(|page| !waiting.contains(page)).filter(|&page| {
            let offset = self.map.source_offset_of(page);
            offset
                .is_some_and(|offset| replaying.plan.any(&replaying.plan.held, offset, self.map.page_size()))
        });
        self.info.stats.replay_held_hidden.add(hidden.count() as u64);
    }
}
