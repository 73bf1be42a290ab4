//! Many faults answered at once: pages side by side by one operation where that can be, and their threads woken together.
//!
//! To wake a thread costs as much as to bring its page. On the CPU of the handler it even runs at once, and comes back with
//! one fault, where all of them together would have come back with all of theirs.

use uffd::{UffdError, Userfaultfd};

use super::{Answered, Handler, settle};
use crate::handler_queue::OpenFault;

/// Bytes that are brought before the first of their threads goes on, if they are more than a page.
const MOST_BYTES: u64 = 128 * 1024;

/// Which pages that lie next to each other can be brought by one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joining {
    /// None: there are the same bytes for each.
    Never,
    /// Those that were asked for in this order, too: there are bytes for each, in that order.
    InOrder,
    /// All of them.
    Always,
}

/// Faults whose pages lie next to each other, to be answered by one operation. There is at least one.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Start of the first page.
    pub start: u64,
    /// Bytes of all of them.
    pub len: u64,
    /// Bytes of each.
    pub page_size: u64,
    /// The place of the first one in what was asked for.
    pub index: usize,
    /// Whether the operation is to wake who waits.
    pub wake: bool,
}

impl Run {
    /// One fault by itself.
    #[must_use]
    pub fn alone(fault: &OpenFault) -> Self {
        let page_size = fault.page_size;
        Self { start: fault.page, len: page_size, page_size, index: 0, wake: true }
    }
}

type Asked = (usize, OpenFault);

/// How many of them, from the first on, each `follows` the one before it.
fn length(faults: &[Asked], follows: impl Fn(&Asked, &Asked) -> bool) -> usize {
    let pairs = faults.iter().zip(faults.iter().skip(1));
    faults.len().min(1 + pairs.take_while(|(one, next)| follows(one, next)).count())
}

fn side_by_side(faults: &[Asked]) -> usize {
    let most = faults.first().map_or(1, |(_, fault)| (MOST_BYTES / fault.page_size).max(1));
    let follows = |(_, one): &Asked, (_, next): &Asked| {
        one.page_size == next.page_size && one.page + one.page_size == next.page
    };
    length(faults.get(..most as usize).unwrap_or(faults), follows)
}

impl Joining {
    fn count(self, faults: &[Asked]) -> usize {
        match self {
            Self::Never => 1,
            Self::InOrder => length(faults, |(one, _), (next, _)| one + 1 == *next),
            Self::Always => faults.len(),
        }
    }
}

impl Handler {
    /// Answers several. `act` brings the pages of a run, which has more than one only as `joining` says; `told` gets the result
    /// of each, by its place in `ids`.
    pub fn answer_all(
        &self,
        ids: impl ExactSizeIterator<Item = u64>,
        joining: Joining,
        mut act: impl FnMut(&Userfaultfd, Run) -> Result<u64, UffdError>,
        mut told: impl FnMut(usize, Answered),
    ) {
        // Most batches are of one fault.
        if ids.len() == 1 {
            for (index, id) in ids.enumerate() {
                told(index, self.answer(id, |uffd, fault| act(uffd, Run::alone(fault))));
            }
            return;
        }
        let mut faults: Vec<Asked> = Vec::with_capacity(ids.len());
        let state = self.lock();
        for (index, id) in ids.enumerate() {
            match state.queue.given(id) {
                Some(fault) => faults.push((index, fault)),
                None => told(index, Answered::Stale),
            }
        }
        drop(state);
        faults.sort_unstable_by_key(|(_, fault)| fault.page);
        let mut rest = faults.as_slice();
        while let Some((run, others)) = rest.split_at_checked(side_by_side(rest))
            && !run.is_empty()
        {
            self.answer_run(run, joining, &mut act, &mut told);
            rest = others;
        }
    }

