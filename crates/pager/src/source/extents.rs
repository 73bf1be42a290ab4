//! Where a sparse file has data, found once with `SEEK_DATA` and `SEEK_HOLE`.

use std::fs::File;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// The stretches of the first `size` bytes that hold data, in order; `None` when there are more than `most`. Moves the
/// file's position. May wait for a disk.
///
/// A file system that cannot tell says that everything is data.
pub(super) fn data_of(file: &File, size: u64, most: usize) -> Result<Option<Vec<Range<u64>>>, Errno> {
    let mut extents = Vec::new();
    let mut from = 0;
    while from < size {
        let position = libc::off_t::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        let start = match lseek(file, position, Whence::SeekData) {
            Ok(start) => start,
            // No data from here on.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = match lseek(file, start, Whence::SeekHole) {
            Ok(end) => end as u64,
            // Cut short meanwhile.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno),
        };
        let start = start as u64;
        if start >= size {
            break;
        }
        if extents.len() == most {
            return Ok(None);
        }
        extents.push(start..end.min(size));
        from = end;
    }
    Ok(Some(extents))
}

/// Whether any of the sorted, disjoint `extents` reaches into `offset..offset + len`.
pub(super) fn any_in(extents: &[Range<u64>], offset: u64, len: u64) -> bool {
    let first = extents.partition_point(|extent| extent.end <= offset);
    extents.get(first).is_some_and(|extent| extent.start < offset.saturating_add(len))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// 64 KiB steps: larger than the blocks of any file system.
    const STEP: u64 = 64 << 10;

    fn sparse(steps: u64, data: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(steps * STEP).unwrap();
        for step in data {
            file.write_all_at(&[7; STEP as usize], step * STEP).unwrap();
        }
        file
    }

    #[test]
    fn data_is_found_between_holes_up_to_the_size_asked_for() {
        let file = sparse(16, &[1, 2, 9, 15]);

        let extents = data_of(&file, 16 * STEP, 10).unwrap().unwrap();

        assert_eq!(extents, [STEP..3 * STEP, 9 * STEP..10 * STEP, 15 * STEP..16 * STEP]);
        let clipped = data_of(&file, 9 * STEP + 5, 10).unwrap().unwrap();
        assert_eq!(clipped, [STEP..3 * STEP, 9 * STEP..9 * STEP + 5]);
        assert_eq!(data_of(&sparse(4, &[]), 4 * STEP, 10).unwrap().unwrap(), []);
    }

    #[test]
    fn more_stretches_than_allowed_are_not_collected() {
        let file = sparse(16, &[1, 3, 5]);

        assert_eq!(data_of(&file, 16 * STEP, 2).unwrap(), None);
        assert_eq!(data_of(&file, 16 * STEP, 3).unwrap().unwrap().len(), 3);
    }

    #[test]
    fn a_range_meets_data_where_a_byte_of_it_is_inside() {
        let extents = [10..20, 30..40];

        for (offset, len, met) in
            [(0, 10, false), (0, 11, true), (19, 1, true), (20, 10, false), (25, 100, true), (40, 9, false)]
        {
            assert_eq!(any_in(&extents, offset, len), met, "{offset}+{len}");
        }
    }
}
