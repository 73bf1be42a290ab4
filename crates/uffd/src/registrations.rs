//! Which addresses are registered, and how.
//!
//! The kernel does not tell, and what it does when a range is registered again is easily misread: a range registered
//! for missing faults loses that mode when it is registered for write-protect faults, and one registered for both keeps
//! both when it is registered for missing faults alone. So modes are recorded here and only ever added.

use crate::features::Modes;

/// A stretch of addresses with one set of modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) modes: Modes,
}

/// Disjoint segments, ordered by address. Neighbours of equal modes are one segment.
#[derive(Debug, Default, Clone)]
pub(crate) struct Registrations {
    segments: Vec<Segment>,
}

impl Registrations {
    /// `start..end` cut at every change of modes, each piece with the modes it has now (none where unregistered).
    pub(crate) fn pieces(&self, start: u64, end: u64) -> Vec<Segment> {
        let mut pieces = Vec::new();
        let mut at = start;
        for segment in self.segments.iter().filter(|segment| segment.start < end && segment.end > start) {
            let from = segment.start.max(start);
            if from > at {
                pieces.push(Segment { start: at, end: from, modes: Modes::empty() });
            }
            let to = segment.end.min(end);
            pieces.push(Segment { start: from, end: to, modes: segment.modes });
            at = to;
        }
        if at < end {
            pieces.push(Segment { start: at, end, modes: Modes::empty() });
        }
        pieces
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// What is registered, in whichever modes.
    pub(crate) fn all(&self) -> Vec<(u64, u64)> {
        self.segments.iter().map(|segment| (segment.start, segment.end)).collect()
    }

    /// What is registered for missing faults.
    pub(crate) fn missing(&self) -> Vec<(u64, u64)> {
        let missing = self.segments.iter().filter(|segment| segment.modes.contains(Modes::MISSING));
        missing.map(|segment| (segment.start, segment.end)).collect()
    }

    /// Records that `start..end` has exactly these modes; none: not registered.
    pub(crate) fn set(&mut self, start: u64, end: u64, modes: Modes) {
        let mut kept = Vec::with_capacity(self.segments.len() + 2);
        for segment in &self.segments {
            if segment.start < start {
                kept.push(Segment { end: segment.end.min(start), ..*segment });
            }
            if segment.end > end {
                kept.push(Segment { start: segment.start.max(end), ..*segment });
            }
        }
        if !modes.is_empty() {
            kept.push(Segment { start, end, modes });
        }
        kept.sort_by_key(|segment| segment.start);
        self.segments.clear();
        for segment in kept {
            match self.segments.last_mut() {
                Some(last) if last.end == segment.start && last.modes == segment.modes => {
                    last.end = segment.end
                }
                _ => self.segments.push(segment),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: Modes = Modes::MISSING;
    const W: Modes = Modes::WRITE_PROTECT;

    fn segments(registrations: &Registrations) -> Vec<(u64, u64, Modes)> {
        registrations.segments.iter().map(|segment| (segment.start, segment.end, segment.modes)).collect()
    }

    #[test]
    fn setting_the_middle_splits_and_setting_it_back_merges() {
        let mut registrations = Registrations::default();
        registrations.set(0, 100, M);

        registrations.set(40, 60, M | W);
        assert_eq!(segments(&registrations), [(0, 40, M), (40, 60, M | W), (60, 100, M)]);

        registrations.set(40, 60, M);
        assert_eq!(segments(&registrations), [(0, 100, M)]);
    }

    #[test]
    fn unregistering_cuts_out_exactly_the_range() {
        let mut registrations = Registrations::default();
        registrations.set(0, 100, M);

        registrations.set(20, 30, Modes::empty());
        registrations.set(90, 120, Modes::empty());

        assert_eq!(segments(&registrations), [(0, 20, M), (30, 90, M)]);
    }

    #[test]
    fn pieces_cover_the_range_with_holes_and_changes() {
        let mut registrations = Registrations::default();
        registrations.set(10, 20, M);
        registrations.set(30, 40, W);

        let pieces: Vec<_> =
            registrations.pieces(5, 35).iter().map(|piece| (piece.start, piece.end, piece.modes)).collect();

        assert_eq!(pieces, [(5, 10, Modes::empty()), (10, 20, M), (20, 30, Modes::empty()), (30, 35, W)]);
    }
}
