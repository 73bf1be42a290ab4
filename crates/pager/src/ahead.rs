//! Bringing pages that nobody waits for, while no fault waits: the rest of blocks that are wanted, and what is asked for
//! by [`crate::Pager::populate`].

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::PagerError;
use crate::owed::{Deliver, Owed};
use crate::reading::Reason;
use crate::resolve::{Filling, Stop};
use crate::session::{CHANGING_PAUSE, Context, MOST_IN_FLIGHT, Session};
use crate::source;
use crate::workers::Workers;

/// Reads ahead that may be under way at once: faults have room for as many more.
pub(crate) const MOST_READS: usize = MOST_IN_FLIGHT / 2;
/// Zeros that are brought at a time, at most: that takes as long as a piece of bytes.
const ZEROS: u64 = 4 << 20;
/// What a second is divided into: that much is brought at a time where a rate is set.
const PIECES_PER_SECOND: u64 = 64;
/// Stretches that are likely wanted and have not had their turn.
const MOST_WISHES: usize = 64;
/// Requests of a session that may be under way at once.
const MOST_REQUESTS: usize = 64;

/// What is to be brought.
#[derive(Debug, Clone, Default)]
pub struct PopulateOptions {
    /// Addresses, or all of the memory where absent. What the session does not serve of them is left alone.
    pub ranges: Option<Vec<Range<u64>>>,
    /// Bytes a second at most.
    pub rate: Option<u64>,
}

/// Takes the outcome. Called on the event loop's thread: it must return at once.
pub type DeliverPopulated = Deliver<()>;

/// Something to bring: the rest of a block, or what was asked for.
#[derive(Default)]
struct Request {
    /// What it is given up by; `None` where nobody has asked.
    id: Option<u64>,
    /// What was asked for.
    pages: Vec<Range<usize>>,
    /// What has not had its turn yet.
    left: VecDeque<Range<usize>>,
    rate: Option<u64>,
    not_before: Option<Instant>,
    /// The session is not announced before it is done.
    fills: bool,
    /// Told when nothing of it is missing any more.
    answer: Option<Owed<()>>,
}

impl Request {
    /// Bytes to bring at a time, where that is limited.
    fn piece(&self) -> Option<u64> {
        self.rate.map(|rate| rate / PIECES_PER_SECOND)
    }

    /// So many bytes were brought of the first stretch that is left, up to `page`.
    fn advance(&mut self, page: usize, bytes: u64) {
        if let Some(rate) = self.rate {
            let pause = Duration::from_secs_f64(bytes as f64 / rate as f64);
            let now = Instant::now();
            self.not_before = Some(self.not_before.map_or(now, |moment| moment.max(now)) + pause);
        }
        if let Some(pages) = self.left.front_mut() {
            pages.start = page;
            if pages.start >= pages.end {
                self.left.pop_front();
            }
        }
    }
}

/// What a session is to bring although nobody waits for it.
#[derive(Default)]
pub(crate) struct Wishes(Vec<Request>);

impl Wishes {
    /// Pages that nobody has asked for, but that are likely wanted. Too many are forgotten: their faults will bring them.
    pub(crate) fn add(&mut self, pages: Range<usize>) {
        let Some(request) = self.0.iter_mut().find(|request| request.id.is_none()) else {
            self.0.push(Request { left: VecDeque::from([pages]), ..Request::default() });
            return;
        };
        let full = request.left.len() >= MOST_WISHES;
        match request.left.back_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ if full => {}
            _ => request.left.push_back(pages),
        }
    }

    /// All of so many pages, before anybody hears of the session.
    pub(crate) fn to_fill(pages: usize) -> Self {
        let everything = 0..pages;
        let left = VecDeque::from([everything.clone()]);
        Self(vec![Request { pages: vec![everything], left, fills: true, ..Request::default() }])
    }

    /// Whether something of that is still to come.
    pub(crate) fn fills(&self) -> bool {
        self.0.iter().any(|request| request.fills)
    }

    /// The first request whose time has come, or else when that of one comes.
    fn due(&self, now: Instant) -> Result<usize, Option<Instant>> {
        let mut soonest = None;
        for (index, request) in self.0.iter().enumerate().filter(|(_, request)| !request.left.is_empty()) {
            match request.not_before {
                Some(moment) if moment > now => {
                    soonest = Some(soonest.map_or(moment, |soonest: Instant| soonest.min(moment)));
                }
                _ => return Ok(index),
            }
        }
        Err(soonest)
    }
}