    fn answer_run(
        &self,
        run: &[Asked],
        joining: Joining,
        act: &mut impl FnMut(&Userfaultfd, Run) -> Result<u64, UffdError>,
        told: &mut impl FnMut(usize, Answered),
    ) {
        let gate = self.guarded.gate();
        if run.len() == 1 || !self.is_unchanged(run) {
            for &(index, OpenFault { id, .. }) in run {
                let answered =
                    self.answer_in_gate(id, |uffd, fault| act(uffd, Run { index, ..Run::alone(fault) }));
                told(index, answered);
            }
            return;
        }
        let mut results: Vec<Result<u64, UffdError>> = Vec::with_capacity(run.len());
        let mut joining = joining;
        while let Some((&(index, first), _)) = run.get(results.len()..).and_then(<[Asked]>::split_first) {
            let count = joining.count(run.get(results.len()..).unwrap_or_default());
            let (page_size, len) = (first.page_size, first.page_size * count as u64);
            let result = act(&self.guarded, Run { start: first.page, len, page_size, index, wake: false });
            let done = match result {
                Ok(_) => count,
                Err(UffdError::PartiallyCopied { done }) => (done / page_size) as usize,
                Err(_) => 0,
            };
            results.extend(std::iter::repeat_n(Ok(page_size), done));
            // A range can be refused for its end: what of it can be done is found out one by one.
            match result {
                Err(error) if done == 0 && count == 1 => results.push(Err(error)),
                Err(_) => joining = Joining::Never,
                Ok(_) => {}
            }
        }
        let answered = self.settle_run(run, results);
        self.wake_done(run, &answered);
        drop(gate);
        for ((index, _), answered) in run.iter().zip(answered) {
            told(*index, answered);
        }
    }

    /// Whether all of them are still as they were when the run was made.
    fn is_unchanged(&self, run: &[Asked]) -> bool {
        let state = self.current();
        run.iter().all(|(_, fault)| state.queue.given(fault.id) == Some(*fault))
    }

    fn settle_run(&self, run: &[Asked], results: Vec<Result<u64, UffdError>>) -> Vec<Answered> {
        let is_forced = self.guarded.was_forced();
        let mut state = if is_forced { self.current() } else { self.lock() };
        let settled =
            |((_, fault), result): (&Asked, _)| match is_forced && state.queue.given(fault.id).is_none() {
                true => Answered::Stale,
                false => settle(&mut state.queue, fault, result),
            };
        run.iter().zip(results).map(settled).collect()
    }

    /// What is not done keeps its threads: they would only come back.
    fn wake_done(&self, run: &[Asked], answered: &[Answered]) {
        let mut pages = run.iter().zip(answered).peekable();
        while let Some(((_, first), answered)) = pages.next() {
            if !matches!(answered, Answered::Done(_)) {
                continue;
            }
            let mut len = first.page_size;
            while pages.next_if(|(_, answered)| matches!(answered, Answered::Done(_))).is_some() {
                len += first.page_size;
            }
            // Nobody waits where that fails.
            let _ = self.guarded.wake(first.page, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pages: &[(usize, u64, u64)]) -> Vec<Asked> {
        let fault =
            |page, page_size| OpenFault { id: 0, address: page, page, page_size, flags: 0, thread: 0 };
        pages.iter().map(|&(index, page, page_size)| (index, fault(page * 4096, page_size))).collect()
    }

    #[test]
    fn a_run_ends_at_a_gap_at_another_page_size_and_at_its_limit() {
        let small = |pages: &[u64]| asked(&pages.iter().map(|&page| (0, page, 4096)).collect::<Vec<_>>());

        assert_eq!(side_by_side(&small(&[])), 0);
        assert_eq!(side_by_side(&small(&[7])), 1);
        assert_eq!(side_by_side(&small(&[7, 8, 9, 11])), 3);
        assert_eq!(side_by_side(&small(&(0..100).collect::<Vec<_>>())), 32);
        assert_eq!(side_by_side(&asked(&[(0, 511, 4096), (1, 512, 2 << 20)])), 1);
        assert_eq!(
            side_by_side(&asked(&[(0, 0, 2 << 20), (1, 512, 2 << 20)])),
            1,
            "each is more than the limit"
        );
    }

    #[test]
    fn pages_are_joined_where_their_bytes_are() {
        let faults = asked(&[(4, 0, 4096), (5, 1, 4096), (2, 2, 4096)]);

        assert_eq!(Joining::Never.count(&faults), 1);
        assert_eq!(Joining::InOrder.count(&faults), 2);
        assert_eq!(Joining::Always.count(&faults), 3);
    }
}
