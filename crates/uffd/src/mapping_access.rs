//! Reading and writing a mapping through the kernel: what cannot be touched is an error instead of a signal.

use nix::errno::Errno;

use crate::mapping::Mapping;
use crate::mapping_advice::Residency;
use crate::mapping_options::MappingError;

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

impl Mapping {
    /// [`Mapping::read`] by `process_vm_readv(2)` of this process: a poisoned page is an error and not a signal. Waits
    /// where a page is missing and registered. The faults it takes are the kernel's (at page addresses); where a
    /// userfaultfd sees those of user mode only, or the system call is forbidden, it touches the memory itself.
    ///
    /// # Errors
    ///
    /// As [`Mapping::read`]; EFAULT at a page that is poisoned, or behind the end of a file that was cut short.
    pub fn read_checked(&self, offset: usize, into: &mut [u8]) -> Result<(), MappingError> {
        let done = self.transfer(offset, into.as_mut_ptr(), into.len(), Direction::Read)?;
        match into.get_mut(done..) {
            Some(rest @ [_, ..]) => self.read(offset + done, rest),
            _ => Ok(()),
        }
    }

    /// [`Mapping::write`] by `process_vm_writev(2)` of this process; see [`Mapping::read_checked`].
    ///
    /// # Errors
    ///
    /// As [`Mapping::write`]; EFAULT at a page that is poisoned, or behind the end of a file that was cut short.
    pub fn write_checked(&self, offset: usize, from: &[u8]) -> Result<(), MappingError> {
        if !self.is_writable() {
            return Err(MappingError::ReadOnly);
        }
        let done = self.transfer(offset, from.as_ptr().cast_mut(), from.len(), Direction::Write)?;
        match from.get(done..) {
            Some(rest @ [_, ..]) => self.write(offset + done, rest),
            _ => Ok(()),
        }
    }

    /// Moves as many bytes as the kernel can; what is left has to be touched by this thread itself.
    fn transfer(
        &self,
        offset: usize,
        ours: *mut u8,
        len: usize,
        direction: Direction,
    ) -> Result<usize, MappingError> {
        let inside = self.byte_at(offset, len)?;
        let mut done = 0;
        while done < len {
            let local = libc::iovec { iov_base: ours.wrapping_add(done).cast(), iov_len: len - done };
            let remote = libc::iovec { iov_base: inside.wrapping_add(done).cast(), iov_len: len - done };
            match moved(&local, &remote, direction) {
                Ok(0) | Err(Errno::EFAULT) => {
                    // The kernel may not wait for this page, or nobody can have it.
                    self.refuse_untouchable(offset + done)?;
                    return Ok(done);
                }
                Ok(more) => done += more,
                // Forbidden, or not there.
                Err(_) => return Ok(done),
            }
        }
        Ok(done)
    }

    fn refuse_untouchable(&self, offset: usize) -> Result<(), MappingError> {
        let start = offset / self.page_size() * self.page_size();
        let states = self.residency(start, self.page_size())?;
        match states.first() {
            Some(Residency::Noted) => {
                Err(MappingError::System { syscall: "process_vm_readv", errno: Errno::EFAULT })
            }
            _ => Ok(()),
        }
    }
}

fn moved(local: &libc::iovec, remote: &libc::iovec, direction: Direction) -> Result<usize, Errno> {
    let (local, remote): (*const libc::iovec, *const libc::iovec) = (local, remote);
    let (one, flags) = (1_u64, 0_u64);
    let number = match direction {
        Direction::Read => libc::SYS_process_vm_readv,
        Direction::Write => libc::SYS_process_vm_writev,
    };
    let process = std::process::id();
    // SAFETY: one vector each, which live across the call. The kernel checks both sides; the local one is a buffer of the
    // caller's, the remote one lies in the mapping.
    let result = unsafe { libc::syscall(number, process, local, one, remote, one, flags) };
    Errno::result(result).map(|bytes| bytes as usize)
}