/// Where bringing ahead has got to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// There is more to bring, or the session has begun to end: it wants its next turn at once.
    More,
    /// Not before this moment.
    At(Instant),
    /// Nothing, before a fault or a read that ends says otherwise.
    Nothing,
}

impl Session {
    /// Whether there is something to bring that nobody waits for.
    pub(crate) fn has_ahead(&self) -> bool {
        (!self.ahead.0.is_empty() || self.replays() || self.may_collapse()) && self.phase.serves()
    }

    /// Takes a request. It is dropped, and told so, when the session ends before it is done.
    pub(crate) fn populate(&mut self, id: u64, options: PopulateOptions, mut answer: Owed<()>) {
        let pages = match self.pages_to_populate(options.ranges) {
            Ok(pages) => pages,
            Err(error) => return answer.give(Err(error)),
        };
        let left = pages.iter().cloned().collect();
        let (rate, answer) = (options.rate.map(|rate| rate.max(1)), Some(answer));
        self.ahead.0.push(Request { id: Some(id), pages, left, rate, answer, ..Request::default() });
    }

    fn pages_to_populate(&self, ranges: Option<Vec<Range<u64>>>) -> Result<Vec<Range<usize>>, PagerError> {
        if !self.phase.serves() && !self.phase.holds() {
            return Err(PagerError::SessionOver);
        }
        let asked = self.ahead.0.iter().filter(|request| request.id.is_some());
        if asked.count() >= MOST_REQUESTS {
            let most = format!("{MOST_REQUESTS} requests to populate are under way already");
            return Err(PagerError::Exhausted(most));
        }
        let Some(ranges) = ranges else {
            let everything = 0..self.map.pages();
            return Ok(vec![everything]);
        };
        let mut pages = Vec::new();
        for (index, Range { start, end }) in ranges.into_iter().enumerate() {
            let known = pages.len();
            pages.extend(self.map.pages_of(start, end));
            if pages.len() == known {
                let reason = format!("the session serves nothing between {start:#x} and {end:#x}");
                return Err(PagerError::Region { index, reason });
            }
        }
        Ok(pages)
    }

    /// Nobody wants it any more. What is being read still comes.
    pub(crate) fn cancel_populate(&mut self, id: u64) {
        self.ahead.0.retain(|request| request.id != Some(id));
    }

    /// Brings at most `piece` bytes (and at least a page) of what is wanted and nobody waits for.
    pub(crate) fn bring_ahead(&mut self, piece: u64, cx: &mut Context<'_>) -> Ahead {
        // Who waits for a fault that was put off goes first.
        if let Some(moment) = self.deferred.due() {
            return Ahead::At(moment);
        }
        if let Some(ahead) = self.bring_huge(cx) {
            return ahead;
        }
        if self.phase.serves()
            && let Some(ahead) = self.replay_some(cx)
        {
            return ahead;
        }
        let now = Instant::now();
        // Whoever is done is told, also while others wait for their time.
        self.finish_requests();
        while self.phase.serves() {
            let index = match self.ahead.due(now) {
                Ok(index) => index,
                Err(_) if self.finish_requests() => continue,
                Err(Some(soonest)) => return Ahead::At(soonest),
                Err(None) if self.ahead.0.is_empty() => return self.collapse_next(now),
                Err(None) => return Ahead::Nothing,
            };
            let Some(request) = self.ahead.0.get(index) else { break };
            let Some(pages) = request.left.front().cloned() else { break };
            let limited = request.rate.is_some();
            let piece = request.piece().unwrap_or(u64::MAX).min(piece);
            let longest = (piece / self.map.page_size()).max(1) as usize;
            let Some(run) = self.next_to_bring(pages.clone(), longest) else {
                if let Some(request) = self.ahead.0.get_mut(index) {
                    request.advance(pages.end, 0);
                }
                continue;
            };
            let zeros = if limited { None } else { self.zeros_from(&run, pages.end) };
            let run = zeros.clone().unwrap_or(run);
            let (end, bytes) = (run.end, self.map.bytes(run.len()));
            let brought = match zeros {
                Some(zeros) => {
                    self.watch.start();
                    self.fill(zeros, Filling::SourceZeros, &[]).map(|()| true)
                }
                None => self.bring(run, cx),
            };
            return match brought {
                Ok(true) => {
                    if let Some(request) = self.ahead.0.get_mut(index) {
                        request.advance(end, bytes);
                    }
                    Ahead::More
                }
                Ok(false) => Ahead::Nothing,
                Err(Stop::Changing(_)) => Ahead::At(Instant::now() + CHANGING_PAUSE),
                Err(stop) => {
                    self.stopped(stop);
                    Ahead::More
                }
            };
        }
        Ahead::Nothing
    }

