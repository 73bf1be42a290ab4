//! A memfd that nobody can write to or cut short any more: its bytes are as fixed as those of this program, so they are copied
//! from where they are.

use std::fs::File;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use uffd::{FileAccess, FileOptions, Mapping};

/// The mapping of such a memfd.
#[derive(Debug)]
pub(super) struct Sealed(Mapping);

impl Sealed {
    /// `None` for every other file, and where it cannot be mapped.
    pub(super) fn of(file: &File) -> Option<Self> {
        let seals = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS).ok()?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE) {
            return None;
        }
        let file = file.try_clone().ok()?;
        let options = FileOptions { access: FileAccess::ReadOnly, ..FileOptions::default() };
        Mapping::of_file(file.into(), options).ok().map(Self)
    }

    /// `None` beyond its end.
    pub(super) fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.0.len());
        let start = self.0.as_ptr().cast_const().wrapping_add(offset);
        // SAFETY: inside of the mapping (else it is not called), which lives as long as `self` and can be read. Its bytes never change: seals cannot be
        // taken off, and one against writing is refused as long as anybody could write.
        inside.then(|| unsafe { std::slice::from_raw_parts(start, len) })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::super::{FileSource, PageSource, ReadNow};
    use super::*;

    fn memfd(seals: SealFlag) -> OwnedFd {
        let mut file = File::from(memfd_create(c"image", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.write_all(&[[1_u8; 4096], [2; 4096]].concat()).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file.into()
    }

    #[test]
    fn bytes_that_nobody_can_change_are_given_where_they_are_and_not_beyond_their_end() {
        let fd = memfd(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE);
        let source = FileSource::of_fd(fd, Path::new("image")).unwrap();

        assert_eq!(source.bytes(4095, 2), Some(&[1, 2][..]));
        assert_eq!(source.bytes(4096, 4096), Some(&[2; 4096][..]));
        for (offset, len) in [(8192, 1), (4096, 4097), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(source.bytes(offset, len), None, "{offset}+{len}");
        }
    }

    #[test]
    fn bytes_that_somebody_may_change_or_cut_off_are_read() {
        for seals in [SealFlag::empty(), SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_WRITE] {
            let source = FileSource::of_fd(memfd(seals), Path::new("image")).unwrap();
            let mut bytes = [0; 2];

            assert_eq!(source.bytes(0, 4096), None, "{seals:?}");
            assert_eq!(source.read_now(4095, &mut bytes).unwrap(), ReadNow::Done);
            assert_eq!(bytes, [1, 2]);
        }
    }
}
