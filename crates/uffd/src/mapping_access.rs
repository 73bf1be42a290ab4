//! Reading and writing a mapping through the kernel: what cannot be touched is an error instead of a signal.

use nix::errno::Errno;

use crate::mapping::Mapping;
use crate::mapping_advice::Residency;
use crate::mapping_options::MappingError;

/// Bytes of ours that go one way or the other.
enum Transfer<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Mapping {
    /// [`Mapping::read`] by `process_vm_readv(2)` of this process: a poisoned page is an error and not a signal. Waits
    /// where a page is missing and registered. The faults it takes are the kernel's (at page addresses); where a
    /// userfaultfd sees those of user mode only, or the system call is forbidden, it touches the memory itself, a page at a
    /// time. There it is a signal nevertheless when the page goes in the very moment that it is touched.
    ///
    /// # Errors
    ///
    /// As [`Mapping::read`]; EFAULT at a page that is poisoned, cannot be read from its disk, or lies behind the end of a
    /// file that was cut short.
    pub fn read_checked(&self, offset: usize, into: &mut [u8]) -> Result<(), MappingError> {
        self.transfer(offset, Transfer::Read(into))
    }

    /// [`Mapping::write`] by `process_vm_writev(2)` of this process; see [`Mapping::read_checked`].
    ///
    /// # Errors
    ///
    /// As [`Mapping::write`]; EFAULT as [`Mapping::read_checked`].
    pub fn write_checked(&self, offset: usize, from: &[u8]) -> Result<(), MappingError> {
        if !self.is_writable() {
            return Err(MappingError::ReadOnly);
        }
        self.transfer(offset, Transfer::Write(from))
    }

    /// Moves what the kernel can, and touches what is left, page by page.
    fn transfer(&self, offset: usize, mut ours: Transfer<'_>) -> Result<(), MappingError> {
        let len = ours.len();
        let inside = self.byte_at(offset, len)?;
        let mut done = 0;
        while done < len {
            let remote = libc::iovec { iov_base: inside.wrapping_add(done).cast(), iov_len: len - done };
            // The kernel may not wait for this page, or nobody can have it; or the call is forbidden, or not there.
            let refused = match moved(&ours.behind(done), &remote, &ours) {
                Ok(more @ 1..) => {
                    done += more;
                    continue;
                }
                outcome => matches!(outcome, Ok(_) | Err(Errno::EFAULT)),
            };
            let at = offset + done;
            let page = at / self.page_size() * self.page_size();
            let nobodys = refused && (!self.can_be_registered() || self.is_poisoned(page)?);
            if nobodys || self.ends_before(page) {
                return Err(ours.fault());
            }
            let part = done..len.min(page + self.page_size() - offset);
            done = part.end;
            match &mut ours {
                Transfer::Read(into) => self.read(at, into.get_mut(part).unwrap_or_default())?,
                Transfer::Write(from) => self.write(at, from.get(part).unwrap_or_default())?,
            }
        }
        Ok(())
    }

    /// Of a page that the kernel refuses to touch. (It would fetch one that is swapped out.)
    fn is_poisoned(&self, page: usize) -> Result<bool, MappingError> {
        let states = self.residency(page, self.page_size())?;
        Ok(states.first() == Some(&Residency::Noted))
    }
}

impl Transfer<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Read(into) => into.len(),
            Self::Write(from) => from.len(),
        }
    }

    /// What is left behind the first `done` bytes.
    fn behind(&mut self, done: usize) -> libc::iovec {
        let (start, len) = match self {
            Self::Read(into) => (into.as_mut_ptr(), into.len()),
            Self::Write(from) => (from.as_ptr().cast_mut(), from.len()),
        };
        libc::iovec { iov_base: start.wrapping_add(done).cast(), iov_len: len - done }
    }

    fn fault(&self) -> MappingError {
        let syscall = match self {
            Self::Read(_) => "process_vm_readv",
            Self::Write(_) => "process_vm_writev",
        };
        MappingError::System { syscall, errno: Errno::EFAULT }
    }
}

fn moved(local: &libc::iovec, remote: &libc::iovec, ours: &Transfer<'_>) -> Result<usize, Errno> {
    let (local, remote): (*const libc::iovec, *const libc::iovec) = (local, remote);
    let (one, flags) = (1_u64, 0_u64);
    let number = match ours {
        Transfer::Read(_) => libc::SYS_process_vm_readv,
        Transfer::Write(_) => libc::SYS_process_vm_writev,
    };
    let process = std::process::id();
    // SAFETY: one vector each, which live across the call. The kernel checks both sides; the local one is a buffer of the
    // caller's, the remote one lies in the mapping.
    let result = unsafe { libc::syscall(number, process, local, one, remote, one, flags) };
    Errno::result(result).map(|bytes| bytes as usize)
}