    /// Tells of requests of which nothing is missing any more. What was read for one and then could not be installed is
    /// wanted anew: whether there is such a thing.
    fn finish_requests(&mut self) -> bool {
        let (in_flight, states) = (&self.in_flight, &self.states);
        let mut anew = false;
        self.ahead.0.retain_mut(|request| {
            if !request.left.is_empty() {
                return true;
            }
            let being_read = |pages: &Range<usize>| {
                in_flight.iter().any(|read| read.pages.start < pages.end && pages.start < read.pages.end)
            };
            if request.pages.iter().any(being_read) {
                return true;
            }
            let missing = |pages: &&Range<usize>| {
                states.next_missing(pages.start, 1).is_some_and(|run| run.start < pages.end)
            };
            request.left = request.pages.iter().filter(missing).cloned().collect();
            anew |= !request.left.is_empty();
            if request.left.is_empty()
                && let Some(answer) = request.answer.as_mut()
            {
                answer.give(Ok(()));
            }
            !request.left.is_empty()
        });
        anew
    }

    /// The first missing pages of `within` that nobody reads already and that lie together, at most `longest`.
    pub(crate) fn next_to_bring(&self, within: Range<usize>, longest: usize) -> Option<Range<usize>> {
        let mut from = within.start;
        loop {
            let run = self.states.next_missing(from, longest).filter(|run| run.start < within.end)?;
            match self.in_flight.iter().find(|reading| reading.pages.contains(&run.start)) {
                Some(reading) => from = reading.pages.end,
                None => return Some(self.map.clip(run.start..run.end.min(within.end))),
            }
        }
    }

    /// As much behind `run` as the image is known to have zeros for, `run` included: that is quick. `None` where there is none.
    fn zeros_from(&self, run: &Range<usize>, end: usize) -> Option<Range<usize>> {
        if self.huge || self.brings_to_file() || self.tracking.is_some() {
            return None;
        }
        let pages = (ZEROS / self.map.page_size()) as usize;
        let most = self.states.missing_run(run.start, run.start..end.min(run.start + pages));
        [self.map.clip(most), run.clone()].into_iter().find(|pages| self.has_zeros(pages))
    }

    /// Whether the image is known to have nothing but zeros for these pages.
    pub(crate) fn has_zeros(&self, pages: &Range<usize>) -> bool {
        let (offset, len) = (self.map.source_offset_of(pages.start), self.map.bytes(pages.len()));
        offset.is_some_and(|offset| source::known_zeros(&*self.source, offset, len))
    }

    /// Has a worker read pages that nobody waits for; `false` where as many such reads are under way as may be.
    pub(crate) fn read_ahead(&mut self, run: Range<usize>, workers: &Workers) -> Result<bool, Stop> {
        if self.reads_in_flight() >= MOST_READS {
            return Ok(false);
        }
        self.read_on_worker(run, Reason::Ahead, workers).map(|()| true)
    }
}
