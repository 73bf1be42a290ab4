//! Recordings made of recordings: what any of several runs wanted, what all of them wanted.

use std::collections::HashMap;
use std::ops::Range;

use super::{MOST_BROUGHT, MOST_FAULTS, Trace, TraceEnd, TraceFault, TraceHeader, TraceKind};
use crate::error::PagerError;

/// Pages at most that one recording of several is made of: 256 GiB of small ones would take too much memory to sort.
const MOST_PAGES: usize = 1 << 24;

/// What is known of a page of the image.
struct Seen {
    /// In how many recordings it is.
    recordings: usize,
    /// Where in them, summed up: 0 for the first page, 1 for the last.
    place: f64,
    time_ns: u64,
    latency_ns: u64,
    kind: TraceKind,
    write: bool,
    /// In which recording it was seen last.
    last: usize,
}

impl Trace {
    /// What any of them wanted, in the order in which they wanted it on average.
    ///
    /// # Errors
    ///
    /// [`PagerError::TraceImage`] for recordings of different images or page sizes; [`PagerError::Exhausted`] for too many
    /// pages.
    pub fn merge(traces: &[&Self]) -> Result<Self, PagerError> {
        Self::combined(traces, 1)
    }

    /// What all of them wanted, in the order in which they wanted it on average.
    ///
    /// # Errors
    ///
    /// As [`Trace::merge`].
    pub fn intersect(traces: &[&Self]) -> Result<Self, PagerError> {
        Self::combined(traces, traces.len())
    }

    /// The pages that were brought, each once, in the order in which they were first wanted; neighbours together.
    #[must_use]
    pub fn working_set(&self) -> Vec<Range<u64>> {
        let mut seen = Members::default();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for fault in &self.faults {
            for page in fault.brought().filter(|&page| seen.insert(page)) {
                match ranges.last_mut() {
                    Some(range) if range.end == page => range.end += 1,
                    _ => ranges.push(page..page + 1),
                }
            }
        }
        ranges
    }

    fn combined(traces: &[&Self], least: usize) -> Result<Self, PagerError> {
        let header = common_header(traces)?;
        let mut pages: HashMap<u64, Seen> = HashMap::new();
        for (index, trace) in traces.iter().enumerate() {
            trace.note_pages(index, &mut pages)?;
        }
        let mut kept: Vec<(u64, Seen)> =
            pages.into_iter().filter(|(_, seen)| seen.recordings >= least).collect();
        let place = |seen: &Seen| seen.place / seen.recordings as f64;
        kept.sort_by(|(a, one), (b, other)| place(one).total_cmp(&place(other)).then(a.cmp(b)));
        let dropped = traces.iter().map(|trace| trace.dropped).fold(0, u64::saturating_add);
        let mut made = Self { header, faults: Vec::new(), end: TraceEnd::Complete, dropped };
        for (page, seen) in kept {
            made.push(page, &seen);
        }
        Ok(made)
    }

    /// Takes down what this recording, the `index`-th, wanted.
    fn note_pages(&self, index: usize, pages: &mut HashMap<u64, Seen>) -> Result<(), PagerError> {
        let most = self.faults.len().max(2) as f64 - 1.0;
        for (nth, fault) in self.faults.iter().enumerate() {
            for page in fault.brought() {
                if pages.len() >= MOST_PAGES {
                    let reason = format!("the recordings have more than {MOST_PAGES} pages together");
                    return Err(PagerError::Exhausted(reason));
                }
                let seen = pages.entry(page).or_insert(Seen {
                    recordings: 0,
                    place: 0.0,
                    time_ns: 0,
                    latency_ns: 0,
                    kind: fault.kind,
                    write: false,
                    last: usize::MAX,
                });
                seen.write |= fault.write;
                if std::mem::replace(&mut seen.last, index) == index {
                    continue;
                }
                seen.recordings += 1;
                seen.place += nth as f64 / most;
                seen.time_ns = seen.time_ns.saturating_add(fault.time_ns);
                seen.latency_ns = seen.latency_ns.saturating_add(fault.latency_ns);
            }
        }
        Ok(())
    }

    /// One page more at the end: with the ones before it, where it is their neighbour.
    fn push(&mut self, page: u64, seen: &Seen) {
        let average = |sum: u64| sum / seen.recordings.max(1) as u64;
        let fault = TraceFault {
            // The order is what counts, and the file is read in the order of its times.
            time_ns: average(seen.time_ns).max(self.faults.last().map_or(0, |fault| fault.time_ns)),
            kind: seen.kind,
            write: seen.write,
            page,
            before: 0,
            pages: 1,
            latency_ns: average(seen.latency_ns),
        };
        let full = self.faults.len() >= MOST_FAULTS;
        match self.faults.last_mut() {
            Some(last)
                if last.brought().end == page
                    && last.pages < MOST_BROUGHT
                    && (last.write, last.kind) == (seen.write, seen.kind) =>
            {
                last.pages += 1;
            }
            _ if full => {
                self.end = TraceEnd::Full;
                self.dropped = self.dropped.saturating_add(1);
            }
            _ => self.faults.push(fault),
        }
    }
}

fn common_header(traces: &[&Trace]) -> Result<TraceHeader, PagerError> {
    let Some(first) = traces.first() else {
        return Err(PagerError::TraceImage("there is no recording to make one of".to_owned()));
    };
    let mut header = first.header;
    for (index, trace) in traces.iter().enumerate() {
        let other = trace.header;
        let what = if other.image_size != header.image_size || other.identity != header.identity {
            "image"
        } else if other.page_size != header.page_size {
            "page size"
        } else {
            header.started_ms = header.started_ms.min(other.started_ms);
            continue;
        };
        return Err(PagerError::TraceImage(format!("recording {index} is of another {what} than the first")));
    }
    Ok(header)
}

/// A set of pages of the image: 64 of them a word, and no memory for what is not in it.
#[derive(Debug, Default)]
pub(crate) struct Members(HashMap<u64, u64>);

impl Members {
    /// Whether it was not in there before.
    pub(crate) fn insert(&mut self, page: u64) -> bool {
        let word = self.0.entry(page / 64).or_insert(0);
        let bit = 1 << (page % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}
