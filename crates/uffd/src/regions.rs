//! Registering many ranges with many uffds, as a pager of several processes does. Processes that have died meanwhile are
//! passed over and named: there is nothing left of them to serve. When a range is refused, the call undoes what it did.

use std::ops::Range;
use std::sync::PoisonError;

use nix::errno::Errno;

use crate::error::{Operation, UffdError};
use crate::features::Modes;
use crate::registrations::Segment;
use crate::userfaultfd::Userfaultfd;

/// A uffd and ranges of addresses of its process.
pub type Target<'a> = (&'a Userfaultfd, &'a [Range<u64>]);

/// A range that the kernel did not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Which of the targets.
    pub target: usize,
    /// Which of its ranges, or (where only a part of one could not be undone) that part.
    pub range: Range<u64>,
    /// Why.
    pub error: UffdError,
}

/// Why ranges are not registered, or still are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{:#x}..{:#x} of target {}: {}{}",
    refused.range.start, refused.range.end, refused.target, refused.error,
    if others.is_empty() { String::new() } else { format!(" (and {} more ranges)", others.len()) }
)]
pub struct RegionsError {
    /// The first range that was refused.
    pub refused: Refused,
    /// Of [`register_regions`]: what it had registered and could not undo. Of [`unregister_regions`]: the further ranges
    /// that are still registered.
    pub others: Vec<Refused>,
    /// The targets whose process was found to be gone by then.
    pub dead: Vec<usize>,
}

/// [`Userfaultfd::register`] of each range with its uffd. Returns the targets (by index, ascending) whose process is gone;
/// their remaining ranges are passed over.
///
/// # Safety
///
/// As for [`Userfaultfd::register`], for each range.
///
/// # Errors
///
/// When a range is refused. What this call registered before it is unregistered again. Only where a range had been
/// registered before for other modes, the added modes stay: taking them back would unregister the range for a moment, and
/// threads that wait in it would read zeros.
pub unsafe fn register_regions(targets: &[Target<'_>], modes: Modes) -> Result<Vec<usize>, RegionsError> {
    let mut done: Vec<(usize, &Userfaultfd, Segment)> = Vec::new();
    let mut dead = Vec::new();
    for (target, range, uffd) in each(targets) {
        if dead.last() == Some(&target) {
            continue;
        }
        let before = uffd
            .registrations()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pieces(range.start, range.end);
        let result = length(&range, Operation::Register).and_then(|len| {
            // SAFETY: the caller's promise, for each range.
            unsafe { uffd.register(range.start, len, modes) }
        });
        match result {
            Ok(_) => done.extend(before.into_iter().map(|piece| (target, uffd, piece))),
            Err(UffdError::UffdClosed) => dead.push(target),
            Err(error) => {
                let refused = Refused { target, range, error };
                return Err(RegionsError { refused, others: undo(done), dead });
            }
        }
    }
    Ok(dead)
}

/// [`Userfaultfd::unregister`] of each range from its uffd: pages that are still missing read zero from then on, and
/// whoever waits for one is woken. Returns the targets (by index, ascending) whose process is gone; their remaining ranges
/// are passed over.
///
/// # Errors
///
/// When ranges were refused. All others are unregistered nevertheless.
pub fn unregister_regions(targets: &[Target<'_>]) -> Result<Vec<usize>, RegionsError> {
    let mut dead = Vec::new();
    let mut all_refused = Vec::new();
    for (target, range, uffd) in each(targets) {
        if dead.last() == Some(&target) {
            continue;
        }
        match length(&range, Operation::Unregister).and_then(|len| uffd.unregister(range.start, len)) {
            Ok(()) => {}
            Err(UffdError::UffdClosed) => dead.push(target),
            Err(error) => all_refused.push(Refused { target, range, error }),
        }
    }
    let mut all_refused = all_refused.into_iter();
    match all_refused.next() {
        None => Ok(dead),
        Some(refused) => Err(RegionsError { refused, others: all_refused.collect(), dead }),
    }
}

fn each<'a>(targets: &[Target<'a>]) -> impl Iterator<Item = (usize, Range<u64>, &'a Userfaultfd)> {
    let of_one = |(target, &(uffd, ranges)): (usize, &Target<'a>)| {
        ranges.iter().map(move |range| (target, range.clone(), uffd))
    };
    targets.iter().enumerate().flat_map(of_one)
}

fn length(range: &Range<u64>, operation: Operation) -> Result<u64, UffdError> {
    range.end.checked_sub(range.start).ok_or(UffdError::System { operation, errno: Errno::EINVAL })
}

/// The last first: where ranges of one call overlap, the first of them was registered over nothing.
fn undo(done: Vec<(usize, &Userfaultfd, Segment)>) -> Vec<Refused> {
    let mut left = Vec::new();
    for (target, uffd, piece) in done.into_iter().rev().filter(|(_, _, piece)| piece.modes.is_empty()) {
        match uffd.unregister(piece.start, piece.end - piece.start) {
            Ok(()) | Err(UffdError::UffdClosed) => {}
            Err(error) => left.push(Refused { target, range: piece.start..piece.end, error }),
        }
    }
    left
}
